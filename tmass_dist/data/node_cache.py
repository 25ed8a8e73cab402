"""The limited cache of downloaded shards that the ranks of a node share (``data.cache_gb``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tmass_dist.config import DataConfig
from tmass_dist.data.cache import GB, CachePlan, check_capacity, node_uses
from tmass_dist.data.fetcher import Fetcher, RemoteShard, wait_for, write_step
from tmass_dist.data.index import Index
from tmass_dist.data.mixed_order import OneSetStreamingOrder, make_order
from tmass_dist.data.streaming import LaneOrder, StreamingOrder
from tmass_dist.errors import UserError


class NodeCache:
    """One rank's view of the cache of its node; the node's lowest rank starts the process that fills it.

    Args:
        index: a split with shards behind URLs; those that are local files are left alone.
        order: of training.
        config: cache directory and limit.
        rank, world_size: of this process.
        node_ranks: the ranks of this node.

    Raises:
        UserError: the cache is too small for the lanes of this node, or there is no shard to download.
    """

    def __init__(
        self,
        index: Index,
        order: LaneOrder,
        config: DataConfig,
        rank: int,
        world_size: int,
        node_ranks: Sequence[int],
    ) -> None:
        assert config.cache_gb is not None
        if not index.is_remote:
            raise UserError(f"data.cache_gb limits the shards of URLs, and all shards of {index.directory} are local")
        if config.cache is None:
            raise UserError("data.cache_gb limits the size of data.cache, which is not set")
        self._order, self._rank, self._node_ranks = order, rank, sorted(node_ranks)
        self._directory, self._retry_s = Path(config.cache).expanduser(), config.retry_s
        self._capacity = int(config.cache_gb * GB)
        self._shards = [
            RemoteShard(f"{shard.directory or index.directory}/{shard.name}", config.cache, shard.bytes, shard.sha256)
            for shard in index.shards
        ]
        self._shard_bytes = np.array([shard.bytes if shard.is_remote else 0 for shard in self._shards])
        per_rank = order.lanes // world_size
        self._lanes = [rank * per_rank + k for rank in self._node_ranks for k in range(per_rank)]
        check_capacity(config.cache_gb, order, self._lanes, self._shard_bytes)

    def reading(self, index: Index) -> Index:
        """The same index, whose samples wait for this cache."""
        return replace(index, wait_for_shard=self._wait_for)

    def _wait_for(self, number: int) -> Path:
        return wait_for(self._shards[number], self._directory)

    def start(self, step: int) -> Fetcher | None:
        """Start to download what is needed from ``step`` on; None if another rank does it.

        Raises:
            UserError: another run uses the cache.
        """
        if self._rank != self._node_ranks[0]:
            return None

        def make_plan(held: list[int], kept: list[int]) -> CachePlan:
            uses, steps_per_epoch = node_uses(self._order, self._lanes), self._order.steps_per_epoch
            return CachePlan(uses, self._shard_bytes, self._capacity, steps_per_epoch, step, held, kept)

        return Fetcher(self._shards, make_plan, self._directory, self._node_ranks, self._retry_s)

    def note_step(self, step: int) -> None:
        """This rank has read all batches before ``step``."""
        write_step(self._directory, self._rank, step)


def check_order(index: Index, config: DataConfig, seed: int, world_size: int) -> None:
    """Check, before a run records its settings, that the split is large enough, and the cache for a node of one rank.

    Raises:
        UserError: the split or the cache is too small.
    """
    order = make_order(index, config, seed)
    if config.cache_gb is not None and isinstance(order, StreamingOrder | OneSetStreamingOrder):
        NodeCache(index, order, config, 0, world_size, [0])
