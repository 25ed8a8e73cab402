"""Evaluate a stored split: score, rank, add the baselines, write the report."""

# Shapes: T texts, V videos.

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from tmass_dist.config import Config
from tmass_dist.errors import UserError
from tmass_dist.evaluation import baselines, ranking
from tmass_dist.evaluation.bootstrap import paired_differences
from tmass_dist.evaluation.calibration import calibration
from tmass_dist.evaluation.features import selection_of
from tmass_dist.evaluation.report import COLUMNS, Report, labels, summary
from tmass_dist.evaluation.retrieved import best_answers
from tmass_dist.evaluation.stored import StoredSplit
from tmass_dist.loggers import METRICS_FILE, log_result
from tmass_dist.revision import revision
from tmass_dist.score_labels import score_tags


def check_request(config: Config, num_videos: int | None, *, bank: Path | None, num_candidates: int | None) -> None:
    """Raise a UserError for a bank or a search that does not go with the settings, before anything is computed.

    Args:
        config: with the scoring settings.
        num_videos: of the gallery; None where it is not known yet.
        bank: feature store of training queries.
        num_candidates: of the two-stage search.
    """
    evaluation = config.evaluation
    if evaluation.post_processing == "qbnorm" and bank is None:
        raise UserError("qbnorm needs a bank of training queries: give --bank FEATURES")
    if bank is not None and evaluation.post_processing != "qbnorm":
        raise UserError("--bank is used by --post-processing qbnorm only")
    if num_candidates is None:
        return
    if evaluation.post_processing != "none" or evaluation.protocol != "query_conditioned":
        raise UserError("--search has no post-processing and no published_code protocol; leave them out")
    if num_candidates < 1:
        raise UserError(f"--search is {num_candidates}; it needs at least one candidate")
    if num_videos is not None and num_candidates > num_videos:
        raise UserError(f"--search is {num_candidates}; the gallery has {num_videos} videos")


def evaluate_store(stored: StoredSplit, out: Path, *, bank: Path | None = None) -> ranking.Ranks:
    """Compute the blocks of scores that are missing below ``out``, rank, write the report to ``out`` and print it.

    Args:
        stored: the split.
        out: directory of blocks and report.
        bank: feature store of training queries, for qbnorm.

    Raises:
        UserError: a missing bank, or one that was encoded by another model.
    """
    config = stored.config
    check_request(config, stored.num_videos, bank=bank, num_candidates=None)
    query_bank = stored.bank(bank) if bank else None
    blocks = stored.block_files(out)
    blocks.compute(0, 1)
    post = config.evaluation.post_processing
    with stored.naming():
        ranks = ranking.rank(blocks.blocks, stored.features.owner_T, stored.num_videos, post, query_bank)
    result = labels(config, stored.features, stored.index, stored.scorer.head.tau)
    if query_bank is not None:
        result["bank"] = str(bank)
    result |= summary(ranks)
    with stored.naming():
        result["baselines"], baseline_ranks = baseline_rows(stored)
    # Only a result that is scored as the baselines are may be compared with them.
    plain = config.evaluation.protocol == "query_conditioned" and post == "none"
    result["gain_over_baselines"] = {
        name: {d: {metric: list(gain) for metric, gain in gains.items()} for d, gains in found.items()}
        for name, other in baseline_ranks.items()
        if plain and (found := paired_differences(other, ranks))
    }
    retrieved = best_answers(blocks.blocks, stored.features.owner_T, stored.num_videos, post, query_bank)
    features = stored.features
    result["calibration"] = calibration(ranks, retrieved, features, stored.scorer.head.mass)
    report = Report(result, ranks, features.captions, features.caption_ids, stored, blocks.scores_of, retrieved)
    report.facts = {
        "run": Path(config.run_dir).name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "architecture": config.model.architecture,
        "data": str(stored.index.get("shards", "unknown")),
        "checkpoint step": str(selection_of(stored.index).get("step", "unknown")),
        "code of the training": str(selection_of(stored.index).get("code", "unknown")),
        "code of this evaluation": revision(),
    }
    report.write(out)
    report.show()
    print(f"report: {out / 'report.html'}")
    _log_to_run(stored, out, result)
    return ranks


def _log_to_run(stored: StoredSplit, out: Path, result: dict[str, Any]) -> None:
    """Add the result to the curves of the run whose selected checkpoint was evaluated, if ``out`` lies in one."""
    step = selection_of(stored.index).get("step")
    if not isinstance(step, int) or out.name != "evaluation" or not (out.parent / METRICS_FILE).is_file():
        return
    split = "test" if result["split"] == "unknown" else str(result["split"])
    values = score_tags(split, result, t2v=result["t2v"], v2t=result["v2t"])
    log_result(dataclasses.replace(stored.config, run_dir=str(out.parent)), values, step)


def baseline_rows(stored: StoredSplit) -> tuple[dict[str, Any], dict[str, ranking.Ranks]]:
    """The baselines that ``evaluation.baselines`` asks for; all are query-conditioned and without post-processing.

    Returns:
        Metrics of each by name, and the ranks of those that are computed from the stored features.

    Raises:
        UserError: rows before training are asked for, and the store has none.
    """
    wanted, features = stored.config.evaluation.baselines, stored.features
    if wanted == "none":
        return {}, {}
    before = stored.index.get("before_training")
    if wanted == "all" and before is None:
        raise UserError(
            f"{stored.store} has no scores before training: evaluate with --run and evaluation.baselines=all first"
        )
    rows = dict(_checked_rows(before, stored)) if before and wanted in ("auto", "all") else {}
    if wanted == "auto" and len(features.owner_T) * stored.num_videos > baselines.AUTOMATIC_PAIRS:
        return rows, {}
    found = baselines.frame_baselines(features, stored.query_scoring_tau)
    return rows | {name: summary(ranks) for name, ranks in found.items()}, found


def _checked_rows(rows: Any, stored: StoredSplit) -> dict[str, Any]:
    """The rows of a store's index, which others may have written; a UserError where a metric is missing."""

    def is_complete(row: Any) -> bool:
        directions = [row.get(name) for name in ("t2v", "v2t")] if isinstance(row, dict) else [None]
        return all(
            isinstance(found, dict) and all(isinstance(found.get(column), int | float) for column in COLUMNS)
            for found in directions
        )

    if not isinstance(rows, dict) or not all(map(is_complete, rows.values())):
        path = stored.store / "index.json"
        raise UserError(f"{path} is damaged: its scores before training are incomplete; encode again")
    return rows
