"""Cancel the SLURM job of a run: ``python launch/cancel.py RUN``. Its last complete checkpoint stays."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import cluster  # noqa: E402
from tmass_dist.cli import run_command  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="python launch/cancel.py", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    arguments = parser.parse_args()
    record = arguments.run / "jobs" / "job.json"
    if not record.is_file():
        raise ValueError(f"{arguments.run} has no SLURM job on record")
    job_id = json.loads(record.read_text(encoding="utf-8"))["job_id"]
    state = cluster.slurm_state(job_id)
    if not cluster.is_alive(state):
        raise ValueError(f"job {job_id} is not alive: {state}")
    done = subprocess.run(["scancel", job_id], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"scancel: {done.stderr.strip()}")
    print(f"job {job_id} is cancelled; the same submit command goes on from its last checkpoint")


if __name__ == "__main__":
    run_command(main)
