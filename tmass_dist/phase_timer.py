"""Time spent in each phase of a step. On a GPU it is measured by events, which are read when the step is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PhaseTimer:
    """Assigns the time between ``start`` and ``stop`` to named phases; at other times it does nothing."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []

    def start(self, name: str) -> None:
        """Begin to measure, in phase ``name``."""
        self._marks = [(name, _now())]

    def switch(self, name: str) -> None:
        """End the current phase and begin ``name``."""
        if self._marks:
            self._marks.append((name, _now()))

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Assign the block to phase ``name``, and what follows to the phase before it."""
        before = self._marks[-1][0] if self._marks else ""
        self.switch(name)
        yield
        self.switch(before)

    def stop(self) -> dict[str, float]:
        """Seconds of each phase since ``start``; waits for the GPU."""
        phase_seconds: dict[str, float] = {}
        ends = [mark for _, mark in self._marks[1:]] + [_now()]
        if torch.cuda.is_available():
            ends[-1].synchronize()
        for (name, begin), end in zip(self._marks, ends):
            seconds = begin.elapsed_time(end) / 1e3 if torch.cuda.is_available() else end - begin
            phase_seconds[name] = phase_seconds.get(name, 0.0) + seconds
        self._marks = []
        return phase_seconds


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


PHASE_TIMER = PhaseTimer()
"""The timer of this process, set by the towers, the loss, the collectives and the training loop."""
