"""``engine.profile_steps``: a trace of some steps by torch's profiler, and on a GPU a memory snapshot."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

MEMORY_EVENTS = 200_000
"""Largest number of allocations and releases that the memory snapshot holds."""


class StepProfiler:
    """Rank 0 records the steps ``first`` to ``last`` to ``<run>/profile/``; other ranks have no profiler.

    Args:
        run_dir: of the run.
        steps: first and last step, counted from 1.
        log: of the run.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, int], log: logging.Logger) -> None:
        self.directory, self.log = run_dir / "profile", log
        self.first, self.last = steps
        self._profiler: Any = None
        self._marker: Any = None

    def begin_step(self, step: int) -> None:
        """Start to record if ``step``, which is about to begin, is in the range. A resumed run records what is left."""
        if self._profiler is None and self.first <= step <= self.last:
            self.first = step
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize()  # the work of earlier steps
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._profiler = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
            self._profiler.start()
        if self._profiler is not None:
            self._end_marker()
            self._marker = torch.profiler.record_function(f"step {step}")
            self._marker.__enter__()

    def _end_marker(self) -> None:
        """End the bar of the last step in the trace."""
        if self._marker is not None:
            self._marker.__exit__(None, None, None)
            self._marker = None

    def end_step(self, step: int) -> bool:
        """Write the files if ``step``, which was just started on the device, is the last of the range.

        Returns:
            Whether they were written, which takes seconds.
        """
        if self._profiler is None or step < self.last:
            return False
        self.close(step)
        return True

    def close(self, step: int) -> None:
        """Write what was recorded up to ``step``; does nothing if nothing is being recorded."""
        if self._profiler is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._end_marker()
        self._profiler.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self.first}-{step}"
        trace = self.directory / f"{name}.trace.json.gz"
        self._profiler.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60)
        (self.directory / f"{name}.operators.txt").write_text(table, encoding="utf-8")
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.directory / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler = None
        self.log.info("profile of steps %d to %d: %s", self.first, step, trace)
