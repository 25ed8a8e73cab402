"""States of SLURM jobs, as SLURM itself reports them."""

from __future__ import annotations

import shutil
import subprocess
import time

from tmass_dist.errors import UserError

_ALIVE = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING"}


def require_slurm() -> None:
    """Raises: UserError: this machine cannot submit."""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch on this machine: submit from a SLURM login node, or use --cluster local")


def slurm_state(job_id: str) -> str:
    """State of a job: PENDING, RUNNING, COMPLETED, FAILED, ... or UNKNOWN.

    For an array: the state of a task that is alive, else of one that did not complete.
    """
    if shutil.which("squeue") is None:
        return "UNKNOWN"
    for command in (
        ["squeue", "--noheader", "--states=all", "--jobs", job_id, "--format=%T"],
        ["sacct", "--noheader", "-X", "--parsable2", "--jobs", job_id, "--format=State"],
    ):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        states = [line.split()[0] for line in answer.stdout.splitlines() if line.strip()]
        if answer.returncode == 0 and states:
            alive = [state for state in states if state in _ALIVE]
            incomplete = [state for state in states if state != "COMPLETED"]
            return (alive or incomplete or states)[-1]
    return "UNKNOWN"


def is_alive(state: str) -> bool:
    """Whether a job in this state runs, waits, or will run again."""
    return state in _ALIVE


def wait(job_id: str, poll_s: float = 2.0) -> str:
    """Wait until a job has ended; returns its last state."""
    unknown = 0
    while True:
        state = slurm_state(job_id)
        unknown = unknown + 1 if state == "UNKNOWN" else 0
        # A job that is being requeued shows its last end for a moment.
        if not is_alive(state) and (unknown == 0 or unknown > 10):
            time.sleep(poll_s)
            if not is_alive(slurm_state(job_id)):
                return state
        time.sleep(poll_s)
