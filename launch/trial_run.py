"""The run of one trial of a search: on this machine a process, on SLURM a job."""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import sys
from pathlib import Path

from launch import slurm
from launch.failures import FINAL_ERROR, STOPPED, USER_ERROR
from launch.job import end_with_parent
from launch.resources import Resources, local_gpus
from launch.submitted import jobs_of
from tmass_dist.cli import read_json, write_json
from tmass_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class TrialRun:
    """The run of a trial, which an earlier driver of the search may have started.

    Args:
        run_dir: its run directory; its log lies beside it.
        slot: which of the places for trials side by side it has; on this machine the place decides the GPUs.
        resources: of the run.
        job_name: by which the job is found if the driver died before it had the job's number.
    """

    def __init__(self, run_dir: Path, slot: int, resources: Resources, job_name: str) -> None:
        self.run_dir, self.slot, self.resources, self.job_name = run_dir, slot, resources, job_name
        self.is_local = resources.cluster == "local"
        self.process: subprocess.Popen[str] | None = None
        """The submission: on this machine it lasts as long as the run."""

    @property
    def log(self) -> Path:
        """What the submission prints."""
        return self.run_dir.with_suffix(".log")

    def is_complete(self) -> bool:
        """Whether the training has reached its end."""
        return (self.run_dir / "complete.json").is_file()

    def is_alive(self, *, was_started: bool) -> bool:
        """Whether the run works or waits.

        Args:
            was_started: whether this or an earlier driver has started it.
        """
        if self.process is not None and self.process.poll() is None:
            return True
        if self.is_local:
            return _is_locked(self.run_dir) or _has_local_process(self.run_dir)
        if was_started:
            self._adopt_job()
        return any(slurm.is_alive(slurm.slurm_state(job["id"])) for job in jobs_of(self.run_dir))

    def start(self, command: list[str]) -> None:
        """Submit the run, or resume it.

        Args:
            command: arguments of ``launch/submit.py``.
        """
        if not self.is_local:
            command = ["--name", self.job_name, *command]
        environment = dict(os.environ)
        if self.is_local and self.resources.gpus:
            first = self.slot * self.resources.gpus
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(local_gpus()[first : first + self.resources.gpus])
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "launch" / "submit.py"), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
                # A local run saves and ends with its driver. A SLURM job goes on, and the next driver finds it.
                preexec_fn=end_with_parent(signal.SIGTERM if self.is_local else signal.SIGKILL),
            )

    def final_error(self) -> str | None:
        """Why a run that has ended will never be complete; None if it may be started again.

        Raises:
            UserError: it could not be submitted.
        """
        if self.process is not None and self.process.returncode == USER_ERROR:
            if self.is_local:
                return self.last_line()
            raise UserError(f"{self.run_dir.name} was not submitted: {self.last_line()}")
        jobs = [] if self.is_local else jobs_of(self.run_dir)
        if not jobs:
            return None
        for path in (self.run_dir / "jobs").glob(f"{FINAL_ERROR}-*.txt"):
            return path.read_text(encoding="utf-8").strip().removeprefix("error: ")
        return "its job was cancelled" if "CANCELLED" in {slurm.slurm_state(job["id"]) for job in jobs} else None

    def has_failed(self) -> bool:
        """Whether a run that has ended did so by a failure: a stop on request is none."""
        if not self.is_local and jobs_of(self.run_dir):
            return True
        return self.process is not None and self.process.returncode not in (0, STOPPED)

    def stop(self) -> None:
        """Ask the run to stop. A local one has ended then."""
        if self.is_local:
            self.end_process()
        elif self.is_alive(was_started=True):
            subprocess.run(["scancel", *(job["id"] for job in jobs_of(self.run_dir))], capture_output=True)

    def terminate(self) -> None:
        """Ask the process of a local run to save and end. A SLURM job goes on."""
        if self.is_local and self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def end_process(self) -> None:
        """Wait for the submission; a run that is not complete is asked to stop before."""
        if self.process is not None and self.process.poll() is None:
            if not self.is_complete():
                self.process.terminate()
            self.process.wait()

    def last_line(self) -> str:
        """The last line of the log, without ``error: ``."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), "it says nothing")

    def _adopt_job(self) -> None:
        """Record the run's job if SLURM has one that ``jobs.json`` lacks."""
        if jobs_of(self.run_dir):
            return
        command = ["squeue", "--noheader", "--user", getpass.getuser(), "--name", self.job_name]
        answer = subprocess.run([*command, "--format=%A"], capture_output=True, text=True, timeout=60)
        ids = answer.stdout.split()
        if ids:
            job = {"step": "train", "id": ids[0], "tasks": "1"}
            write_json(self.run_dir / "jobs" / "jobs.json", {"name": self.job_name, "jobs": [job]})


def _is_locked(run_dir: Path) -> bool:
    """Whether a process trains in the directory."""
    from filelock import FileLock, Timeout

    if not (run_dir / ".lock").exists():
        return False
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def _has_local_process(run_dir: Path) -> bool:
    """Whether the process of the last local submission lives."""
    state = read_json(run_dir / "jobs" / "local.json", dict) or {}
    path = Path("/proc", str(state.get("pid", "none")), "cmdline")
    try:
        return state.get("state") == "RUNNING" and str(run_dir).encode() in path.read_bytes()
    except OSError:
        return False
