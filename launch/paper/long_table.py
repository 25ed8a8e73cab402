"""The table of the long comparison, from its results."""

from __future__ import annotations

from typing import Any

import numpy as np

from launch.paper.long_runs import (
    COMPARED,
    Rates,
    Setting,
    best_rates,
    measured_rates,
    next_rates,
    rates_of,
    setting_of,
)
from launch.paper.measure import gain_interval, mean_and_deviation
from launch.paper.systems import SYSTEMS

BASELINES = ("best frame", "query scoring")


def long_table(done: list[dict[str, Any]]) -> str:
    """Markdown: a table for each setting, with the gain of each system over X-Pool on the seeds that both have."""
    return "\n\n".join(_table(done, setting) for setting in sorted({setting_of(row) for row in done})) or "no results"


def _table(done: list[dict[str, Any]], setting: Setting) -> str:
    by_rate = measured_rates(done, setting)
    rows = [row for row in done if setting_of(row) == setting]
    best = {name: _seeds(rows, name, best_rates(by_rate[name])) if name in by_rate else {} for name in COMPARED}
    reference = best[COMPARED[0]]
    columns = [
        "system",
        "learning rate (factor)",
        "seeds",
        "R@1 of each seed",
        "R@1",
        "gain over X-Pool",
        "95 %",
        "seeds in the gain",
        "step of the best validation",
    ]
    columns += [f"{name} of its towers" for name in BASELINES]
    tower = "image tower trained (bfloat16)" if setting.image_tower == "trained" else "image tower frozen"
    lines = [
        f"**{setting.videos} training videos, {setting.steps} steps, {tower}** (text to video, 240 videos, "
        "1,440 captions, protocol query_conditioned, M = 20 where samples are drawn, checkpoint selected on "
        "validation, no post-processing)",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for name in COMPARED:
        if not best[name]:
            continue
        recalls = [row["t2v"]["R@1"] for row in best[name].values()]
        shared = [seed for seed in best[name] if seed in reference]
        gain = ["", "", ""]
        if name != COMPARED[0] and shared:
            gain_SV = np.stack([_hits(best[name][seed]) - _hits(reference[seed]) for seed in shared])
            weights_V = np.full(gain_SV.shape[1], 6)
            low, high = gain_interval(gain_SV, weights_V)
            each = (100 * gain_SV.sum(axis=1) / weights_V.sum()).tolist()
            gain = [_signed(each), f"{low:+.1f} to {high:+.1f}", str(len(shared))]
        chosen = best_rates(by_rate[name])
        rate = f"{chosen} of {', '.join(map(str, sorted(by_rate[name])))}"
        if next_rates(by_rate[name], chosen.head):
            rate += " (edge)"
        cells = [SYSTEMS[name].title, rate, str(len(recalls)), ", ".join(f"{r:.1f}" for r in recalls)]
        cells += [mean_and_deviation(recalls), *gain]
        cells.append(", ".join(str(row["selected_step"]) for row in best[name].values()))
        for baseline in BASELINES:
            values = [
                v for row in best[name].values() for key, v in row["baselines"].items() if key.startswith(baseline)
            ]
            cells.append(mean_and_deviation(values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seeds(rows: list[dict[str, Any]], system: str, rates: Rates) -> dict[int, dict[str, Any]]:
    found = {row["seed"]: row for row in rows if row["system"] == system and rates_of(row) == rates}
    return dict(sorted(found.items()))


def _hits(row: dict[str, Any]) -> np.ndarray:
    return np.array([int(digit) for digit in row["hits"]["result"]], float)


def _signed(values: list[float]) -> str:
    text = mean_and_deviation(values)
    return text if text.startswith("-") else f"+{text}"


def calibration_table(done: list[dict[str, Any]]) -> str:
    """Markdown: how well each signal of a search tells the queries that succeed, for the runs that say so.

    A cell has the mean AUROC over the seeds, and on how many of them the 95 % interval (over videos) is above and below
    one half.
    """
    rows = [row for row in done if row.get("calibration")]
    if not rows:
        return "no calibration"
    signals = list(dict.fromkeys(name for row in rows for name in row["calibration"]))
    lines = [f"| setting | system | seeds | {' | '.join(signals)} |", f"|{'---|' * (3 + len(signals))}"]
    for setting in sorted({setting_of(row) for row in rows}):
        of_setting = [row for row in rows if setting_of(row) == setting]
        by_rate = measured_rates(of_setting, setting)
        for name in [name for name in COMPARED if name in by_rate]:
            runs = list(_seeds(of_setting, name, best_rates(by_rate[name])).values())
            where = f"{setting.image_tower}, {setting.videos} videos, {setting.steps} steps"
            cells = [where, SYSTEMS[name].title, str(len(runs))]
            lines.append(f"| {' | '.join(cells + [_auroc(runs, signal) for signal in signals])} |")
    return "\n".join(lines)


def _auroc(runs: list[dict[str, Any]], signal: str) -> str:
    found = [row["calibration"][signal] for row in runs if signal in row["calibration"]]
    if not found:
        return ""
    mean = sum(one["auroc"] for one in found) / len(found)
    above, below = (
        sum(one["interval_95"][0] > 0.5 for one in found),
        sum(one["interval_95"][1] < 0.5 for one in found),
    )
    return f"{mean:.2f} (above on {above}, below on {below})"
