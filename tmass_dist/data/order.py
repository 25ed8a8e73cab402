"""The order of training: it depends on the seed and the split, never on the number of ranks or workers.

``data.order=global`` permutes the whole split; ``streaming`` reads shard after shard (data/streaming.py).
"""

# Shapes: B pairs of the global batch.

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np

from tmass_dist.config import DataConfig
from tmass_dist.data.remote import is_remote
from tmass_dist.errors import UserError
from tmass_dist.noise import text_key


class Order(Protocol):
    """The global batches of a run."""

    steps_per_epoch: int
    left_out: int
    """Pairs of an epoch that fill no batch."""

    def pairs(self, step: int, positions: range) -> np.ndarray:
        """The pairs at these positions of the global batch: ``(len(positions), 2)``, (sample number, caption slot)."""
        ...

    def substitutes(self, step: int, position: int) -> Iterator[tuple[int, int]]:
        """Pairs that may replace a damaged one at ``position`` of the global batch, in the order in which to try them.

        No substitute is a video of the batch, and two positions have no substitute in common.
        """
        ...


class GlobalOrder:
    """Batches from a permutation of the whole split.

    Raises:
        UserError: there are fewer pairs than one batch.
    """

    def __init__(self, num_captions: np.ndarray, *, seed: int, batch_size: int) -> None:
        self._num_captions, self._seed, self._batch_size = num_captions, seed, batch_size
        self._epoch, self._batches = -1, np.empty((0, batch_size, 2), np.int32)
        self.steps_per_epoch = len(self._epoch_batches(0))
        num_pairs = int(num_captions.sum())
        self.left_out = num_pairs - self.steps_per_epoch * batch_size
        if not self.steps_per_epoch:
            raise UserError(f"{num_pairs} pairs are fewer than one batch of {batch_size}")

    def _epoch_batches(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._batches = epoch_batches(self._num_captions, seed=self._seed, epoch=epoch, batch_size=self._batch_size)
            self._epoch = epoch
        return self._batches

    def pairs(self, step: int, positions: range) -> np.ndarray:
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        return self._epoch_batches(epoch)[in_epoch][positions.start : positions.stop]

    def substitutes(self, step: int, position: int) -> Iterator[tuple[int, int]]:
        batch_B2 = self.pairs(step, range(self._batch_size))
        return substitutes(self._num_captions, batch_B2, position, seed=self._seed, step=step)


def choose_order(config: DataConfig, world_size: int, saved: DataConfig | None) -> DataConfig:
    """Fill in what the first start of a run decides: ``order`` and ``lanes``.

    Args:
        config: of this start.
        world_size: number of ranks.
        saved: of the first start; None if this is the first.

    Raises:
        UserError: the ranks do not divide the lanes, or a setting does not apply to the order.
    """
    order, lanes = config.order, config.lanes
    if saved is not None:
        order, lanes = order or saved.order or "global", lanes or saved.lanes
    remote = any(is_remote(part.path) for part in config.train_parts)
    order = order or ("streaming" if remote else "global")
    if order == "global":
        for key in ("lanes", "cache_gb"):
            if getattr(config, key) is not None:
                raise UserError(f"data.{key} applies to data.order=streaming, and this run has data.order=global")
        return replace(config, order="global", lanes=None)
    divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    if lanes is None:
        fitting = [n for n in divisors if n % world_size == 0]
        lanes = next((n for n in fitting if n >= 8), max(fitting, default=world_size))
    chosen = replace(config, order="streaming", lanes=lanes)
    check_lanes(chosen, world_size)
    return chosen


def check_lanes(config: DataConfig, world_size: int) -> None:
    """Check that ``data.lanes``, if it is set, divides the global batch and is a multiple of the ranks.

    Raises:
        UserError: it does not.
    """
    lanes = config.lanes
    if lanes is None:
        return
    divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    if lanes not in divisors:
        raise UserError(
            f"data.lanes={lanes} does not divide data.batch_size={config.batch_size}; use one of {divisors}"
        )
    if lanes % world_size:
        usable = [n for n in divisors if lanes % n == 0]
        raise UserError(f"data.lanes={lanes} is not divisible by {world_size} ranks; use one of {usable} ranks")


def rounds(num_captions: np.ndarray, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """All pairs of an epoch, in rounds. Round ``r`` holds the r-th caption of every video that has so many.

    Each video's captions are shuffled first (Fisher-Yates, one step in each round, for all videos at once).

    Yields:
        ``(n, 2)`` int32, shuffled pairs of (sample number, caption slot).
    """
    rng = np.random.default_rng((seed, epoch))
    counts = num_captions.astype(np.int64)
    first = np.cumsum(counts) - counts
    slots = np.arange(counts.sum()) - np.repeat(first, counts)
    for number in range(int(counts.max(initial=0))):
        videos = np.flatnonzero(counts > number)
        current = first[videos] + number
        swapped = current + rng.integers(0, counts[videos] - number)
        slots[current], slots[swapped] = slots[swapped], slots[current]
        order = rng.permutation(len(videos))
        yield np.stack([videos[order], slots[current][order]], axis=1).astype(np.int32)


def epoch_batches(num_captions: np.ndarray, *, seed: int, epoch: int, batch_size: int) -> np.ndarray:
    """The global batches of an epoch: ``(steps, B, 2)`` int32, pairs of (sample number, caption slot).

    Each pair comes at most once; the last partial batch is dropped. A batch holds a video twice only if no other
    video is left. The batches depend on the arguments alone, so they are the same for every world size.
    """
    num_steps = int(num_captions.sum()) // batch_size
    ends = batch_size * np.arange(1, num_steps + 1)
    return deal_rounds(rounds(num_captions, seed=seed, epoch=epoch), ends).reshape(-1, batch_size, 2)


def deal_rounds(queues: Iterable[np.ndarray], ends: np.ndarray) -> np.ndarray:
    """The pairs of consecutive batches: batch ``t`` ends before pair ``ends[t]`` of the result.

    Args:
        queues: pairs in rounds: no video is twice in a queue.
        ends: never falls; the pairs after the last end are left out.

    Returns:
        ``(ends[-1], 2)`` int32. A batch holds a video twice only if no other video is left.
    """
    # Only a batch that spans two rounds could hold a video twice: such a pair is postponed to the next batch.
    ends = np.unique(ends[ends > 0])
    num_batches = 0  # that are complete
    blocks: list[np.ndarray] = []
    postponed: list[tuple[int, int]] = []
    batch: list[tuple[int, int]] = []
    videos_in_batch: set[int] = set()

    def num_dealt() -> int:
        return int(ends[num_batches - 1]) if num_batches else 0

    def append(pair: tuple[int, int]) -> None:
        nonlocal batch, videos_in_batch, num_batches
        if num_batches == len(ends):
            return
        batch.append(pair)
        videos_in_batch.add(pair[0])
        if num_dealt() + len(batch) == ends[num_batches]:
            blocks.append(np.array(batch, dtype=np.int32))
            num_batches += 1
            batch, videos_in_batch = [], set()

    for queue in queues:
        position = 0
        while position < len(queue) and num_batches < len(ends):
            whole = int(np.searchsorted(ends, num_dealt() + len(queue) - position, side="right"))
            if not batch and not postponed and whole > num_batches:
                end = position + int(ends[whole - 1]) - num_dealt()
                blocks.append(queue[position:end])
                position, num_batches = end, whole
                continue
            candidates = [*postponed, (int(queue[position, 0]), int(queue[position, 1]))]
            position += 1
            postponed = []
            for pair in candidates:
                (postponed.append if pair[0] in videos_in_batch else append)(pair)
    for pair in postponed:  # no other pair is left
        append(pair)
    return np.concatenate(blocks) if blocks else np.empty((0, 2), dtype=np.int32)


def substitutes(
    num_captions: np.ndarray, batch_B2: np.ndarray, position: int, *, seed: int, step: int
) -> Iterator[tuple[int, int]]:
    """Pairs that may replace a damaged one at ``position`` of the global batch, in the order in which to try them.

    No substitute is a video of the batch, two positions have no substitute in common, and the world size plays no part.
    """
    others = np.setdiff1d(np.arange(len(num_captions)), batch_B2[:, 0])
    order = np.random.default_rng((seed, step, 1)).permutation(others)
    for video in order[position :: len(batch_B2)]:
        yield int(video), text_key("substitute", seed, step, position) % int(num_captions[video])
