"""Signals at any moment: the run is saved, and the next start continues as if nothing had happened."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.processes import until
from tests.test_faults import Ranks, start
from tmass_dist.training.checkpoint import saved_steps

SLOW_VALIDATION = """
import os, time
from pathlib import Path
from tmass_dist.training import validation

encode_batches = validation.encode_batches

def slow(model, index, tokenize, config, device, batches, on_batch):
    if os.environ["RANK"] == "1":
        (Path(config.run_dir) / "validating").touch()
        for _ in range(2000):
            on_batch()
            time.sleep(0.05)
    return encode_batches(model, index, tokenize, config, device, batches, on_batch)

validation.encode_batches = slow
"""

SLOW_SAVE = """
import time
from tmass_dist.training import checkpoint

checkpoint.Saver._write = lambda *_: time.sleep(1000)
"""


@pytest.fixture
def overrides(data: list[str]) -> list[str]:
    return [*data, "max_steps=10", "eval_every=5", "eval_at_start=false", "engine.timeout_s=60", "data.num_workers=1"]


def _wait_for(path: Path, ranks: Ranks, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline and ranks.processes[0].is_alive(), ranks.words(0)
        time.sleep(0.02)


def _signal(ranks: Ranks, rank: int, number: int) -> None:
    pid = ranks.processes[rank].pid
    assert pid
    os.kill(pid, number)


def test_a_signal_in_a_validation_leaves_it_and_the_next_start_repeats_it(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ranks = start(overrides, run_dir, fault=SLOW_VALIDATION)
    _wait_for(run_dir / "validating", ranks)
    assert saved_steps(run_dir / "checkpoints") == [5], "a SIGKILL now would lose no step"
    _signal(ranks, 1, signal.SIGTERM)
    for rank in (0, 1):
        assert ranks.ends(rank, 180) == 0, ranks.words(rank)
    assert "asked to stop: saved at step 5 of 10" in ranks.words(0)
    assert saved_steps(run_dir / "checkpoints") == [5]
    assert not (run_dir / "checkpoints" / "validation.json").exists()
    again = start(overrides, run_dir)
    for rank in (0, 1):
        assert again.ends(rank, 240) == 0, again.words(rank)
    history = json.loads((run_dir / "checkpoints" / "validation.json").read_text())
    assert [point["step"] for point in history] == [5, 10]


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = [*overrides, "max_steps=1000", "eval_every=1000"]
    ranks = start(more, run_dir)
    ranks.until(3)
    for rank in (0, 1):
        _signal(ranks, rank, signal.SIGINT)
    for rank in (0, 1):
        assert ranks.ends(rank, 180) == 130, ranks.words(rank)
        assert "interrupted: saving" in ranks.words(rank)
    [saved] = saved_steps(run_dir / "checkpoints")
    assert saved >= 3 and f"saved at step {saved} of 1000" in ranks.words(0)

    ranks = start(more, run_dir, fault=SLOW_SAVE)
    ranks.until(saved + 2)
    for rank in (0, 1):
        _signal(ranks, rank, signal.SIGINT)
    until(lambda: all("interrupted: saving" in ranks.words(rank) for rank in (0, 1)), "answer to the first signal")
    for rank in (0, 1):
        _signal(ranks, rank, signal.SIGINT)
    for rank in (0, 1):
        assert ranks.ends(rank, 180) == 130, ranks.words(rank)
        assert "leaving without saving" in ranks.words(rank)
    assert saved_steps(run_dir / "checkpoints") == [saved]
