"""The plan of a node's shard cache: which shard to download next, and which to delete for it.

The order of training is known, so the shard that is needed last is deleted first (Belady, 1966), and shards are
downloaded in the order in which they are needed. A shard is never deleted for one that is needed later, so each use of
a shard costs at most one download.
"""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Callable, Iterable

import numpy as np

from tmass_dist.data.streaming import LaneOrder, ShardUses
from tmass_dist.errors import UserError

GB = 1e9


def node_uses(order: LaneOrder, lanes: Iterable[int]) -> Callable[[int], ShardUses]:
    """The uses of the lanes of a node, by epoch, sorted by their first step."""
    lanes = list(lanes)

    def uses_of(epoch: int) -> ShardUses:
        parts = [order.shard_uses(lane, epoch) for lane in lanes]
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ShardUses.__annotations__]
        by_step = np.argsort(columns[1], kind="stable")
        return ShardUses(*(column[by_step] for column in columns))

    return uses_of


def needed_bytes(order: LaneOrder, lanes: Iterable[int], shard_bytes: np.ndarray, per_window: int) -> int:
    """Size of a cache for ``per_window`` shards of each window of a node, or for all their shards if that is less."""
    windows = [shards for lane in lanes for shards in order.windows(lane)]
    largest = sum(per_window * int(shard_bytes[shards].max()) for shards in windows)
    shards = np.unique(np.concatenate(windows))
    return min(largest, int(shard_bytes[shards].sum()))


def check_capacity(cache_gb: float, order: LaneOrder, lanes: Iterable[int], shard_bytes: np.ndarray) -> None:
    """Check that a cache is large enough for the shards that the lanes of a node have open: W + 1 of each.

    Raises:
        UserError: it is too small; the message says which size would do: W + 2 shards of each lane.
    """
    lanes = list(lanes)
    if cache_gb * GB < needed_bytes(order, lanes, shard_bytes, order.window + 1):
        per_split = " and split" if len(order.windows(lanes[0])) > 1 else ""
        sufficient = _round_up(needed_bytes(order, lanes, shard_bytes, order.window + 2))
        raise UserError(
            f"data.cache_gb={cache_gb:g} is too small: the {len(lanes)} lanes of this node need {sufficient}, "
            f"which is {order.window + 2} shards for each lane{per_split}"
        )


def _round_up(number: int) -> str:
    """Bytes as GB with three significant digits, rounded up."""
    exponent = max(0, 12 - len(str(number)))
    step = 10.0 ** -min(9, exponent)
    return f"{np.ceil(number / GB / step) * step:.{min(9, exponent)}f}"


class CachePlan:
    """What the cache of a node holds, and what it should download next.

    Args:
        uses_of: the node's uses of shards in an epoch; see :func:`node_uses`.
        shard_bytes: size of each shard.
        capacity: most bytes that the cache may hold; None: no limit.
        steps_per_epoch: steps of an epoch.
        step: first step that the run will read.
        held: shards that the cache holds from an earlier start, and that it may delete.
        kept: shards that others put there: they are never deleted and do not count.
    """

    def __init__(
        self,
        uses_of: Callable[[int], ShardUses],
        shard_bytes: np.ndarray,
        capacity: int | None,
        steps_per_epoch: int,
        step: int,
        held: Iterable[int] = (),
        kept: Iterable[int] = (),
    ) -> None:
        self._uses_of, self._shard_bytes, self._capacity = uses_of, shard_bytes, capacity
        self._steps_per_epoch, self.step = steps_per_epoch, step
        self.held, self.downloading, self.kept = set(held), set[int](), set(kept)
        self.pinned: set[int] = set()
        """Shards that a worker waited for a short time ago."""
        self.used_bytes = sum(int(shard_bytes[shard]) for shard in self.held)
        """Bytes of the shards that are held or being downloaded."""
        self._queue: deque[tuple[int, int, int]] = deque()  # (shard, first step, last step), by first step
        self._steps_of: dict[int, list[tuple[int, int]]] = defaultdict(list)  # (last step, first step) by shard
        self._next_epoch = step // steps_per_epoch
        self.advance(step)

    def advance(self, step: int) -> None:
        """All ranks of the node will read ``step`` or later ones."""
        self.step = step
        # The uses of two epochs are known ahead: each shard's next use is among them.
        while self._next_epoch <= step // self._steps_per_epoch + 1:
            uses = self._uses_of(self._next_epoch)
            rows = np.stack([uses.shard, uses.first_step, uses.last_step], axis=1).tolist()
            for shard, first, last in rows:
                if last >= step:
                    self._queue.append((shard, first, last))
                    bisect.insort(self._steps_of[shard], (last, first))
            self._next_epoch += 1

    def next_use(self, shard: int) -> float:
        """First step of the shard's current or next use; infinity if it has none in the known epochs."""
        if shard in self.pinned:
            return self.step
        steps = self._steps_of[shard]
        while steps and steps[0][0] < self.step:
            steps.pop(0)
        return steps[0][1] if steps else float("inf")

    def next_download(self) -> tuple[int, list[int]] | None:
        """The shard to download now and the shards to delete before; None if there is nothing to do or no space.

        The caller deletes and downloads, and then calls :meth:`downloaded`.
        """
        while self._queue:
            shard, first, last = self._queue[0]
            if last >= self.step and not self._is_known(shard):
                deleted = self._make_space(shard, first)
                if deleted is None:
                    return None
                self._queue.popleft()
                return shard, deleted
            self._queue.popleft()
        return None

    def _make_space(self, shard: int, first_step: float) -> list[int] | None:
        size, deleted = int(self._shard_bytes[shard]), []
        if self._capacity is not None:
            free = self._capacity - self.used_bytes
            candidates = sorted(self.held, key=self.next_use) if free < size else []
            while free < size:
                if not candidates or self.next_use(candidates[-1]) <= first_step:
                    return None
                deleted.append(candidates.pop())
                free += int(self._shard_bytes[deleted[-1]])
        self.held -= set(deleted)
        self.downloading.add(shard)
        self.used_bytes += size - sum(int(self._shard_bytes[other]) for other in deleted)
        return deleted

    def _is_known(self, shard: int) -> bool:
        return shard in self.held or shard in self.downloading or shard in self.kept

    def demand(self, shard: int) -> list[int] | None:
        """A worker waits for a shard that the plan needs only later, or not at all (a substitute).

        Returns:
            The shards to delete before the download; None if the shard is here, on its way or the next of the plan, or
            if no space can be made.
        """
        is_next = bool(self._queue) and self.next_use(shard) <= self._queue[0][1]
        return None if is_next or self._is_known(shard) else self._make_space(shard, self.step)

    def downloaded(self, shard: int) -> None:
        """The download of a shard is complete."""
        self.downloading.discard(shard)
        self.held.add(shard)

    def lost(self, shard: int) -> None:
        """A shard that was here is gone: someone else deleted it. It is the next to be downloaded, if it has a use."""
        if shard in self.held:
            self.used_bytes -= int(self._shard_bytes[shard])
        elif shard not in self.kept:
            return
        self.held.discard(shard)
        self.kept.discard(shard)
        if self.next_use(shard) < float("inf"):
            last, first = self._steps_of[shard][0]
            self._queue.appendleft((shard, first, last))

    def shrink(self) -> list[int]:
        """Shards to delete so that the cache is within its limit, after a start with a smaller one."""
        deleted = []
        for shard in sorted(self.held, key=self.next_use, reverse=True):
            if self._capacity is None or self.used_bytes <= self._capacity:
                break
            deleted.append(shard)
            self.used_bytes -= int(self._shard_bytes[shard])
        self.held -= set(deleted)
        return deleted
