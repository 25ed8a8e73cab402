"""Bootstrap intervals of the metrics. Videos are drawn, each with all its captions, since these are not independent.

Source: the cluster bootstrap, Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8.
"""

# Shapes: Q queries, V videos, S draws, K metrics.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from tmass_dist.evaluation.ranking import RECALL_AT, Ranks, metrics

NUM_DRAWS = 1000
LEVEL = 0.95
VALUES_IN_HAND = 2**22
"""Weights of queries held at a time."""


def intervals(ranks: Ranks) -> dict[str, dict[str, list[float]]]:
    """Bootstrap 95 % interval of each metric, for both directions; none where there is a single video.

    Returns:
        ``{"t2v": {"R@1": [low, high], ...}, "v2t": {...}}``, or ``{}`` for a single video.
    """
    queries = _by_direction(ranks)
    if len(ranks.v2t_V) < 2:
        return {}
    found = {}
    for direction, (rank_Q, owner_Q) in queries.items():
        draws = _Draws(owner_Q, len(ranks.v2t_V))
        low_K, high_K = _quantiles(draws.metrics(rank_Q))
        found[direction] = {name: [float(a), float(b)] for name, a, b in zip(metrics(ranks.t2v_T), low_K, high_K)}
    return found


class Difference(NamedTuple):
    """How much a metric of the second run is above that of the first, with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


def paired_differences(first: Ranks, second: Ranks) -> dict[str, dict[str, Difference]]:
    """Second minus first, for two runs on the same queries: both see the same drawn videos.

    Returns:
        ``{"t2v": {"R@1": Difference, ...}, "v2t": {...}}``, or ``{}`` for a single video.
    """
    if len(first.v2t_V) < 2:
        return {}
    found = {}
    pairs = zip(_by_direction(first).items(), _by_direction(second).values())
    for (direction, (first_Q, owner_Q)), (second_Q, other_owner_Q) in pairs:
        assert np.array_equal(owner_Q, other_owner_Q), "the runs must have ranked the same queries"
        draws = _Draws(owner_Q, len(first.v2t_V))
        low_K, high_K = _quantiles(draws.metrics(second_Q) - draws.metrics(first_Q))
        ours, theirs = (metrics(getattr(r, "t2v_T" if direction == "t2v" else "v2t_V")) for r in (second, first))
        found[direction] = {
            name: Difference(ours[name] - theirs[name], float(a), float(b)) for name, a, b in zip(ours, low_K, high_K)
        }
    return found


def _by_direction(ranks: Ranks) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rank and video of each query: texts are drawn by their video, videos by themselves."""
    return {
        "t2v": (_numpy(ranks.t2v_T), _numpy(ranks.owner_T)),
        "v2t": (_numpy(ranks.v2t_V), np.arange(len(ranks.v2t_V))),
    }


def _numpy(values: Tensor) -> np.ndarray:
    return values.numpy().astype(np.int64)


def _quantiles(values_SK: np.ndarray) -> np.ndarray:
    edge = (1 - LEVEL) / 2
    return np.quantile(values_SK, [edge, 1 - edge], axis=0)


class _Draws:
    """Bootstrap draws of videos; the same ones for every ranking of the same queries."""

    def __init__(self, owner_Q: np.ndarray, num_videos: int) -> None:
        self.owner_Q, self.num_videos = owner_Q, num_videos

    def metrics(self, rank_Q: np.ndarray) -> np.ndarray:
        """Every metric of every draw, ``(S, K)``, in the order of :func:`metrics`."""
        order = np.argsort(rank_Q, kind="stable")
        sorted_Q, owner_Q = rank_Q[order].astype(np.float64), self.owner_Q[order]
        is_hit_QK = np.stack([sorted_Q <= k for k in RECALL_AT], axis=1).astype(np.float64)
        columns_QK = np.concatenate([100 * is_hit_QK, sorted_Q[:, None]], axis=1)
        rng, uniform = np.random.default_rng(0), np.full(self.num_videos, 1 / self.num_videos)
        step = max(1, VALUES_IN_HAND // len(rank_Q))
        rows = []
        for start in range(0, NUM_DRAWS, step):
            # How often each video was drawn is the weight of each of its queries.
            weight_SV = rng.multinomial(self.num_videos, uniform, size=min(step, NUM_DRAWS - start))
            weight_SQ = weight_SV[:, owner_Q].astype(np.float64)
            total_S1 = weight_SQ.sum(axis=1, keepdims=True)
            *recalls, mean = (weight_SQ @ columns_QK / total_S1).T
            rows.append(np.stack([*recalls, _medians(sorted_Q, weight_SQ), mean], axis=1))
        return np.concatenate(rows)


def _medians(sorted_Q: np.ndarray, weight_SQ: np.ndarray) -> np.ndarray:
    """Median ``(S,)`` of ascending values that are repeated as often as their weights say."""
    reached_SQ = np.cumsum(weight_SQ, axis=1)
    half_S1 = reached_SQ[:, -1:] / 2
    lower, upper = (reached_SQ < half_S1).sum(axis=1), (reached_SQ <= half_S1).sum(axis=1)
    return (sorted_Q[lower] + sorted_Q[upper]) / 2
