"""How far retrieval lies above chance, and whether scores differ by more than their noise."""

# Shapes: T texts, V videos, R calls, K depths, P assignments of owners.

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from tmass_dist.audit.inputs import is_number

SIGMA = 3.0
"""A finding must be as unlikely by chance as so many standard deviations, after correction for the number of tests."""
DEPTHS = (1, 5, 10)
"""The K of R@K."""
NUM_PERMUTATIONS = 100


def tail(num_tests: int) -> float:
    """Probability below which one of ``num_tests`` tests counts (Bonferroni)."""
    return (1 - NormalDist().cdf(SIGMA)) / num_tests


def poisson_tail(count: float, mean: float) -> float:
    """Probability of ``count`` or more events where ``mean`` are expected."""
    whole = math.floor(count + 1e-9)
    terms = (math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(whole)) if mean > 0 else ()
    return max(0.0, 1 - math.fsum(terms)) if whole > 0 else 1.0


def hits(scores_QC: Tensor, depth: int) -> Tensor:
    """Probability ``(Q, C)`` that each candidate is among the first ``depth`` of its row, ties in random order."""
    order = scores_QC.sort(dim=1).values
    not_above = torch.searchsorted(order, scores_QC, right=True)
    below = torch.searchsorted(order, scores_QC, right=False)
    above, tied = scores_QC.shape[1] - not_above, not_above - below
    return ((depth - above).double() / tied).clamp(0, 1)


def _best_captions(scores_TV: Tensor, owner_T: Tensor) -> Tensor:
    """``(V, V)``: for each video as query, the score of the best caption of each video."""
    videos = scores_TV.shape[1]
    best = scores_TV.new_full((videos, videos), -torch.inf)
    return best.scatter_reduce(0, owner_T[:, None].expand_as(scores_TV), scores_TV, "amax").T


class Counts(NamedTuple):
    """Hits of the right answers of one matrix at one depth, beside those with owners drawn at random."""

    found: float
    expected: float
    variance: float
    queries: int


def against_chance(scores_TV: Tensor, owner_T: Tensor) -> dict[tuple[str, int], Counts]:
    """Hits by direction and depth; what chance gives is measured on the same scores with the owners permuted.

    Hubs, ties and ragged captions are in both, so that they do not look like a leak. Text to video takes each text's
    own video; video to text each video's best caption among the best captions of all videos, as the metrics do.
    """
    generator = torch.Generator().manual_seed(0)
    owners = [owner_T, *(owner_T[torch.randperm(len(owner_T), generator=generator)] for _ in range(NUM_PERMUTATIONS))]
    found: dict[tuple[str, int], Counts] = {}
    hits_KTV = torch.stack([hits(scores_TV, depth) for depth in DEPTHS])
    texts_PK = torch.stack([hits_KTV[:, torch.arange(len(owner)), owner].sum(1) for owner in owners])
    videos_PK = torch.stack([_diagonal_hits(_best_captions(scores_TV, owner)) for owner in owners])
    for direction, values_PK, queries in (("t2v", texts_PK, len(owner_T)), ("v2t", videos_PK, scores_TV.shape[1])):
        means_K, variances_K = values_PK[1:].mean(0), values_PK[1:].var(0)
        for number, depth in enumerate(DEPTHS):
            numbers = values_PK[0, number].item(), means_K[number].item(), variances_K[number].item()
            found[direction, depth] = Counts(*numbers, queries)
    return found


def _diagonal_hits(scores_VV: Tensor) -> Tensor:
    """``(K,)``: how many rows have their diagonal among the first of each depth, ties in random order."""
    right_V1 = scores_VV.diagonal()[:, None]
    above_V, tied_V = (scores_VV > right_V1).sum(1), (scores_VV == right_V1).sum(1)
    return ((torch.tensor(DEPTHS)[:, None] - above_V).double() / tied_V).clamp(0, 1).sum(1)


def sigmas(counts: list[Counts]) -> float:
    """Standard deviations by which hits of several matrices together exceed chance."""
    excess = sum(one.found - one.expected for one in counts)
    return excess / math.sqrt(max(sum(one.variance for one in counts), 1e-12)) if abs(excess) > 1e-9 else 0.0


def above_chance(counts: list[Counts], num_tests: int) -> bool:
    """Whether the hits count as more than chance, by the normal and, for small counts, by the Poisson distribution."""
    limit = NormalDist().inv_cdf(1 - tail(num_tests))
    found, expected = sum(one.found for one in counts), sum(one.expected for one in counts)
    return sigmas(counts) > limit and poisson_tail(found, expected) < tail(num_tests)


def tolerance(scores: Tensor) -> float:
    """Differences of two equal calls that rounding explains: 1e-5 of the spread, or float32's of large scores."""
    numbers = scores[is_number(scores)]
    if not len(numbers):
        return 0.0
    return max(1e-5 * spread(scores), 16 * 2.0**-24 * numbers.abs().max().item())


def spread(scores: Tensor) -> float:
    """Standard deviation of the scores that are numbers."""
    numbers = scores[is_number(scores)]
    return numbers.std().item() if len(numbers) > 1 else 0.0


def distance(one: Tensor, other: Tensor) -> float:
    """Greatest difference of scores that are numbers in both."""
    both = is_number(one) & is_number(other)
    return (one - other)[both].abs().max().item() if both.any() else 0.0


def difference_of_own(difference_TV: Tensor, owner_T: Tensor) -> float:
    """By how many standard errors differences of own pairs lie above those of all pairs."""
    own_TV = torch.zeros(difference_TV.shape, dtype=torch.bool)
    own_TV[torch.arange(len(own_TV)), owner_T] = True
    numbers_TV = is_number(difference_TV)
    return standard_errors(difference_TV[own_TV & numbers_TV], difference_TV[numbers_TV])


def standard_errors(sample_N: Tensor, all_M: Tensor) -> float:
    """By how many standard errors the mean of a sample lies above that of all values."""
    if len(sample_N) < 2:
        return 0.0
    error = all_M.std().item() / math.sqrt(len(sample_N))
    return (sample_N.mean() - all_M.mean()).item() / max(error, 1e-30)


def gain(before_R: Tensor, after_R: Tensor) -> float:
    """By how many standard errors the mean over calls has risen (Welch's t)."""
    error = (before_R.var() / len(before_R) + after_R.var() / len(after_R)).sqrt().item()
    return (after_R.mean() - before_R.mean()).item() / max(error, 1e-30)
