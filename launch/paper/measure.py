"""Measure a finished run under any protocol from its stored features; each measurement is cached in the run."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmass_dist.cli import write_json
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.blocks import BlockScorer
from tmass_dist.evaluation.report import COLUMNS, labels, summary
from tmass_dist.evaluation.stored import StoredSplit
from tmass_dist.models.head import RetrievalHead

TRIALS = 20
"""Samples of each text (M), unless a measurement says otherwise."""


def is_finished(run: Path) -> bool:
    """Whether a run is trained and evaluated."""
    return (run / "evaluation" / "metrics.json").is_file()


def measure(
    run: Path, *, protocol: str = "query_conditioned", post: str = "none", trials: int = TRIALS
) -> dict[str, Any]:
    """Score a run's stored features, or read the cached measurement.

    Args:
        run: a finished run directory.
        protocol, post: as ``evaluation.protocol`` and ``evaluation.post_processing``.
        trials: samples of each text (M); 0 scores the text itself.

    Returns:
        Metrics of both directions (``t2v``, ``v2t``), ``t2v_ranks`` and ``owners`` (video number) of every caption,
        ``seconds`` of scoring, and the labels of :data:`tmass_dist.score_labels.LABELS`.
    """
    cached = run / "measured" / f"{protocol},{post},{trials}.json"
    evaluated = run / "evaluation" / "features" / "index.json"
    if cached.is_file() and cached.stat().st_mtime >= evaluated.stat().st_mtime:
        return json.loads(cached.read_text(encoding="utf-8"))
    overrides = [f"evaluation.protocol={protocol}", f"evaluation.post_processing={post}"]
    overrides += ["evaluation.precision=float32", f"stochastic.num_trials={max(trials, 1)}"]
    stored = StoredSplit(run / "evaluation" / "features", overrides)
    scorer = stored.scorer
    if trials == 0:
        scorer = BlockScorer(RetrievalHead(scorer.head.pooling, None), stored.features, stored.config)
    began = time.perf_counter()
    with torch.inference_mode():
        blocks = list(scorer.scores())
    seconds = time.perf_counter() - began
    processing = stored.config.evaluation.post_processing
    ranks = ranking.rank(lambda: blocks, stored.features.owner_T, len(stored.features.video_ids), processing)
    measured = {
        **labels(stored.config, stored.features, stored.index, scorer.head.tau),
        **({} if trials else {"num_trials": None, "noise": None}),
        "seconds": seconds,
        **summary(ranks),
        "t2v_ranks": ranks.t2v_T.tolist(),
        "owners": stored.features.owner_T.tolist(),
    }
    cached.parent.mkdir(exist_ok=True)
    write_json(cached, measured)
    return measured


def gain_over_seeds(
    pairs: list[tuple[dict[str, Any], dict[str, Any]]], draws: int = 2000
) -> tuple[list[float], float, float]:
    """R@1 of the second measurement of each pair minus R@1 of the first; a pair shares its seed and its split.

    Returns:
        The gain of each seed, in points, and the limits of a bootstrap 95 % interval of their mean. The bootstrap
        resamples seeds, and videos with all their captions.
    """
    gains_SV, weights_V = [], np.zeros(0)
    for first, second in pairs:
        owners = np.array(first["owners"])
        hits = (np.array(second["t2v_ranks"]) <= 1).astype(float) - (np.array(first["t2v_ranks"]) <= 1)
        gains_SV.append(np.bincount(owners, weights=hits))
        weights_V = np.bincount(owners)
    gain_SV = np.stack(gains_SV)
    low, high = gain_interval(gain_SV, weights_V, draws)
    return (100 * gain_SV.sum(axis=1) / weights_V.sum()).tolist(), low, high


def gain_interval(gain_SV: np.ndarray, weights_V: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Limits of a bootstrap 95 % interval of the mean gain in R@1, in points; seeds and videos are drawn.

    Args:
        gain_SV: for each seed and video, how many more of its captions were ranked first.
        weights_V: captions of each video.
        draws: number of bootstrap samples.
    """
    rng = np.random.default_rng(0)
    num_seeds, num_videos = gain_SV.shape
    means = []
    for _ in range(draws):
        seeds, videos = rng.integers(num_seeds, size=num_seeds), rng.integers(num_videos, size=num_videos)
        means.append(100 * gain_SV[seeds][:, videos].sum() / (num_seeds * weights_V[videos].sum()))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mean_and_deviation(values: list[float]) -> str:
    """``mean ± standard deviation`` over seeds; the mean alone for one seed."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def columns_over_seeds(runs: list[Path], direction: str = "t2v", **options: Any) -> list[str]:
    """R@1, R@5, R@10, MdR and MnR over a system's finished runs (at least one); ``options`` go to ``measure``."""
    measured = [measure(run, **options)[direction] for run in runs]
    return [mean_and_deviation([one[column] for one in measured]) for column in COLUMNS]
