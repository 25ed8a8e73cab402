"""Compare runs: ``python launch/compare.py RUN...``, or a directory of runs.

Prints the settings in which they differ, R@1 with its interval, and paired differences from the first run. ``--out``
and ``--html`` have all metrics.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.results import DIRECTIONS, METRICS, read_result  # noqa: E402
from tmass_dist.cli import program, run_command, writable_dir, write_text  # noqa: E402
from tmass_dist.config import flat, load_config  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402
from tmass_dist.score_labels import label_words  # noqa: E402

PAIRED = {"protocol": None, "post_processing": "none", "precision": "float32", "feature_precision": "float32"}
"""Labels in which results must agree for a paired difference, and what a result without the label means."""
MIN_NAME, MAX_NAME = 12, 32
"""Width of the column with the runs' names in a terminal."""


@dataclass
class Row:
    """One run of a comparison."""

    run: Path
    settings: dict[str, Any]
    """Those in which the runs differ."""
    labels: str = "not evaluated: see `tmass status`"
    scores: dict[tuple[str, str], str] = field(default_factory=dict)
    """By direction and metric; empty if the run is not evaluated."""
    intervals: dict[tuple[str, str], str] = field(default_factory=dict)
    differences: dict[tuple[str, str], str] = field(default_factory=dict)
    """Metrics minus those of the first run, with their 95 % intervals."""
    not_compared: str = ""
    """Why there are no differences."""

    @property
    def name(self) -> str:
        return self.run.name or str(self.run)


def compare(runs: list[Path]) -> list[Row]:
    """The runs side by side; the first is the reference of the differences.

    The bootstrap draws videos, the same ones for both runs: a difference is narrower than its two results suggest.

    Raises:
        UserError: a directory that holds no run.
    """
    settings: list[dict[str, Any]] = []
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} is no run directory: it has no config.yaml")
        settings.append(flat(asdict(load_config(str(run / "config.yaml"), allow_env=False))))
    first = settings[0]
    keys = [key for key in first if key != "run_dir" and any(one[key] != first[key] for one in settings)]
    rows = [Row(run, {key: one[key] for key in keys}) for run, one in zip(runs, settings)]
    for row in rows:
        _read_result(row)
    for row in rows[1:]:
        _subtract(rows[0], row)
    return rows


def _read_result(row: Row) -> None:
    result = read_result(row.run)
    if result is None:
        return
    row.labels = ", ".join(label_words(result))
    for direction in DIRECTIONS:
        for name in METRICS:
            row.scores[direction, name] = f"{result[direction][name]:.1f}"
            low_high = result.get("intervals_95", {}).get(direction, {}).get(name)
            if low_high is not None:
                row.intervals[direction, name] = f"{low_high[0]:.1f} to {low_high[1]:.1f}"


def _subtract(first: Row, row: Row) -> None:
    from tmass_dist.evaluation.bootstrap import paired_differences
    from tmass_dist.evaluation.report import read_ranks

    row.not_compared = _not_comparable(first.run, row.run) or ""
    if row.not_compared:
        return
    try:
        (own_first, ids_first), (own, ids) = (read_ranks(run / "evaluation") for run in (first.run, row.run))
    except UserError as error:
        row.not_compared = str(error)
        return
    if ids_first != ids:
        row.not_compared = "it was evaluated on other captions"
        return
    found = paired_differences(own_first, own) or {}
    for direction, by_name in found.items():
        for name in METRICS:
            one = by_name[name]
            row.differences[direction, name] = f"{one.value:+.1f} ({one.low:+.1f} to {one.high:+.1f})"


def _not_comparable(first: Path, second: Path) -> str | None:
    """Why the results of two runs must not be subtracted; None if they may be."""
    results = []
    for run in (first, second):
        result = read_result(run)
        if result is None:
            return f"{run.name} is not evaluated"
        results.append(result)
    differing = [key for key, other in PAIRED.items() if results[0].get(key, other) != results[1].get(key, other)]
    return f"{', '.join(differing)} differs" if differing else None


def terminal(rows: list[Row], width: int) -> str:
    """R@1 in both directions, then the differing settings; lines of both are at most ``width`` wide, down to 80."""
    space = max(MIN_NAME, min(MAX_NAME, width - 56))
    names = _names(rows, space)
    lines = []
    for direction, title in DIRECTIONS.items():
        lines += [f"{title:<{space}}  {'R@1 (95 %)':<22}{'difference from the first':<26}{'MdR':>6}"]
        for row in rows:
            score, interval = (part.get((direction, "R@1"), "") for part in (row.scores, row.intervals))
            difference = row.differences.get((direction, "R@1"), "")
            shown = f"{score} ({interval})" if interval else score or "-"
            median = row.scores.get((direction, "MdR"), "-")
            lines.append(f"{names[id(row)]:<{space}}  {shown:<22}{difference:<26}{median:>6}".rstrip())
        lines.append("")
    lines += [f"{row.name}: not compared: {row.not_compared}" for row in rows if row.not_compared]
    labels = {row.labels for row in rows}
    said = [f"all: {labels.pop()}"] if len(labels) == 1 else [f"{row.name}: {row.labels}" for row in rows]
    lines += ["labels of the results", *_wrapped([f"  {one}" for one in said], width)]
    for key in rows[0].settings:
        lines.append(key)
        lines += _wrapped([f"  {names[id(row)]:<{space}}  {_shown(row.settings[key])}" for row in rows], width)
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    """A setting as it is written on the command line: ``null``, ``true``, ``[a,b]``."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _names(rows: list[Row], width: int) -> dict[int, str]:
    """A name of at most ``width`` for each row, by its id; with numbers where two would be the same."""
    names = [_shortened(row.name, width) for row in rows]
    if len(set(names)) < len(names):
        names = [f"{n} {_shortened(row.name, width - len(f'{n} '))}" for n, row in enumerate(rows, start=1)]
    return {id(row): name for row, name in zip(rows, names)}


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width - width // 2) :]}"


def _wrapped(lines: list[str], width: int) -> list[str]:
    wrapper = textwrap.TextWrapper(width, subsequent_indent="    ", break_on_hyphens=False)
    return [part for line in lines for part in wrapper.wrap(line) or [""]]


def tables(rows: list[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of two tables: results, and differences from the first run."""
    columns = [(direction, name) for direction in DIRECTIONS for name in METRICS]
    heads = [f"{direction} {name}" for direction, name in columns]
    keys = list(rows[0].settings)
    results = []
    for row in rows:
        numbers = [_with_interval(row, column) for column in columns]
        results.append([row.name, *(_shown(row.settings[key]) for key in keys), *numbers, row.labels])
    found = [("Results", ["run", *keys, *heads, "labels"], results)]
    if len(rows) > 1:
        title = f"Differences from {rows[0].name} (95 % interval: paired bootstrap over videos)"
        differences = [
            [row.name, *(row.differences.get(one, "-") for one in columns)]
            if not row.not_compared
            else [row.name, f"not compared: {row.not_compared}", *[""] * (len(columns) - 1)]
            for row in rows[1:]
        ]
        found.append((title, ["run", *heads], differences))
    return found


def _with_interval(row: Row, column: tuple[str, str]) -> str:
    interval = row.intervals.get(column)
    return row.scores.get(column, "-") + (f" ({interval})" if interval else "")


def markdown(rows: list[Row]) -> str:
    """All metrics as markdown tables."""
    parts = []
    for title, header, cells in tables(rows):
        lines = [[one.replace("|", "\\|") for one in line] for line in (header, *cells)]
        lines.insert(1, ["---"] * len(header))
        parts.append(f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python launch/compare.py"), description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or one directory that holds them")
    parser.add_argument("--out", type=Path, help="directory; write comparison.md with all metrics there")
    parser.add_argument("--html", type=Path, help="file; write a page with all metrics")
    arguments = parser.parse_args()
    runs = arguments.runs
    if len(runs) == 1 and not (runs[0] / "config.yaml").is_file():
        runs = sorted(path.parent for path in runs[0].glob("*/config.yaml"))
    if not runs:
        raise UserError(f"there is no run in {arguments.runs[0]}")
    rows = compare(runs)
    print(terminal(rows, shutil.get_terminal_size((100, 24)).columns), end="")
    if arguments.out:
        write_text(writable_dir(arguments.out) / "comparison.md", markdown(rows))
    if arguments.html:
        from tmass_dist.pages import render_page

        writable_dir(arguments.html.parent)
        if arguments.html.is_dir():
            raise UserError(f"--html {arguments.html} is a directory; name a file in it")
        write_text(arguments.html, render_page("compare.html", tables=tables(rows)))


if __name__ == "__main__":
    run_command(main)
