"""Where one step's time goes. A GPU's time is read off its own stream, when the step is over: nothing waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PhaseTimer:
    """Gives every moment of a step to one name; between ``stop`` and the next ``start`` it does nothing."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []

    def start(self, name: str) -> None:
        """Time goes to ``name``, from here to the next :meth:`switch`."""
        self._marks = [(name, _now())]

    def switch(self, name: str) -> None:
        """From here on time goes to ``name``."""
        if self._marks:
            self._marks.append((name, _now()))

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """The block's time goes to ``name``, what follows to whatever it went to before."""
        before = self._marks[-1][0] if self._marks else ""
        self.switch(name)
        yield
        self.switch(before)

    def stop(self) -> dict[str, float]:
        """Seconds of each name since ``start``; waits for the GPU."""
        found: dict[str, float] = {}
        ends = [when for _, when in self._marks[1:]] + [_now()]
        if torch.cuda.is_available():
            ends[-1].synchronize()
        for (name, begin), end in zip(self._marks, ends):
            seconds = begin.elapsed_time(end) / 1e3 if torch.cuda.is_available() else end - begin
            found[name] = found.get(name, 0.0) + seconds
        self._marks = []
        return found


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


PHASE_TIMER = PhaseTimer()
"""The one of this process: the towers, the loss, the collectives and the training loop set it."""
