"""The order of training on a mixture of splits.

An epoch reads each pair of a part ``weight`` times. With ``data.batch_from=mixed`` the pairs of each part lie evenly in
the epoch, so all batches have nearly the same number of them; with ``one`` each batch is from one part.
"""

# Shapes: B pairs of the global batch, K parts, T steps of an epoch.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from tmass_dist.config import DataConfig
from tmass_dist.data.deal import interleave
from tmass_dist.data.index import Index
from tmass_dist.data.mixture import Mixture
from tmass_dist.data.order import GlobalOrder, Order, deal_rounds, rounds
from tmass_dist.data.streaming import ShardUses, StreamingOrder
from tmass_dist.errors import UserError
from tmass_dist.noise import text_key


def check_shares(names: Sequence[str], num_videos: Sequence[int], num_pairs: Sequence[int], batch_size: int) -> None:
    """Check that no part has more pairs in a batch than videos, so that no batch needs a video twice.

    Args:
        names: of the parts.
        num_videos: of each part.
        num_pairs: of each part in an epoch.
        batch_size: pairs of the global batch.

    Raises:
        UserError: a part has too few videos for its weight.
    """
    for name, videos, pairs in zip(names, num_videos, num_pairs):
        share = -(-batch_size * pairs // sum(num_pairs))
        if share > videos:
            raise UserError(
                f"{name} has {videos} videos, and its weight gives it {share} of the {batch_size} pairs of a batch; "
                "lower its weight or data.batch_size"
            )


class MixedOrder:
    """Batches from permutations of all parts (``data.order=global``, ``data.batch_from=mixed``).

    Args:
        num_captions: captions of each sample, for each part.
        weights: how many times an epoch reads each pair of a part.
        seed: seed of the run.
        batch_size: pairs of the global batch.

    Raises:
        UserError: there are fewer pairs than one batch.
    """

    def __init__(
        self, num_captions: Sequence[np.ndarray], weights: Sequence[int], *, seed: int, batch_size: int
    ) -> None:
        self._num_captions, self._weights, self._seed, self._batch_size = num_captions, weights, seed, batch_size
        self._first_sample = np.cumsum([0, *map(len, num_captions)])
        totals = [int(captions.sum()) * weight for captions, weight in zip(num_captions, weights)]
        self.steps_per_epoch = sum(totals) // batch_size
        self.left_out = sum(totals) - self.steps_per_epoch * batch_size
        if not self.steps_per_epoch:
            raise UserError(f"{sum(totals)} pairs are fewer than one batch of {batch_size}")
        part_TB = interleave(totals)[: self.steps_per_epoch * batch_size].reshape(-1, batch_size)
        counts_KT = np.stack([(part_TB == part).sum(axis=1) for part in range(len(totals))])
        self._ends_KT = np.cumsum(counts_KT, axis=1)
        """Pairs of each part in the epoch up to the end of each step."""
        self._epoch_pairs = lru_cache(maxsize=1)(self._draw_epoch)
        self._batch = lru_cache(maxsize=1)(self._draw_batch)

    def _draw_epoch(self, epoch: int) -> list[np.ndarray]:
        """The pairs of each part in the order of the epoch's batches."""
        pairs = []
        for part, (captions, weight) in enumerate(zip(self._num_captions, self._weights)):
            seed = text_key("part", self._seed, part)
            passes = (rounds(captions, seed=seed, epoch=epoch * weight + number) for number in range(weight))
            dealt = deal_rounds((queue for one_pass in passes for queue in one_pass), self._ends_KT[part])
            dealt[:, 0] += self._first_sample[part]
            pairs.append(dealt)
        return pairs

    def _draw_batch(self, step: int) -> np.ndarray:
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        starts_K = self._ends_KT[:, in_epoch - 1] if in_epoch else np.zeros(len(self._ends_KT), np.int64)
        ends_K = self._ends_KT[:, in_epoch]
        parts = [pairs[start:end] for pairs, start, end in zip(self._epoch_pairs(epoch), starts_K, ends_K)]
        # Shuffled, so that each rank has pairs of all parts.
        return np.random.default_rng((text_key("mixed", self._seed), step)).permutation(np.concatenate(parts))

    def pairs(self, step: int, positions: range) -> np.ndarray:
        return self._batch(step)[positions.start : positions.stop]

    def substitutes(self, step: int, position: int) -> Iterator[tuple[int, int]]:
        """As :meth:`Order.substitutes`; all are of the same part."""
        videos_B = self._batch(step)[:, 0]
        part_B = np.searchsorted(self._first_sample, videos_B, side="right") - 1
        part = int(part_B[position])
        place, count = int((part_B[:position] == part).sum()), int((part_B == part).sum())
        others = np.setdiff1d(np.arange(*self._first_sample[part : part + 2]), videos_B)
        order = np.random.default_rng((text_key("part", self._seed, part), step, 1)).permutation(others)
        for video in order[place::count]:
            num_captions = int(self._num_captions[part][video - self._first_sample[part]])
            yield int(video), text_key("substitute", self._seed, step, position) % num_captions


class OneSetOrder:
    """Whole batches of the parts in turn (``data.batch_from=one``), each part in an order of its own.

    An epoch has all batches of ``weight`` epochs of each part, evenly mixed.

    Args:
        orders: one of each part.
        weights: how many times an epoch reads each pair of a part.
        first_samples: number of the first sample of each part.
        seed: seed of the run.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[int], first_samples: np.ndarray, seed: int) -> None:
        self._orders, self._first_samples, self._seed = orders, first_samples, seed
        self._steps = [order.steps_per_epoch * weight for order, weight in zip(orders, weights)]
        self.steps_per_epoch = sum(self._steps)
        self.left_out = sum(order.left_out * weight for order, weight in zip(orders, weights))
        self._part_of_step = lru_cache(maxsize=2)(self._draw_parts)

    def _draw_parts(self, epoch: int) -> np.ndarray:
        """The part of each step of an epoch."""
        return interleave(self._steps, np.random.default_rng((text_key("one part", self._seed), epoch)))

    def _locate(self, step: int) -> tuple[int, int]:
        """The part that gives the batch of a step, and the number of that batch among those of the part."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        part_T = self._part_of_step(epoch)
        part = int(part_T[in_epoch])
        return part, epoch * self._steps[part] + int((part_T[:in_epoch] == part).sum())

    def pairs(self, step: int, positions: range) -> np.ndarray:
        part, own_step = self._locate(step)
        return self._orders[part].pairs(own_step, positions) + np.array([self._first_samples[part], 0], np.int32)

    def substitutes(self, step: int, position: int) -> Iterator[tuple[int, int]]:
        """As :meth:`Order.substitutes`; all are of the same part."""
        part, own_step = self._locate(step)
        for video, slot in self._orders[part].substitutes(own_step, position):
            yield int(self._first_samples[part]) + video, slot


class OneSetStreamingOrder(OneSetOrder):
    """The same with a streaming order of each part: each lane has a window in each part.

    Args:
        orders, weights, first_samples, seed: as for :class:`OneSetOrder`.
        first_shards: number of the first shard of each part.
    """

    def __init__(
        self,
        orders: Sequence[StreamingOrder],
        weights: Sequence[int],
        first_samples: np.ndarray,
        seed: int,
        first_shards: np.ndarray,
    ) -> None:
        super().__init__(orders, weights, first_samples, seed)
        self._lane_orders, self._weights, self._first_shards = orders, weights, first_shards
        self.lanes, self.window = orders[0].lanes, orders[0].window

    def windows(self, lane: int) -> list[np.ndarray]:
        """The shards that a lane reads in each epoch, for each of the windows that it has open at the same time."""
        return [
            shards + first
            for order, first in zip(self._lane_orders, self._first_shards)
            for shards in order.windows(lane)
        ]

    def shard_uses(self, lane: int, epoch: int) -> ShardUses:
        """When a lane reads which shard in an epoch."""
        uses = []
        for part, (order, weight) in enumerate(zip(self._lane_orders, self._weights)):
            # The steps of this epoch that are of the part: its own steps count from ``first_own``.
            step_of = epoch * self.steps_per_epoch + np.flatnonzero(self._part_of_step(epoch) == part)
            first_own = epoch * self._steps[part]
            for own_epoch in range(epoch * weight, (epoch + 1) * weight):
                own = order.shard_uses(lane, own_epoch)
                steps = step_of[own.first_step - first_own], step_of[own.last_step - first_own]
                uses.append(ShardUses(own.shard + self._first_shards[part], *steps))
        return ShardUses(*(np.concatenate([getattr(use, name) for use in uses]) for name in ShardUses.__annotations__))


def make_order(index: Index, config: DataConfig, seed: int) -> Order:
    """The order that ``config`` chooses.

    Raises:
        UserError: the split is too small for one batch, or a part of a mixture for its weight.
    """
    if not isinstance(index, Mixture):
        return _named(index.directory, lambda: _order_of(index, config, seed))
    if config.batch_from == "mixed":
        return _named(index.directory, lambda: _mixed(index, config, seed))
    orders = []
    for k, part in enumerate(index.parts):
        own_seed = text_key("part", seed, k)
        orders.append(_named(part.directory, lambda part=part, own_seed=own_seed: _order_of(part, config, own_seed)))
    if config.order == "streaming":
        return OneSetStreamingOrder(orders, index.weights, index.first_samples, seed, index.first_shards)
    return OneSetOrder(orders, index.weights, index.first_samples, seed)


def _order_of(index: Index, config: DataConfig, seed: int) -> Order:
    """The order of one split."""
    if config.order == "streaming":
        return _streaming_order(index, config, seed)
    return GlobalOrder(index.num_captions, seed=seed, batch_size=config.batch_size)


def _mixed(index: Mixture, config: DataConfig, seed: int) -> Order:
    captions = [part.num_captions for part in index.parts]
    totals = [int(one.sum()) * weight for one, weight in zip(captions, index.weights)]
    check_shares(index.names, [len(part) for part in index.parts], totals, config.batch_size)
    if config.order == "streaming":
        part_S = np.repeat(np.arange(len(index.parts)), np.diff(index.first_shards))
        return _streaming_order(index, config, seed, part_S, index.weights)
    return MixedOrder(captions, index.weights, seed=seed, batch_size=config.batch_size)


def _streaming_order(
    index: Index, config: DataConfig, seed: int, part_of: np.ndarray | None = None, weights: Sequence[int] = (1,)
) -> StreamingOrder:
    return StreamingOrder(
        index.num_captions,
        index.columns["shard"],
        seed=seed,
        batch_size=config.batch_size,
        lanes=config.lanes or config.batch_size,
        window=config.window,
        part_of=part_of,
        weights=weights,
    )


def _named(name: str, make: Callable[[], Order]) -> Order:
    """What ``make`` returns; its error begins with a name."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
