"""A finished run, measured under any protocol from its feature store; what was measured is kept beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from tmass_dist.cli import write_json
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.report import summary
from tmass_dist.evaluation.rescore import Stored

COLUMNS = ("R@1", "R@5", "R@10", "MdR", "MnR")


def is_finished(run: Path) -> bool:
    """Whether a run was trained and evaluated to its end."""
    return (run / "evaluation" / "metrics.json").is_file()


def measure(run: Path, *, protocol: str = "query_conditioned", post: str = "none", trials: int = 20) -> dict[str, Any]:
    """Metrics of both directions, ``seconds`` of scoring and the labels they carry.

    Args:
        run: a finished run directory.
        protocol, post: as ``evaluation.protocol`` and ``evaluation.post_processing``.
        trials: samples of each text (M).
    """
    kept = run / "measured" / f"{protocol},{post},{trials}.json"
    evaluated = run / "evaluation" / "features" / "index.json"
    if kept.is_file() and kept.stat().st_mtime >= evaluated.stat().st_mtime:
        return json.loads(kept.read_text(encoding="utf-8"))
    overrides = [f"evaluation.protocol={protocol}", f"evaluation.post_processing={post}"]
    stored = Stored(run / "evaluation" / "features", [*overrides, f"stochastic.num_trials={trials}"])
    scorer = stored.scorer
    began = time.perf_counter()
    with torch.inference_mode():
        blocks = [scorer.score(start) for start in scorer.starts]
    seconds = time.perf_counter() - began
    ranks = ranking.rank(lambda: blocks, stored.features.owner_T, len(stored.features.video_ids), post)  # type: ignore[arg-type]
    found = {
        "protocol": protocol,
        "post_processing": post,
        "trials": trials,
        "selected_on": stored.config.evaluation.selected_on,
        "num_texts": len(stored.features.caption_ids),
        "num_videos": len(stored.features.video_ids),
        "seconds": seconds,
        **summary(ranks),
    }
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, found)
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.1f} ± {deviation:.1f}"


def numbers(runs: list[Path], direction: str = "t2v", **options: Any) -> list[str]:
    """The five columns over a system's runs; dashes where none is finished."""
    found = [measure(run, **options)[direction] for run in runs if is_finished(run)]
    return [spread([one[column] for one in found]) for column in COLUMNS] if found else ["-"] * len(COLUMNS)
