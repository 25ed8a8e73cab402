"""Jobs on this machine: how a user error and a failure end, and that no rank outlives ``launch/submit.py``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, run
from tests.processes import until

COMMAND = ["launch/submit.py", "--cluster", "local", "--config", "demo.yaml", "--procs", "2"]


@pytest.fixture
def started(data: list[str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run of two ranks that would take many minutes, after its first step; and its directory."""
    run_dir = tmp_path / "run"
    long = [*data, "max_steps=100000", "epochs=100000", "eval_every=100000", f"run_dir={run_dir}"]
    with (tmp_path / "console").open("w") as console:
        process = subprocess.Popen(
            [sys.executable, *COMMAND, *long], cwd=ROOT, stdout=console, stderr=console, text=True
        )
    try:
        log = run_dir / "train.log"
        until(lambda: log.is_file() and "step 2/" in log.read_text(), "step 2", 180)
        yield process, run_dir
    finally:
        process.kill()
        for pid in _processes_of(run_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _processes_of(run_dir: Path) -> list[int]:
    """Ranks, and processes that they started: all have the folder of the job in their command line."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{run_dir}/jobs".encode() in (entry / "cmdline").read_bytes():
                pids.append(int(entry.name))
    return pids


def _shared_memory_of(pids: list[int]) -> set[Path]:
    """Files in ``/dev/shm`` that these processes have mapped."""
    paths = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            paths |= {Path(line.split(maxsplit=5)[-1]) for line in lines if " /dev/shm/" in line}
    return {path for path in paths if path.exists()}


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGKILL,
        *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_no_rank_outlives_the_command(started: tuple[subprocess.Popen[str], Path], number: int) -> None:
    """However the command ends, its ranks save and leave, and nothing is left in memory or beside the run."""
    process, run_dir = started
    ranks = _processes_of(run_dir)
    shared = _shared_memory_of(ranks)
    assert len(ranks) >= 2
    process.send_signal(number)
    until(lambda: not _processes_of(run_dir), "end of the ranks")
    assert process.wait(180) == (-9 if number == signal.SIGKILL else 128 + number)
    assert list((run_dir / "checkpoints").glob("step-*")), "they saved"
    assert not list(run_dir.rglob("*.tmp"))
    left = [path for path in Path("/dev/shm").iterdir() if any(f"_{pid}_" in path.name for pid in ranks)]
    assert not left and not [path for path in shared if path.exists()]
    state = run("launch/status.py", str(run_dir)).stdout
    assert ("killed?" if number == signal.SIGKILL else "STOPPED: the same command resumes") in state


def test_a_second_signal_ends_the_ranks_at_once(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, run_dir = started
    for pid in _processes_of(run_dir):
        os.kill(pid, signal.SIGSTOP)  # they cannot answer the first
    process.send_signal(signal.SIGINT)
    until(lambda: "again: they end at once" in (run_dir.parent / "console").read_text(), "answer")
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 128 + signal.SIGINT and not _processes_of(run_dir)


def test_a_killed_rank_ends_the_run_with_one_line(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, run_dir = started
    [pid] = [pid for pid in _processes_of(run_dir) if b"GLOBALID=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(pid, signal.SIGKILL)
    assert process.wait(200) == 1
    console = (run_dir.parent / "console").read_text()
    errors = [line for line in console.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "rank 1 ended with signal SIGKILL; log: " in errors[0], console
    assert "Traceback" not in console and not _processes_of(run_dir)
    assert "FAILED: rank 1 ended with signal SIGKILL" in run("launch/status.py", str(run_dir)).stdout


def test_a_failure_keeps_its_traceback_in_the_log(data: list[str], tmp_path: Path) -> None:
    """A log that cannot be opened is the machine's failure: one line on the console, the traceback in the log."""
    (tmp_path / "train.log").mkdir()
    done = run(*COMMAND, *data, f"run_dir={tmp_path}")
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "IsADirectoryError" in errors[0] and "Traceback" not in done.stderr, done.stderr
    log = Path(errors[0].rpartition("log: ")[2])
    assert "Traceback (most recent call last)" in log.read_text() and "IsADirectoryError" in log.read_text()
    assert "FAILED: rank 0: IsADirectoryError" in run("launch/status.py", str(tmp_path)).stdout


def test_a_user_error_in_a_rank_is_one_line(data: list[str], tmp_path: Path) -> None:
    done = run(*COMMAND, *data, "model.num_heads=7", f"run_dir={tmp_path}")
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "model.num_heads is 7" in errors[0] and "Traceback" not in done.stderr, done.stderr


def test_a_rank_that_was_given_a_gpu_and_sees_none_ends(data: list[str], tmp_path: Path) -> None:
    """The variable is what a job with GPUs sets for its ranks; no rank trains on the CPU instead."""
    done = run(
        "-m", "tmass_dist.train", "--config", "demo.yaml", *data, f"run_dir={tmp_path}", TMASS_GPUS_PER_NODE="99"
    )
    assert done.returncode != 0 and "the job has 99 GPUs a node, and this rank (local rank 0) sees " in done.stderr
    assert not (tmp_path / "checkpoints").exists()
