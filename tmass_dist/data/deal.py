"""Dealing pairs into batches, and spreading several sequences evenly over one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def interleave(counts: Sequence[int], rng: np.random.Generator | None = None) -> np.ndarray:
    """A sequence in which number ``k`` occurs ``counts[k]`` times, evenly: once in each of as many equal intervals.

    Args:
        counts: of each number.
        rng: chooses the place within each interval; None: the middle.
    """
    places = [(np.arange(n) + (0.5 if rng is None or len(counts) == 1 else rng.random(n))) / n for n in counts if n]
    numbers = np.repeat(np.arange(len(counts)), counts)
    return numbers[np.argsort(np.concatenate(places), kind="stable")] if places else numbers


def merge(sequences: Sequence[np.ndarray], rng: np.random.Generator | None = None) -> np.ndarray:
    """The elements of all sequences, each sequence in its order and evenly spread; see :func:`interleave`."""
    merged = np.empty(sum(map(len, sequences)), np.int64)
    number_of = interleave([len(sequence) for sequence in sequences], rng)
    for number, sequence in enumerate(sequences):
        merged[number_of == number] = sequence
    return merged


def deal(
    pairs_N2: np.ndarray, batch_size: int, rng: np.random.Generator, parity_of: dict[int, int], first_parity: int
) -> np.ndarray:
    """Divide pairs into random batches. No batch holds a video twice unless it has more pairs than there are batches.

    Args:
        pairs_N2: pairs (video, slot); ``N`` is a multiple of ``batch_size``.
        batch_size: pairs of each batch.
        rng: source of randomness.
        parity_of: videos that may come only in batches of even (0) or odd (1) step, as far as there are enough.
        first_parity: parity of the first batch's step.

    Returns:
        ``(N / batch_size, batch_size, 2)`` int32.
    """
    num_batches = len(pairs_N2) // batch_size
    videos, number_of = np.unique(pairs_N2[:, 0], return_inverse=True)
    rank = rng.permutation(len(videos)).astype(np.float64)
    for video, parity in parity_of.items():
        rank[videos == video] = parity - 2  # they are dealt first
    order = np.lexsort((rng.random(len(pairs_N2)), rank[number_of]))
    pairs_N2, number_of = pairs_N2[order], number_of[order]
    batches = np.empty((num_batches, batch_size, 2), np.int32)
    parity_B = (np.arange(num_batches) + first_parity) % 2
    # Deal the pairs, video by video, in rounds that give one pair to each batch in random order. The pairs of a video
    # are neighbours, so they meet in a batch only where a round ends within a video: that round and the next are
    # kept apart.
    last_number, last_targets = -1, np.empty(0, np.int64)  # the video that ended the round before, and its batches
    for column in range(batch_size):
        number_B = number_of[column * num_batches : (column + 1) * num_batches]
        targets = rng.permutation(num_batches)
        if number_B[0] == last_number:
            count = int((number_B == last_number).sum())
            targets = _prefer(targets, 0, count, ~np.isin(np.arange(num_batches), last_targets))
        position = 0
        for number in dict.fromkeys(number_B[rank[number_B] < 0].tolist()):
            count = int((number_B == number).sum())
            targets = _prefer(targets, position, count, parity_B == int(rank[number] + 2))
            position += count
        batches[targets, column] = pairs_N2[column * num_batches : (column + 1) * num_batches]
        last_number = number_B[-1]
        last_targets = targets[number_B == last_number]
    return batches


def _prefer(targets: np.ndarray, position: int, count: int, good: np.ndarray) -> np.ndarray:
    """Move ``count`` targets that are ``good``, as far as there are so many, to ``position`` of a permutation."""
    head, rest = targets[:position], targets[position:]
    chosen = np.concatenate([rest[good[rest]], rest[~good[rest]]])[:count]
    return np.concatenate([head, chosen, rest[~np.isin(rest, chosen)]])
