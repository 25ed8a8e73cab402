"""Cancel the SLURM job of a run: ``python launch/cancel.py RUN``. Its last complete checkpoint stays."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import cluster  # noqa: E402
from launch.submitted import jobs_of  # noqa: E402
from tmass_dist.cli import program, run_command  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python launch/cancel.py"), description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    arguments = parser.parse_args()
    jobs = jobs_of(arguments.run)
    if not jobs:
        raise UserError(f"{arguments.run} has no SLURM job on record")
    states = {job["id"]: cluster.slurm_state(job["id"]) for job in jobs}
    alive = [job_id for job_id, state in states.items() if cluster.is_alive(state)]
    if not alive:
        raise UserError(f"job {jobs[-1]['id']} is not alive: {states[jobs[-1]['id']]}")
    done = subprocess.run(["scancel", *alive], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scancel: {done.stderr.strip()}")
    print(f"cancelled: job {', '.join(alive)}; the same submit command goes on from the last checkpoint")


if __name__ == "__main__":
    run_command(main)
