"""Runs side by side: ``python launch/compare.py RUN...``, or a directory of runs; what differs, and what it gave."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import program, run_command  # noqa: E402
from tmass_dist.config import flat, load_config  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402

LABELS = ("protocol", "selected_on", "post_processing", "precision")  # a result names the last if not float32
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
        f"| run | {' | '.join([*keys, *METRICS, 'protocol, selected on, post-processing'])} |",
        f"|---|{'---|' * (len(keys) + len(METRICS) + 1)}",
    ]
    for run, found in settings.items():
        path = run / "evaluation" / "metrics.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            numbers = [f"{result['t2v'][name]:.1f}" for name in METRICS]
            words = ", ".join(str(result[key]) for key in LABELS if key in result)
        else:
            numbers, words = ["-"] * len(METRICS), "not evaluated: see launch/status.py"
        lines.append(f"| {run.name} | {' | '.join([*(str(found[k]) for k in keys), *numbers, words])} |")
    return "\n".join(lines) + "\n"


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
    print(text, end="")
    if arguments.out:
        aside = arguments.out / "comparison.md.tmp"
        aside.write_text(text, encoding="utf-8")
        aside.replace(arguments.out / "comparison.md")


if __name__ == "__main__":
    run_command(main)
