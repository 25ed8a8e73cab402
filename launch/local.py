"""A job on this machine: its tasks are child processes of ``launch/submit.py``, and none outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.failures import FAILED, STOPPED, USER_ERROR
from launch.job import end_with_parent
from launch.resources import Resources, local_gpus
from launch.submitted import write_local_state
from tmass_dist.errors import UserError

POLL_S = 0.2
GRACE_S = 60.0
"""Seconds that the tasks have to end by themselves, once one has failed or all were asked to stop."""


@dataclass
class LocalJob:
    """The processes of one task list entry, one for each rank.

    Args:
        id: of the job; its files are named after it.
        folder: of its logs.
        processes: by rank.
    """

    id: str
    folder: Path
    processes: list[subprocess.Popen[bytes]]
    _positions: dict[Path, int] = field(default_factory=dict)
    _in_traceback: bool = False

    def log(self, rank: int) -> Path:
        """What a rank wrote to stderr."""
        return self.folder / f"{self.id}_{rank}_log.err"

    def show(self) -> None:
        """Print what rank 0 has written since the last call, without tracebacks and submitit's own lines."""
        for path, stream in ((self.log(0).with_suffix(".out"), sys.stdout), (self.log(0), sys.stderr)):
            if not path.is_file():
                continue
            with path.open("rb") as log:
                log.seek(self._positions.get(path, 0))
                new = log.read()
            self._positions[path] = self._positions.get(path, 0) + len(new)
            for line in new.decode("utf-8", "replace").splitlines(keepends=True):
                self._in_traceback = self._in_traceback or line.startswith("Traceback (most recent call last)")
                if line.startswith("error: "):  # repeated at the end, with the name of the log
                    self._in_traceback = False
                elif not self._in_traceback and "submitit" not in line:
                    stream.write(line)
            stream.flush()

    def signal(self, number: int) -> None:
        """Send a signal to every task; SIGKILL also to the processes that it has started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                elif process.poll() is None:
                    process.send_signal(number)

    def last_words(self) -> tuple[int, str]:
        """Exit code and message of the task that failed first: a user error before any other, the lost peers last."""
        failed = []
        for rank, process in enumerate(self.processes):
            if process.returncode not in (0, STOPPED):
                lines = self.log(rank).read_text("utf-8", "replace").splitlines() if self.log(rank).is_file() else []
                errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
                ended = f"rank {rank} ended with {_name_of(process.returncode)}"
                code = USER_ERROR if process.returncode == USER_ERROR else FAILED
                message = errors[-1] if errors else ended
                lost = "is gone or stopped" in message or "failed: " in message
                failed.append((code != USER_ERROR, lost, f"{message}; log: {self.log(rank)}", code))
        _, _, message, code = min(failed)
        return code, message


def run_local(task: Any, resources: Resources, folder: Path, root: Path, job_id: str, base: Path) -> None:
    """Run one task list entry to its end and show rank 0's output.

    SIGTERM, SIGHUP and Ctrl-C ask the ranks to save and leave; a second one kills them. If this process is killed, the
    kernel asks the ranks.

    Args:
        task: the entry, a RankedJob or a CommandJob.
        resources: how many ranks, GPUs and CPUs.
        folder: of the logs.
        root: of the code.
        job_id: names the job's files.
        base: directory of the submission, whose state is kept for ``launch/status.py``.

    Raises:
        UserError: a task ended with one; its message, with the log.
        SystemExit: a failure of the machine (exit code 1), or a signal (128 + its number).
    """
    job = _start(task, resources, folder, root, job_id)
    received: list[int] = []

    def ask(number: int, _: Any) -> None:
        received.append(number)
        if len(received) == 1:
            print("\nstopping: the ranks save and leave (again: they end at once)", file=sys.stderr, flush=True)
        job.signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    write_local_state(base, job_id, "RUNNING")
    deadline = None
    try:
        while any(process.poll() is None for process in job.processes):
            job.show()
            if deadline is None and (received or any(p.returncode for p in job.processes)):
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                job.signal(signal.SIGKILL)
            time.sleep(POLL_S)
        job.show()
    finally:
        job.signal(signal.SIGKILL)  # processes that a rank has left behind
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        write_local_state(base, job_id, "STOPPED", "the same command resumes")
        raise SystemExit(128 + received[0])
    if any(process.returncode for process in job.processes):
        if all(process.returncode in (0, STOPPED) for process in job.processes):
            write_local_state(base, job_id, "STOPPED", "the same command resumes")
            raise SystemExit(STOPPED)
        code, message = job.last_words()
        write_local_state(base, job_id, "FAILED", message)
        if code == USER_ERROR:
            raise UserError(message)
        print(f"\nerror: {message}", file=sys.stderr, flush=True)
        raise SystemExit(code)
    write_local_state(base, job_id, "COMPLETED")


def _start(task: Any, resources: Resources, folder: Path, root: Path, job_id: str) -> LocalJob:
    from submitit.core.utils import DelayedSubmission, JobPaths

    DelayedSubmission(task).dump(JobPaths(folder, job_id).submitted_pickle)
    common = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": str(resources.cpus),
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": job_id,
        "SUBMITIT_LOCAL_NTASKS": str(resources.tasks),
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "CUDA_VISIBLE_DEVICES": ",".join(local_gpus()[: resources.gpus]),
        "TMASS_GPUS_PER_NODE": str(resources.gpus),
    }
    processes = []
    for rank in range(resources.tasks):
        paths = JobPaths(folder, job_id, rank)
        ranked = {"SUBMITIT_LOCAL_GLOBALID": str(rank), "SUBMITIT_LOCAL_LOCALID": str(rank)}
        with paths.stdout.open("ab") as out, paths.stderr.open("ab") as err:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", "-m", "submitit.core._submit", str(folder)],
                    env=os.environ | common | ranked,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,  # Ctrl-C in a terminal reaches this process only
                    preexec_fn=end_with_parent(signal.SIGTERM),
                )
            )
    return LocalJob(job_id, folder, processes)


def _name_of(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
