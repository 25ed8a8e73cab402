"""The streaming order of training, for splits that are larger than a node's disk.

The shards of a split are permuted once, by the seed of the run, and their pairs are cut into ``G`` lanes of equal
length. Every global batch takes ``B / G`` pairs of each lane, and a rank holds whole lanes. So a node reads the same
shards in every epoch, and the global batches are the same for every number of ranks that divides ``G``.

Within an epoch each lane permutes its shards and reads them through a window: a shard's pairs are divided into ``W``
parts, and segment ``s`` of the lane mixes part ``r`` of the lane's shard ``s - r``, for ``r`` from 0 to ``W - 1``. The
length of each segment is known without drawing any of it, so a run resumes at any step without replay.
"""

# Shapes: B pairs of the global batch, b = B / G pairs of a lane's batch, G lanes, W shards of the window, S shards,
# n shards of a lane.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np

from tmass_dist.data.deal import deal, merge
from tmass_dist.errors import UserError
from tmass_dist.noise import text_key


@dataclass(frozen=True)
class ShardUses:
    """When a lane reads its shards in one epoch; row ``i`` of every array is one use of a shard."""

    shard: np.ndarray
    first_step: np.ndarray
    """First step that may read it, counted from the start of the run."""
    last_step: np.ndarray


class LaneOrder(Protocol):
    """What the cache of a node knows of an order that reads shard after shard."""

    lanes: int
    window: int
    steps_per_epoch: int

    def windows(self, lane: int) -> list[np.ndarray]:
        """The shards that a lane reads in each epoch, for each of the windows that it has open at the same time."""
        ...

    def shard_uses(self, lane: int, epoch: int) -> ShardUses:
        """When a lane reads which shard in an epoch."""
        ...


@dataclass(frozen=True)
class _Lane:
    """A contiguous range of the permuted pairs, as pieces of shards: pairs ``start`` to ``stop`` of ``shard``."""

    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    part: np.ndarray
    """The part of a mixture to which each piece belongs."""
    repeats: np.ndarray
    """How many times an epoch reads the piece: the weight of its part."""
    parity_of: dict[int, int]
    """Videos that the lane shares with a neighbour, by sample number: they come in odd or in even steps only, so that
    the two lanes never put such a video into the same batch."""

    @property
    def num_pairs(self) -> int:
        return int(((self.stop - self.start) * self.repeats).sum())


class _LaneEpoch:
    """The order of a lane's pieces in one epoch, and where its segments begin and end."""

    def __init__(
        self, lane: _Lane, seed: tuple[int, int], window: int, batch_size: int, block: int, num_pairs: int
    ) -> None:
        piece = _order_pieces(lane, np.random.default_rng(seed), window)
        self.piece, self.batch_size = piece, batch_size
        lengths = (lane.stop - lane.start)[piece]
        self.part_end = np.stack([lengths * (part + 1) // window for part in range(window)], axis=1)
        self.part_size = np.diff(self.part_end, axis=1, prepend=0)
        num_segments = len(piece) + window - 1
        sizes = np.zeros(num_segments, np.int64)
        for part in range(window):
            sizes[part : part + len(piece)] += self.part_size[:, part]
        self.segment_end = np.cumsum(sizes)
        """End of each segment in the lane's sequence of parts, in pairs."""
        # A segment gives a multiple of ``block`` pairs; those beyond it go to the next segment.
        self.batch_end = np.minimum(self.segment_end // block * block, max(0, num_pairs - block))
        self.batch_end[-1] = num_pairs
        self.batch_start = np.append(0, self.batch_end[:-1])

    def segment_of(self, step: int) -> int:
        """The segment that gives the batch of ``step``, counted from the start of the epoch."""
        return int(np.searchsorted(self.batch_end, step * self.batch_size, side="right"))

    def parts(self, segment: int) -> Iterator[tuple[int, int, int]]:
        """What the batches of a segment hold: positions of pieces, each with a range of the piece's shuffled pairs."""
        start, stop = int(self.batch_start[segment]), int(self.batch_end[segment])
        first = int(np.searchsorted(self.segment_end, start, side="right"))
        window = self.part_size.shape[1]
        for number in range(first, segment + 1):
            position = int(self.segment_end[number - 1]) if number else 0
            for i in range(max(0, number - window + 1), min(number + 1, len(self.piece))):
                size = int(self.part_size[i, number - i])
                part_start = int(self.part_end[i, number - i]) - size
                low, high = max(start, position), min(stop, position + size)
                if low < high:
                    yield i, part_start + low - position, part_start + high - position
                position += size

    def uses(self, lane: _Lane, first_step: int) -> ShardUses:
        """First and last step of each piece; ``first_step`` is the epoch's first."""
        number = len(self.piece)
        window = self.part_size.shape[1]
        first_pair = self.segment_end[:number] - self.part_size[:, 0]
        last_pair = np.append(0, self.segment_end)[window - 1 : window - 1 + number] + self.part_size[:, -1] - 1
        begins = np.searchsorted(self.batch_end, first_pair, side="right")
        used = begins < len(self.batch_end)
        ends = np.minimum(np.searchsorted(self.batch_end, last_pair, side="right"), len(self.batch_end) - 1)
        return ShardUses(
            lane.shard[self.piece][used],
            first_step + self.batch_start[begins[used]] // self.batch_size,
            first_step + self.batch_end[ends[used]] // self.batch_size - 1,
        )


def _order_pieces(lane: _Lane, rng: np.random.Generator, window: int) -> np.ndarray:
    """The order of a lane's pieces in an epoch: the pieces of each part permuted, as often as it is read."""
    sequences = []
    for part in np.unique(lane.part):
        pieces = np.flatnonzero(lane.part == part)
        sequence = rng.permutation(pieces)
        for _ in range(int(lane.repeats[pieces[0]]) - 1):
            # A piece that was read last comes late enough that no window holds it twice, if there are enough pieces.
            following = rng.permutation(pieces)
            recent = np.isin(following, sequence[-window:])
            early = following[~recent][:window]
            sequence = np.concatenate([sequence, early, following[~np.isin(following, early)]])
        sequences.append(sequence)
    return merge(sequences, rng)


class StreamingOrder:
    """The global batches of a run in the streaming order; see the module's docstring.

    Args:
        num_captions: captions of each sample.
        shard_of: shard of each sample.
        seed: seed of the run.
        batch_size: pairs of the global batch.
        lanes: G; it divides ``batch_size``.
        window: W, shards of a lane that are mixed.
        part_of: the part of a mixture to which each shard belongs; None: there is one part.
        weights: how many times an epoch reads each pair of a part.

    Raises:
        UserError: the lanes do not divide the batch, or a lane has fewer pairs than its part of one batch.
    """

    def __init__(
        self,
        num_captions: np.ndarray,
        shard_of: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        lanes: int,
        window: int = 2,
        part_of: np.ndarray | None = None,
        weights: Sequence[int] = (1,),
    ) -> None:
        if batch_size % lanes:
            raise UserError(f"data.lanes={lanes} does not divide data.batch_size={batch_size}")
        self.batch_size, self.lanes, self.window, self.seed = batch_size, lanes, window, seed
        self.lane_batch = batch_size // lanes
        self._num_captions = num_captions
        # Samples in the order of their shards; a split is packed so.
        in_order = len(shard_of) < 2 or bool((shard_of[1:] >= shard_of[:-1]).all())
        self._numbers = None if in_order else np.argsort(shard_of, kind="stable")
        by_shard = shard_of if self._numbers is None else shard_of[self._numbers]
        num_shards = int(by_shard[-1]) + 1 if len(by_shard) else 0
        self._first_sample = np.searchsorted(by_shard, np.arange(num_shards + 1))
        self._shard_of = shard_of
        self._part_S = np.zeros(num_shards, np.int64) if part_of is None else part_of[:num_shards]
        self._lanes = self._cut(num_shards, np.array(weights, np.int64)[self._part_S])
        num_pairs = [lane.num_pairs for lane in self._lanes]
        self.steps_per_epoch = min(num_pairs) // self.lane_batch
        # With as many batches in a segment as a video has captions, no batch needs a video twice. What a segment
        # passes on stays below a part of a shard, which the window keeps open anyway.
        num_pieces = sum(int(lane.repeats.sum()) for lane in self._lanes)
        part = sum(num_pairs) // max(1, num_pieces) // window
        most_captions = int(num_captions.max(initial=1))
        self._block = self.lane_batch * max(1, min(most_captions, -(-part // self.lane_batch)))
        self.left_out = sum(num_pairs) - self.steps_per_epoch * batch_size
        """Pairs of an epoch that fill no batch."""
        if not self.steps_per_epoch:
            # Lanes are equal in length to one pair, so that fewer lanes would not help.
            raise UserError(f"{sum(num_pairs)} pairs are fewer than one batch of {batch_size}")
        # Workers ask for one step after the other, of one epoch or of two neighbouring ones.
        self._lane_epoch = lru_cache(maxsize=2 * lanes)(self._plan)
        self._segment = lru_cache(maxsize=2 * lanes)(self._draw_segment)

    def _cut(self, num_shards: int, repeats_S: np.ndarray) -> list[_Lane]:
        pairs_S = np.zeros(num_shards, np.int64)
        filled = np.flatnonzero(np.diff(self._first_sample))
        if len(filled):
            counts = self._num_captions if self._numbers is None else self._num_captions[self._numbers]
            pairs_S[filled] = np.add.reduceat(counts, self._first_sample[filled], dtype=np.int64)
        rng = np.random.default_rng(text_key("lanes", self.seed))
        # The shards of each part lie evenly in the permutation, so that all lanes have about the same share of it.
        by_part = [np.flatnonzero((self._part_S == part) & (pairs_S > 0)) for part in np.unique(self._part_S)]
        order = merge([rng.permutation(shards) for shards in by_part])
        ends = np.cumsum(pairs_S[order] * repeats_S[order])
        cuts = []  # position in ``order`` and pair of that shard, where each lane begins
        for lane in range(self.lanes + 1):
            pair = lane * int(ends[-1] if len(ends) else 0) // self.lanes
            k = int(np.searchsorted(ends, pair, side="right"))
            inside = pair - (int(ends[k - 1]) if k else 0)
            cuts.append((k, inside // int(repeats_S[order[k]]) if k < len(order) else 0))
        lanes = []
        for (first, start), (last, stop) in pairwise(cuts):
            shard = order[first : last + 1] if stop else order[first:last]
            starts, stops = np.zeros(len(shard), np.int64), pairs_S[shard]
            starts[:1] = start
            if stop:
                stops[-1] = stop
            parity_of = {}
            for place, pair, parity in ((first, start, 1), (last, stop, 0)):
                video = self._cut_video(int(order[place]), pair) if pair else None
                if video is not None:
                    parity_of[video] = parity
            lanes.append(_Lane(shard, starts, stops, self._part_S[shard], repeats_S[shard], parity_of))
        return lanes

    def _samples(self, shard: int) -> np.ndarray:
        """Numbers of the samples of a shard."""
        first, end = self._first_sample[shard : shard + 2]
        return np.arange(first, end) if self._numbers is None else self._numbers[first:end]

    def _cut_video(self, shard: int, pair: int) -> int | None:
        """The sample whose captions lie on both sides of ``pair``; None if the cut lies between two samples."""
        numbers = self._samples(shard)
        ends = np.cumsum(self._num_captions[numbers])
        place = int(np.searchsorted(ends, pair, side="right"))
        return None if pair in (0, ends[place - 1] if place else 0) else int(numbers[place])

    def _plan(self, lane: int, epoch: int) -> _LaneEpoch:
        seed = (text_key("lane", self.seed, lane), epoch)
        num_pairs = self.steps_per_epoch * self.lane_batch
        return _LaneEpoch(self._lanes[lane], seed, self.window, self.lane_batch, self._block, num_pairs)

    def _draw_piece(self, lane: int, epoch: int, position: int) -> np.ndarray:
        """The pairs of the piece at ``position`` of the epoch, ``(n, 2)``: shuffled, with each video spread evenly."""
        pieces, piece = self._lanes[lane], self._lane_epoch(lane, epoch).piece[position]
        numbers = self._samples(int(pieces.shard[piece]))
        counts = self._num_captions[numbers].astype(np.int64)
        slots = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs = np.stack([np.repeat(numbers, counts), slots], axis=1)[pieces.start[piece] : pieces.stop[piece]]
        # A video's captions, in random order, get the keys (0..1) / c, (1..2) / c, ... of its c captions.
        rng = np.random.default_rng((text_key("piece", self.seed, lane), epoch, position))
        shuffled = pairs[np.lexsort((rng.random(len(pairs)), pairs[:, 0]))]
        _, first, count = np.unique(shuffled[:, 0], return_index=True, return_counts=True)
        place = np.arange(len(shuffled)) - np.repeat(first, count)
        return shuffled[np.argsort((place + rng.random(len(place))) / np.repeat(count, count))]

    def _draw_segment(self, lane: int, epoch: int, segment: int) -> np.ndarray:
        """The batches of a segment of a lane, ``(m, b, 2)`` int32."""
        plan = self._lane_epoch(lane, epoch)
        parts = [self._draw_piece(lane, epoch, i)[start:stop] for i, start, stop in plan.parts(segment)]
        first_step = int(plan.batch_start[segment]) // self.lane_batch
        rng = np.random.default_rng((text_key("segment", self.seed, lane), epoch, segment))
        return deal(np.concatenate(parts), self.lane_batch, rng, self._lanes[lane].parity_of, first_step % 2)

    def lane_batch_of(self, step: int, lane: int) -> np.ndarray:
        """The pairs that a lane gives to the global batch of ``step``: ``(b, 2)`` int32 (sample number, slot)."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        plan = self._lane_epoch(lane, epoch)
        segment = plan.segment_of(in_epoch)
        return self._segment(lane, epoch, segment)[in_epoch - int(plan.batch_start[segment]) // self.lane_batch]

    def pairs(self, step: int, positions: range) -> np.ndarray:
        """The pairs at these positions of the global batch: ``(len(positions), 2)`` int32."""
        lanes = range(positions.start // self.lane_batch, -(-positions.stop // self.lane_batch))
        pairs = np.concatenate([self.lane_batch_of(step, lane) for lane in lanes])
        return pairs[positions.start - lanes.start * self.lane_batch :][: len(positions)]

    def substitutes(self, step: int, position: int) -> Iterator[tuple[int, int]]:
        """Pairs of the same lane that may replace a damaged one at ``position``, in the order in which to try them.

        Videos of the shards that are open at this step come first, and those of other parts of a mixture
        last. No substitute is a video of the batch, and two positions have no substitute in common.
        """
        lane, place = divmod(position, self.lane_batch)
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        plan, pieces = self._lane_epoch(lane, epoch), self._lanes[lane]
        # A video that a neighbouring lane shares could be in the neighbour's part of the batch.
        excluded = np.union1d(self.lane_batch_of(step, lane)[:, 0], list(pieces.parity_of))
        rng = np.random.default_rng((text_key("substitute", self.seed, lane), step))
        open_now = np.unique([plan.piece[i] for i, *_ in plan.parts(plan.segment_of(in_epoch))])
        others = np.setdiff1d(np.arange(len(pieces.shard)), open_now)
        parts = np.unique(pieces.part)
        groups = []  # (whether of another part, videos in random order)
        own_part = self._part_S[self._shard_of[self.lane_batch_of(step, lane)[place, 0]]]
        for candidates in (open_now, others):
            for part in parts:
                videos = [self._piece_samples(pieces, int(k)) for k in candidates if pieces.part[k] == part]
                if videos:
                    shuffled = rng.permutation(np.setdiff1d(np.concatenate(videos), excluded))
                    groups.append((part != own_part, shuffled))
        for _, videos in sorted(groups, key=lambda group: group[0]):
            for video in videos[place :: self.lane_batch]:
                slot = text_key("substitute", self.seed, step, position) % max(1, int(self._num_captions[video]))
                if self._num_captions[video]:
                    yield int(video), slot

    def _piece_samples(self, pieces: _Lane, piece: int) -> np.ndarray:
        numbers = self._samples(int(pieces.shard[piece]))
        starts = np.cumsum(self._num_captions[numbers]) - self._num_captions[numbers]
        return numbers[(starts >= pieces.start[piece]) & (starts < pieces.stop[piece])]

    def shard_uses(self, lane: int, epoch: int) -> ShardUses:
        """When a lane reads which shard in an epoch."""
        return self._lane_epoch(lane, epoch).uses(self._lanes[lane], epoch * self.steps_per_epoch)

    def shards_of(self, lane: int) -> np.ndarray:
        """The shards that a lane reads in each epoch."""
        return np.unique(self._lanes[lane].shard)

    def windows(self, lane: int) -> list[np.ndarray]:
        """The shards that a lane reads in each epoch, for each of the windows that it has open at the same time."""
        return [self.shards_of(lane)]
