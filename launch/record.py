"""What a submission left in its directory: ``jobs/jobs.json``, read by status, cancel and the next submission."""

from __future__ import annotations

import json
from pathlib import Path

from launch import cluster


def jobs_of(run: Path) -> list[dict[str, str]]:
    """SLURM jobs of the last submission, in order: ``step``, ``id``, ``tasks``; empty where there was none."""
    record = run / "jobs" / "jobs.json"
    return json.loads(record.read_text(encoding="utf-8"))["jobs"] if record.is_file() else []


def refuse_live(run: Path) -> None:
    """Raises: ValueError: a job that still runs or waits writes to this directory."""
    for job in jobs_of(run):
        state = cluster.slurm_state(job["id"])
        if cluster.is_alive(state):
            raise ValueError(f"{run} is in use by job {job['id']} ({state}); cancel it, or take another run_dir")
