"""Compare runs: ``python launch/compare.py RUN...``, or a directory of runs.

Prints the settings in which they differ, their results, and their paired differences from the first run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import program, run_command, writable_dir  # noqa: E402
from tmass_dist.config import flat, load_config  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402

LABELS = ("protocol", "num_trials", "selected_on", "post_processing", "precision", "feature_precision")
"""Labels of a result; it has a precision only where that is not float32."""
PAIRED = ("protocol", "post_processing", "precision", "feature_precision")
"""Labels in which results must agree for a paired difference."""
METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")


def compare(runs: list[Path]) -> str:
    """A markdown table: the settings in which the runs differ, then t2v metrics, or where a run stands.

    Raises:
        UserError: a directory that holds no run.
    """
    settings: dict[Path, dict[str, Any]] = {}
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} is no run directory: it has no config.yaml")
        settings[run] = flat(asdict(load_config(str(run / "config.yaml"))))
    first = settings[runs[0]]
    keys = [k for k in first if k != "run_dir" and any(found[k] != first[k] for found in settings.values())]
    lines = [
        f"| run | {' | '.join([*keys, *METRICS, 'protocol, M, selected on, post-processing'])} |",
        f"|---|{'---|' * (len(keys) + len(METRICS) + 1)}",
    ]
    for run, found in settings.items():
        path = run / "evaluation" / "metrics.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            numbers = [f"{result['t2v'][name]:.1f}" for name in METRICS]
            words = ", ".join(str(result[key]) for key in LABELS if result.get(key) is not None)
        else:
            numbers, words = ["-"] * len(METRICS), "not evaluated: see launch/status.py"
        lines.append(f"| {run.name} | {' | '.join([*(str(found[k]) for k in keys), *numbers, words])} |")
    return "\n".join(lines) + "\n"


def differences(runs: list[Path]) -> str:
    """A markdown table of each run's metrics minus those of the first, with 95 % intervals; or why there is none.

    The bootstrap draws videos, the same ones for both runs: a difference is narrower than its two results suggest.
    """
    from tmass_dist.evaluation.bootstrap import paired_differences
    from tmass_dist.evaluation.report import read_ranks

    first, *others = runs
    columns = [(direction, name) for direction in ("t2v", "v2t") for name in METRICS]
    lines = [
        f"Differences from {first.name} (95 % interval: paired bootstrap over videos)",
        "",
        f"| run | {' | '.join(f'{direction} {name}' for direction, name in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for run in others:
        try:
            reason = _not_comparable(first, run)
            pairs = [] if reason else [read_ranks(path / "evaluation") for path in (first, run)]
        except UserError as error:
            reason, pairs = str(error), []
        if not reason and pairs[0][1] != pairs[1][1]:
            reason = "it was evaluated on other captions"
        if reason:
            lines.append(f"| {run.name} | not compared: {reason} |{' |' * (len(columns) - 1)}")
            continue
        found = paired_differences(pairs[0][0], pairs[1][0])
        cells = ["-"] * len(columns)
        if found:
            cells = [
                f"{one.value:+.1f} ({one.low:+.1f} to {one.high:+.1f})"
                for one in (found[direction][name] for direction, name in columns)
            ]
        lines.append(f"| {run.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _not_comparable(first: Path, second: Path) -> str | None:
    """Why the results of two runs must not be subtracted; None if they may be."""
    results = []
    for run in (first, second):
        path = run / "evaluation" / "metrics.json"
        if not path.is_file():
            return f"{run.name} is not evaluated"
        results.append(json.loads(path.read_text(encoding="utf-8")))
    differing = [key for key in PAIRED if results[0].get(key) != results[1].get(key)]
    return f"{', '.join(differing)} differs" if differing else None


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python launch/compare.py"), description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or one directory that holds them")
    parser.add_argument("--out", type=Path, help="also write comparison.md there")
    arguments = parser.parse_args()
    runs = arguments.runs
    if len(runs) == 1 and not (runs[0] / "config.yaml").is_file():
        runs = sorted(path.parent for path in runs[0].glob("*/config.yaml"))
    if not runs:
        raise UserError(f"there is no run in {arguments.runs[0]}")
    text = compare(runs)
    if len(runs) > 1:
        text += "\n" + differences(runs)
    print(text, end="")
    if arguments.out:
        temporary = writable_dir(arguments.out) / "comparison.md.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(arguments.out / "comparison.md")


if __name__ == "__main__":
    run_command(main)
