"""How a task of a job ends when it fails, and whether the job is queued again.

A :class:`~tmass_dist.errors.UserError` is final. Everything else is a failure of a machine: the job is queued again,
unless it has failed three times in a row at the same step with the same message.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from tmass_dist.errors import MachineError, PeerLostError, UserError

STOPPED = 85
"""Exit code of a task that stopped on request and saved; the job is queued again without a pause."""
USER_ERROR, FAILED = 2, 1
"""Exit codes of the two kinds of failure."""
FINAL_ERROR = "final-error"
"""``final-error-JOB.txt`` beside the job's logs: the job is not queued again. A new submission removes it."""
MOST_ALIKE = 3
"""Failures in a row at the same step with the same message after which the job is not queued again."""

_STEP = re.compile(r"step (\d+)/")
_SECONDS = re.compile(r"\b[\d.]+ s\b")
"""Durations in a message, which differ between failures that are alike otherwise."""


def end_task(
    error: BaseException, *, folder: Path, job_id: str, restarts: int, name: str, run: Path | None
) -> NoReturn:
    """Report ``error`` and end this process; never returns.

    The traceback of a machine's failure goes to the log, and the last line of the log is ``error: ...``. The process
    ends at once, since threads of a broken collective may never end.

    Args:
        error: what ended the task.
        folder: of the job's logs and notes.
        job_id: of the job, as its files are named.
        restarts: how often the job was started before.
        name: of the task, as ``rank 3``.
        run: directory of the run, whose log says the step; None for a task without steps.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError):
        finish_for_good(folder, job_id, f"{name}: {message}")
    if not isinstance(error, MachineError):
        message = f"{type(error).__name__}: {message}"
    if not isinstance(error, PeerLostError):
        traceback.print_exception(error)
    fail(message, folder=folder, job_id=job_id, restarts=restarts, name=name, step=last_step(run) if run else 0)


def fail(message: str, *, folder: Path, job_id: str, restarts: int, name: str, step: int = 0) -> NoReturn:
    """End this process after a failure of a machine; the job is queued again unless it fails alike too often."""
    alike = _count_alike(folder / f"failures-{job_id}.jsonl", name, restarts, step, message)
    line = f"{name}: {message}" if name else message
    if alike >= MOST_ALIKE:
        at = f" at step {step}" if step else ""
        finish_for_good(folder, job_id, f"{line} ({alike} times in a row{at}: not queued again)", FAILED)
    print(f"\nerror: {line}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def finish_for_good(folder: Path, job_id: str, line: str, code: int = USER_ERROR) -> NoReturn:
    """End this process and its job with one line; never returns."""
    print(f"\nerror: {line}", file=sys.stderr, flush=True)
    (folder / f"{FINAL_ERROR}-{job_id}.txt").write_text(f"error: {line}\n", encoding="utf-8")
    os._exit(code)


def last_step(run: Path) -> int:
    """Last step in a run's log, from 1; 0 where there is none."""
    log = run / "train.log"
    steps = _STEP.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    return int(steps[-1]) if steps else 0


def _count_alike(path: Path, name: str, restarts: int, step: int, message: str) -> int:
    """Record a failure; returns how many starts in a row ended with this one, itself included."""
    failure = {"time": time.strftime("%F %T"), "task": name, "restart": restarts, "step": step, "message": message}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(failure, ensure_ascii=False) + "\n")
    by_start: dict[int, list[tuple[int, str]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            past = json.loads(line)
            by_start.setdefault(past["restart"], []).append((past["step"], _SECONDS.sub("", past["message"])))
        except (ValueError, KeyError, TypeError):
            continue  # an incomplete line: its writer was killed
    alike = 0
    while (step, _SECONDS.sub("", message)) in by_start.get(restarts - alike, []):
        alike += 1
    return alike
