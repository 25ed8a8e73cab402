"""The global order of training: it depends on the seed and the split, never on the number of ranks or workers."""

# Shapes: B pairs of the global batch.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmass_dist.noise import text_key


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
    # No video repeats within a round. Only a batch that spans two rounds could hold a video twice: such a pair is
    # postponed to the next batch.
    blocks: list[np.ndarray] = []
    postponed: list[tuple[int, int]] = []
    batch: list[tuple[int, int]] = []
    videos_in_batch: set[int] = set()

    def append(pair: tuple[int, int]) -> None:
        nonlocal batch, videos_in_batch
        batch.append(pair)
        videos_in_batch.add(pair[0])
        if len(batch) == batch_size:
            blocks.append(np.array([batch], dtype=np.int32))
            batch, videos_in_batch = [], set()

    for queue in rounds(num_captions, seed=seed, epoch=epoch):
        position = 0
        while position < len(queue):
            num_whole = (len(queue) - position) // batch_size
            if not batch and not postponed and num_whole:
                end = position + num_whole * batch_size
                blocks.append(queue[position:end].reshape(num_whole, batch_size, 2))
                position = end
                continue
            candidates = [*postponed, (int(queue[position, 0]), int(queue[position, 1]))]
            position += 1
            postponed = []
            for pair in candidates:
                (postponed.append if pair[0] in videos_in_batch else append)(pair)
    for pair in postponed:  # no other pair is left
        append(pair)
    return np.concatenate(blocks) if blocks else np.empty((0, batch_size, 2), dtype=np.int32)


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
