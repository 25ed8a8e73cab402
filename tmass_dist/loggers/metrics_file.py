"""``metrics.jsonl``, which every run writes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from tmass_dist.cli import write_text
from tmass_dist.loggers.base import Logger, has_scores

METRICS_FILE = "metrics.jsonl"
"""In the run directory: one JSON object a line, with ``step``, ``time`` (Unix seconds) and the values by tag."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a line that is cut off or damaged is left out. Empty if there is no file."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class MetricsFile(Logger):
    """``metrics.jsonl``. A value that is not finite is written as ``null``.

    A resumed run has the lines of a run that was never stopped: lines after its step are removed, and so is the
    validation of its step if that will be repeated.

    Args:
        path: of the file.
        step: from which the run starts or resumes; None: after its end, all lines are kept.
        repeats_validation: whether the validation of this step will be repeated.
    """

    def __init__(self, path: Path, step: int | None, *, repeats_validation: bool = False) -> None:
        self.path = path
        self._keep(
            lambda line: step is None
            or (line["step"] < step)
            or (line["step"] == step > 0 and not (repeats_validation and has_scores(line)))
        )

    def _keep(self, condition: Any) -> None:
        if self.path.is_file():
            lines = [line for line in read_metrics(self.path) if condition(line)]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def scalars(self, values: dict[str, float], step: int) -> None:
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), **finite}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def result(self, values: dict[str, float], step: int) -> None:
        prefixes = {tag.rpartition("_")[0] for tag in values}
        self._keep(lambda line: not any(key.rpartition("_")[0] in prefixes for key in line))
        self.scalars(values, step)
