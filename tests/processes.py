"""Processes that end at a chosen moment or should have ended, so that no test depends on the machine's speed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests import forked
from tests.conftest import ROOT

PATIENCE_S = 120.0
"""Limit of each wait. Seconds are usual; a busy machine takes more."""

KILL_TRAINING = """
import os, signal
from tmass_dist.train import main, run_command
from tmass_dist.training import checkpoint, loop

begin, step_inputs = checkpoint.Saver.begin, loop.step_inputs

def begin_and_write(self, step):
    begin(self, step)
    self._thread.join()  # the checkpoint is then complete when the next step is

def inputs_or_kill(batch, step, *more):
    if step == {steps}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step_inputs(batch, step, *more)

checkpoint.Saver.begin, loop.step_inputs = begin_and_write, inputs_or_kill
run_command(main)
"""


def run_and_be_killed(code: str, arguments: list[str], folder: Path, **environment: str) -> None:
    """Run Python ``code``, which must end its process with SIGKILL; its stderr is appended to ``folder/stderr``."""
    process = forked.start(
        "-c",
        code,
        *arguments,
        environment=os.environ | environment,
        cwd=ROOT,
        stdout=Path(os.devnull),
        stderr=folder / "stderr",
    )
    process.join(2 * PATIENCE_S)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == -signal.SIGKILL, (folder / "stderr").read_text()


def train_and_be_killed(steps: int, arguments: list[str], folder: Path, **environment: str) -> None:
    """``tmass train`` with ``arguments``, killed after ``steps`` steps, as the next one begins."""
    run_and_be_killed(KILL_TRAINING.format(steps=steps), arguments, folder, **environment)


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
    """Wait until ``condition()`` is true.

    Raises:
        AssertionError: it was not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s"
        time.sleep(0.05)


def processes_with(variable: str, value: str) -> list[int]:
    """Processes that have this environment variable, apart from the one of the test."""
    pids = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(variable) == value and process.pid != os.getpid():
                pids.append(process.pid)
    return pids
