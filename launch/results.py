"""The result of an evaluation, as the commands that show or compare runs read it; without importing torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tmass_dist.cli import read_object
from tmass_dist.errors import UserError

METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}


def read_result(run: Path) -> dict[str, Any] | None:
    """``evaluation/metrics.json`` of a run; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "evaluation" / "metrics.json"
    if not path.is_file():
        return None
    remedy = f"run tmass evaluate --run {run} again"
    result = read_object(path, {"protocol": str, **dict.fromkeys(DIRECTIONS, dict)}, remedy)
    wrong = [f"{d} {name}" for d in DIRECTIONS for name in METRICS if not _is_number(result[d].get(name))]
    if wrong:
        raise UserError(f"{path} is damaged: it has no number {wrong[0]}; {remedy}")
    limits = result.get("intervals_95", {})
    if not isinstance(limits, dict) or not all(_are_limits(limits.get(direction, {})) for direction in DIRECTIONS):
        raise UserError(f"{path} is damaged: its intervals_95 are no pairs of numbers; {remedy}")
    return result


def _are_limits(limits: Any) -> bool:
    if not isinstance(limits, dict):
        return False
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in limits.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
