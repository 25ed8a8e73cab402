"""Cancel the SLURM jobs of a run: ``python launch/cancel.py RUN``. Its last complete checkpoint is kept."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import slurm  # noqa: E402
from launch.submitted import jobs_of  # noqa: E402
from tmass_dist.cli import program, run_command  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python launch/cancel.py"), description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    arguments = parser.parse_args()
    jobs = jobs_of(arguments.run)
    if not jobs:
        raise UserError(f"{arguments.run} has no SLURM job")
    states = {job["id"]: slurm.slurm_state(job["id"]) for job in jobs}
    alive = [job_id for job_id, state in states.items() if slurm.is_alive(state)]
    if not alive:
        raise UserError(f"job {jobs[-1]['id']} does not run or wait: {states[jobs[-1]['id']]}")
    answer = subprocess.run(["scancel", *alive], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"scancel: {answer.stderr.strip()}")
    print(f"cancelled: job {', '.join(alive)}; the same submit command resumes from the last checkpoint")


if __name__ == "__main__":
    run_command(main)
