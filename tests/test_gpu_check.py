"""``make gpu-check`` without a GPU: it says so; its parts run on the CPU, small."""

import re
import signal
from pathlib import Path

import pytest
import torch

from tests.conftest import run


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run make gpu-check")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = run("benchmarks/gpu.py", "--out", str(tmp_path / "out.md"))
    assert done.returncode == 0 and done.stdout == "no GPU is at hand: nothing was measured\n"
    assert not (tmp_path / "out.md").exists()


def test_parts_of_one_process_run_on_the_cpu_and_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    done = run("benchmarks/gpu.py", "--device", "cpu", "--small", "--only", "Placement", "Scoring", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    assert text.startswith("## GPU check of 20") and "its figures mean nothing" in text
    assert "systems: loss and gradient norm within 0.0e+00" in text and "- 128 texts x 128 videos: " in text


@pytest.mark.slow
def test_data_wait_is_that_of_a_run_of_the_training_command(tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    done = run("benchmarks/gpu.py", "--device", "cpu", "--small", "--only", "Data wait", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"4 pairs, 1 workers: \d+\.\d % of a step waits for data", out.read_text())


def test_a_part_that_fails_is_reported_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import Check

    def fails(check: Check) -> list[str]:
        raise RuntimeError("two\nlines")

    check = Check("cpu", small=True)
    check.part("First", fails)
    check.part("Second", lambda check: ["fine"])
    assert check.failed == ["First"] and "FAILED: RuntimeError: two lines" in check.lines
    assert check.lines[-4:] == ["### Second", "", "fine", ""]
    assert "First (0 s)" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part_runs_on_cpu_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    done = run("benchmarks/gpu.py", "--device", "cpu", "--small", "--out", str(out), timeout_s=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    for found in ("2 ranks at ZeRO-3: losses", "one rank killed: all others", "one rank stopped: all others", "| 2 | "):
        assert found in text


@pytest.mark.slow
def test_a_stopped_rank_that_nobody_names_is_a_failure(tmp_path: Path) -> None:
    from benchmarks.gpu_ranks import lose_a_rank

    seconds, line = lose_a_rank(2, tmp_path, signal.SIGSTOP, 8.0)
    assert seconds < 60 and "rank 1" in line, line
