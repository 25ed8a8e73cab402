"""The end of the script of a SLURM job: when the job is queued again, and after which pause.

Bash runs the script that sbatch would get; programs that write down their arguments stand for SLURM's own.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from launch.failures import FINAL_ERROR, STOPPED
from tests.conftest import run

PROGRAMS = {
    "srun": "exit $EXIT_CODE",
    "squeue": "echo $STATE",
    "scontrol": 'echo "$@" >> "$CALLS"',
    "sleep": 'echo "sleep $@" >> "$CALLS"',
}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a job which may be queued again 9 times, after 30 s for the first time; it lies in its run directory."""
    folder = tmp_path_factory.mktemp("script")
    options = ["--dry-run", "--gpus", "0", "--procs", "1", "--requeues", "9", "--requeue-pause", "30"]
    done = run("launch/submit.py", "--config", "demo.yaml", *options, f"run_dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    [text] = re.findall(r"^#!/bin/bash\n.*?^exit \$rc$", done.stdout, re.M | re.S)
    root = re.findall(r"^cd (.+)$", text, re.M)[-1]
    (folder / "job.sh").write_text(text.replace(f"\ncd {root}\n", f"\ncd {folder}\n"))
    for name, content in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{content}\n")
        (folder / name).chmod(0o755)
    return folder / "job.sh"


def _end(script: Path, exit_code: int, restarts: int = 0, state: str = "RUNNING") -> tuple[int, list[str]]:
    """The script's exit code, and how it called SLURM."""
    calls = script.with_name("calls")
    calls.write_text("")
    environment = {
        "PATH": f"{script.parent}:{os.environ['PATH']}",
        "EXIT_CODE": str(exit_code),
        "STATE": state,
        "CALLS": str(calls),
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(["bash", str(script)], env=os.environ | environment, capture_output=True, timeout=60)
    return done.returncode, calls.read_text().splitlines()


def test_pauses_grow_up_to_a_quarter_of_an_hour(script: Path) -> None:
    for restarts, pause in enumerate([30, 120, 480, 900, 900, 900, 900, 900, 900]):
        update = f"update JobId=7 StartTime=now+{pause}"
        assert _end(script, 1, restarts) == (1, ["requeue 7", update])
    assert _end(script, 1, 9) == (1, []), "it was queued again 9 times"


def test_a_job_that_was_asked_to_stop_waits_for_no_pause(script: Path) -> None:
    assert _end(script, STOPPED, 5) == (STOPPED, ["requeue 7", "sleep 60"])


def test_a_job_that_is_done_cancelled_or_failed_for_good_is_not_queued_again(script: Path) -> None:
    assert _end(script, 0) == (0, [])
    assert _end(script, 1, state="CANCELLED") == (1, [])
    [folder] = set(re.findall(rf"\S+(?=/{FINAL_ERROR}-)", script.read_text()))
    Path(folder).mkdir(parents=True)
    (Path(folder) / f"{FINAL_ERROR}-7.txt").write_text("error: model.num_heads is 7\n")
    assert _end(script, 2) == (2, [])
    (Path(folder) / f"{FINAL_ERROR}-7.txt").rename(Path(folder) / f"{FINAL_ERROR}-8.txt")  # of another job
    assert _end(script, 2)[1][0] == "requeue 7"
