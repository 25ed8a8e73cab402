"""The order of training: it belongs to the run and not to the machines."""

# Shapes: B pairs of the global batch.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmass_dist.noise import text_key


def rounds(num_captions: np.ndarray, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Every pair of an epoch: round ``r`` is the r-th caption of every video that has one, ``(n, 2)`` int32, shuffled.

    A video's captions come in an order of their own (Fisher-Yates, a step a round, for all videos at once).
    """
    rng = np.random.default_rng((seed, epoch))
    counts = num_captions.astype(np.int64)
    first = np.cumsum(counts) - counts
    slots = np.arange(counts.sum()) - np.repeat(first, counts)
    for number in range(int(counts.max(initial=0))):
        videos = np.flatnonzero(counts > number)
        here = first[videos] + number
        there = here + rng.integers(0, counts[videos] - number)
        slots[here], slots[there] = slots[there], slots[here]
        order = rng.permutation(len(videos))
        yield np.stack([videos[order], slots[here][order]], axis=1).astype(np.int32)


def epoch_batches(num_captions: np.ndarray, *, seed: int, epoch: int, batch_size: int) -> np.ndarray:
    """The global batches of an epoch: ``(steps, B, 2)`` int32, pairs of (sample number, caption slot).

    Every pair comes at most once, the remainder that fills no batch is left out, and no video comes twice in a
    batch while another is left. It depends on the arguments alone: any world size cuts the same batches.
    """
    # Within a round no video repeats, and only a batch that spans two rounds can meet one twice; such a pair waits
    # for the next batch.
    blocks: list[np.ndarray] = []
    waiting: list[tuple[int, int]] = []
    batch: list[tuple[int, int]] = []
    seen: set[int] = set()

    def take(pair: tuple[int, int]) -> None:
        nonlocal batch, seen
        batch.append(pair)
        seen.add(pair[0])
        if len(batch) == batch_size:
            blocks.append(np.array([batch], dtype=np.int32))
            batch, seen = [], set()

    for queue in rounds(num_captions, seed=seed, epoch=epoch):
        at = 0
        while at < len(queue):
            whole = (len(queue) - at) // batch_size
            if not batch and not waiting and whole:
                blocks.append(queue[at : at + whole * batch_size].reshape(whole, batch_size, 2))
                at += whole * batch_size
                continue
            pair = (int(queue[at, 0]), int(queue[at, 1]))
            at += 1
            still: list[tuple[int, int]] = []
            for held in waiting:
                (still.append if held[0] in seen else take)(held)
            waiting = still
            (waiting.append if pair[0] in seen else take)(pair)
    for held in waiting:  # nothing else is left to take
        take(held)
    return np.concatenate(blocks) if blocks else np.empty((0, batch_size, 2), dtype=np.int32)


def substitutes(
    num_captions: np.ndarray, batch_B2: np.ndarray, position: int, *, seed: int, step: int
) -> Iterator[tuple[int, int]]:
    """Pairs that may stand in for a damaged one at ``position`` of the global batch, best first.

    They hold no video of the batch, and those of two positions are disjoint; they depend on no world size.
    """
    others = np.setdiff1d(np.arange(len(num_captions)), batch_B2[:, 0])
    order = np.random.default_rng((seed, step, 1)).permutation(others)
    for video in order[position :: len(batch_B2)]:
        yield int(video), text_key("substitute", seed, step, position) % int(num_captions[video])
