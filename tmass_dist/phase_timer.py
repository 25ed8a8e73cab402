"""Time spent in each phase of a step. On a GPU it is measured by events, which are read when the step is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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

    def stop(self) -> Callable[[], dict[str, float]]:
        """End the measurement. The result gives the seconds of each phase; calling it waits for the GPU."""
        marks, end = self._marks, _now()
        self._marks = []

        def phase_seconds() -> dict[str, float]:
            seconds: dict[str, float] = {}
            if torch.cuda.is_available():
                end.synchronize()
            for (name, begin), next_mark in zip(marks, [*(mark for _, mark in marks[1:]), end]):
                elapsed = begin.elapsed_time(next_mark) / 1e3 if torch.cuda.is_available() else next_mark - begin
                seconds[name] = seconds.get(name, 0.0) + elapsed
            return seconds

        return phase_seconds


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


PHASE_TIMER = PhaseTimer()
"""The timer of this process, set by the towers, the loss, the collectives and the training loop."""
