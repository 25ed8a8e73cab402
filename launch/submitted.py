"""What a submission left in its directory, for status, cancel and the next submission.

``jobs/jobs.json`` lists the SLURM jobs; ``jobs/local.json`` is the state of the last local job.
"""

from __future__ import annotations

import os
from pathlib import Path

from launch import slurm
from tmass_dist.cli import read_object, write_json
from tmass_dist.errors import UserError


def jobs_of(run: Path) -> list[dict[str, str]]:
    """SLURM jobs of the last submission, in order: ``step``, ``id``, ``tasks``; empty where there was none.

    Raises:
        UserError: the list is damaged.
    """
    path = run / "jobs" / "jobs.json"
    if not path.is_file():
        return []
    remedy = "look for its jobs with squeue, then remove the file"
    jobs = read_object(path, {"jobs": list}, remedy)["jobs"]
    if not all(isinstance(job, dict) and {"step", "id"} <= job.keys() for job in jobs):
        raise UserError(f"{path} is damaged: a job has no step or no id; {remedy}")
    return jobs


def write_local_state(run: Path, job_id: str, state: str, message: str = "") -> None:
    """Record where a local job stands: RUNNING, COMPLETED, STOPPED or FAILED, and its last message."""
    state_file = run / "jobs" / "local.json"
    write_json(state_file, {"id": job_id, "state": state, "pid": os.getpid(), "message": message})


def local_state(run: Path) -> str | None:
    """One line on the last local job of a run; None where there was none.

    Raises:
        UserError: the file that says so is damaged.
    """
    path = run / "jobs" / "local.json"
    if not path.is_file():
        return None
    keys = {"id": str, "state": str, "pid": int, "message": str}
    job = read_object(path, keys, "the next submission writes it again")
    if job["state"] == "RUNNING" and not Path("/proc", str(job["pid"])).is_dir():
        return f"{job['id']}: ended without a message (killed?); the same command resumes"
    return f"{job['id']}: {job['state']}" + (f": {job['message']}" if job["message"] else "")


def live_job(run: Path) -> tuple[str, str] | None:
    """Id and state of a SLURM job that writes to this directory and still runs or waits."""
    for job in jobs_of(run):
        state = slurm.slurm_state(job["id"])
        if slurm.is_alive(state):
            return job["id"], state
    return None


def refuse_live(run: Path) -> None:
    """Raises: UserError: a job that still runs or waits, or a process of this machine, writes to this directory."""
    live = live_job(run)
    if live is not None:
        raise UserError(f"{run} is in use by job {live[0]} ({live[1]}); cancel it, or use another run_dir")
    if (run / ".lock").exists():
        from tmass_dist.training.run_lock import RunLock

        with RunLock(run):  # now, and not by a job that would first replace the state of the other one
            pass
