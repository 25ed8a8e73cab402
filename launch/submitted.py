"""What a submission left in its directory: ``jobs/jobs.json``, read by status, cancel and the next submission."""

from __future__ import annotations

import json
from pathlib import Path

from launch import cluster
from tmass_dist.errors import UserError


def jobs_of(run: Path) -> list[dict[str, str]]:
    """SLURM jobs of the last submission, in order: ``step``, ``id``, ``tasks``; empty where there was none."""
    record = run / "jobs" / "jobs.json"
    return json.loads(record.read_text(encoding="utf-8"))["jobs"] if record.is_file() else []


def live_job(run: Path) -> tuple[str, str] | None:
    """Id and state of a job that still runs or waits and writes to this directory."""
    for job in jobs_of(run):
        state = cluster.slurm_state(job["id"])
        if cluster.is_alive(state):
            return job["id"], state
    return None


def refuse_live(run: Path) -> None:
    """Raises: UserError: a job that still runs or waits writes to this directory."""
    live = live_job(run)
    if live is not None:
        raise UserError(f"{run} is in use by job {live[0]} ({live[1]}); cancel it, or take another run_dir")
