"""Bootstrap intervals against simulations whose true values are known."""

import numpy as np
import torch

from tmass_dist.evaluation.bootstrap import NUM_DRAWS, intervals, paired_differences
from tmass_dist.evaluation.ranking import Ranks, metrics

NUM_VIDEOS, CAPTIONS = 80, 10
NUM_SIMULATIONS = 150


def _ranks(t2v: np.ndarray, v2t: np.ndarray, owner: np.ndarray) -> Ranks:
    return Ranks(torch.from_numpy(t2v), torch.from_numpy(v2t), torch.from_numpy(owner))


def _simulated(rng: np.random.Generator, gain: float = 0.0) -> tuple[Ranks, Ranks]:
    """Two runs on the same videos: a caption is a hit with its video's own probability, of mean 0.5, plus ``gain``."""
    chance_V = 0.1 + 0.8 * rng.beta(0.5, 0.5, NUM_VIDEOS)
    owner_T = np.arange(NUM_VIDEOS).repeat(CAPTIONS)
    runs = []
    for more in (0.0, gain):
        t2v = np.where(rng.random(len(owner_T)) < chance_V[owner_T] + more, 1, 40)
        v2t = np.where(rng.random(NUM_VIDEOS) < chance_V + more, 1, 40)
        runs.append(_ranks(t2v, v2t, owner_T))
    return runs[0], runs[1]


def _coverage(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered: dict[str, list[bool]] = {"t2v": [], "v2t": [], "captions alone": []}
    for _ in range(NUM_SIMULATIONS):
        ranks, _ = _simulated(rng)
        found = intervals(ranks)
        for direction in ("t2v", "v2t"):
            low, high = found[direction]["R@1"]
            covered[direction].append(low <= 50 <= high)
        hits = ranks.t2v_T.numpy() <= 1
        half = 196 * (hits.mean() * (1 - hits.mean()) / len(hits)) ** 0.5
        covered["captions alone"].append(abs(100 * hits.mean() - 50) <= half)
    assert 0.92 <= _coverage(covered["t2v"]) <= 0.98
    assert 0.92 <= _coverage(covered["v2t"]) <= 0.98
    # What the intervals were before: captions as if they were independent.
    assert _coverage(covered["captions alone"]) < 0.75


def test_paired_differences_cover_the_true_gain_and_are_narrower_than_unpaired_ones() -> None:
    rng = np.random.default_rng(1)
    covered: dict[str, list[bool]] = {"t2v": [], "v2t": []}
    paired, unpaired = [], []
    for _ in range(NUM_SIMULATIONS):
        first, second = _simulated(rng, gain=0.05)
        found = paired_differences(first, second)
        for direction in ("t2v", "v2t"):
            one = found[direction]["R@1"]
            assert one.low <= one.value <= one.high
            covered[direction].append(one.low <= 5 <= one.high)
        paired.append(found["t2v"]["R@1"].high - found["t2v"]["R@1"].low)
        widths = [np.diff(intervals(ranks)["t2v"]["R@1"])[0] for ranks in (first, second)]
        unpaired.append(np.hypot(*widths))
    assert 0.92 <= _coverage(covered["t2v"]) <= 0.98
    assert 0.92 <= _coverage(covered["v2t"]) <= 0.98
    assert np.mean(paired) < 0.5 * np.mean(unpaired)


def test_draws_are_those_of_resampled_videos_written_out() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 5, 30)
    owner_T = np.arange(30).repeat(counts)
    ranks = _ranks(rng.integers(1, 31, len(owner_T)), rng.integers(1, 31, 30), owner_T)
    found = intervals(ranks)
    draws = np.random.default_rng(0)
    for direction, values, owner in (("t2v", ranks.t2v_T, owner_T), ("v2t", ranks.v2t_V, np.arange(30))):
        draws = np.random.default_rng(0)
        rows = []
        for weights in draws.multinomial(30, np.full(30, 1 / 30), size=NUM_DRAWS):
            sample = np.concatenate([np.tile(values.numpy()[owner == v], weights[v]) for v in range(30)])
            rows.append(list(metrics(torch.from_numpy(sample)).values()))
        low, high = np.quantile(np.array(rows), [0.025, 0.975], axis=0)
        np.testing.assert_allclose(list(found[direction].values()), np.stack([low, high], axis=1), atol=1e-9)


def test_one_video_has_no_interval() -> None:
    one = _ranks(np.array([1, 1]), np.array([1]), np.array([0, 0]))
    assert intervals(one) == {} and paired_differences(one, one) == {}
