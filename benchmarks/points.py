"""What the groups of ``benchmarks/scale.py`` share: a point in a process of its own, its memory, the lines."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a new interpreter, so that one point's memory does not count for the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def reset_peak() -> float:
    """Let the peak of resident memory start anew; returns it, MB. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_peak_mb()


def resident_peak_mb() -> float:
    """The most resident memory of this process since the peak was reset, MB; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def say(name: str, value: float, unit: str, n: int, reference: str, ratio: float) -> None:
    """Print one line; ``ratio`` above 1 is better than the reference."""
    line = {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "n": n}
    print(json.dumps(line | {"reference": reference, "ratio": float(f"{ratio:.3g}")}), flush=True)


def say_growth(name: str, points: dict[int, float], start: int, limit: float = 1.1) -> None:
    """Print the exponent of the growth from ``start`` to the largest n: 1 is linear, 2 quadratic."""
    end = max(points)
    exponent = math.log(points[end] / points[start]) / math.log(end / start)
    reference = f"at most {limit:g}" + (" (linear)" if limit == 1.1 else "")
    line = {"name": f"{name}-growth", "value": round(exponent, 3), "unit": f"exponent, n from {start}", "n": end}
    print(json.dumps(line | {"reference": reference, "ratio": round(limit / max(exponent, 0.01), 3)}), flush=True)
