"""A run of two ranks with faults at random steps: each is reported in one line, and the final weights are the same."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.conftest import ROOT, run
from tests.processes import until
from tmass_dist.training.checkpoint import saved_steps, weights_of

TIMEOUT_S = 12


@dataclass
class Ranks:
    """Two ranks of one training, each with its own stderr."""

    overrides: list[str]
    run_dir: Path
    processes: list[BaseProcess]

    def step(self) -> int:
        """Steps done, by the log of this start."""
        steps = re.findall(r"step (\d+)/", self.words(0))
        return int(steps[-1]) if steps else 0

    def until(self, step: int, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while self.step() < step:
            assert time.monotonic() < deadline and self.processes[0].is_alive(), self.words(0)
            time.sleep(0.02)

    def ends(self, rank: int, seconds: float) -> int:
        """Exit code of a rank, or minus the signal that ended it."""
        self.processes[rank].join(seconds)
        code = self.processes[rank].exitcode
        assert code is not None, f"rank {rank} still runs after {seconds} s: {self.words(rank)}"
        return code

    def words(self, rank: int) -> str:
        return (self.run_dir / f"stderr-{rank}").read_text()

    def error_of(self, rank: int) -> str:
        """The line of the error, which must be the only one, without a traceback."""
        lines = [line for line in self.words(rank).splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.words(rank), self.words(rank)
        return lines[0]


def start(
    overrides: list[str], run_dir: Path, prepare: dict[int, Callable[[], None]] | None = None, fault: str = ""
) -> Ranks:
    """Start the command in two processes.

    Args:
        overrides: of the config.
        run_dir: of the run.
        prepare: by rank, what its process calls first.
        fault: Python code that each process runs first, to break something inside.
    """
    run_dir.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = ["-m", "tmass_dist.train"]
    if fault:
        command = ["-c", f"{fault}\nfrom tmass_dist.train import main, run_command\nrun_command(main)"]
    command += ["--config", "demo.yaml", *overrides, f"run_dir={run_dir}"]
    for rank in (0, 1):
        (run_dir / f"stderr-{rank}").write_text("")  # not what an earlier start wrote
    processes = [
        forked.start(
            *command,
            environment=os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=Path(os.devnull),
            stderr=run_dir / f"stderr-{rank}",
            prepare=(prepare or {}).get(rank),
        )
        for rank in (0, 1)
    ]
    return Ranks(overrides, run_dir, processes)


@pytest.fixture
def overrides(data: list[str]) -> list[str]:
    more = [
        "max_steps=200",
        "eval_every=15",
        f"engine.timeout_s={TIMEOUT_S}",
        "data.num_workers=1",
        "data.max_bad=0",
    ]
    return [*data, *more]


def killed(ranks: Ranks, step: int, number: int) -> None:
    ranks.until(step)
    ranks.processes[number].kill()
    other = 1 - number
    assert ranks.ends(other, TIMEOUT_S + 120) == 1
    assert f"rank {number} " in ranks.error_of(other) and "gone" in ranks.error_of(other)


def stopped(ranks: Ranks, step: int, number: int) -> None:
    ranks.until(step)
    pid = ranks.processes[number].pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    other = 1 - number
    try:
        assert ranks.ends(other, TIMEOUT_S + 120) == 1
    finally:
        ranks.processes[number].kill()
    assert f"rank {number} " in ranks.error_of(other)


def worker_killed(ranks: Ranks, step: int, number: int) -> None:
    ranks.until(step)
    children = Path(f"/proc/{ranks.processes[number].pid}/task/{ranks.processes[number].pid}/children")
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert ranks.ends(number, TIMEOUT_S + 120) == 1
    assert ranks.ends(1 - number, TIMEOUT_S + 120) == 1
    assert f"rank {number}: a decoding process ended" in ranks.error_of(number)
    assert f"rank {number} failed: a decoding process ended" in ranks.error_of(1 - number)


def terminated(ranks: Ranks, step: int, number: int) -> None:
    ranks.until(step)
    ranks.processes[number].terminate()
    for rank in (0, 1):
        assert ranks.ends(rank, TIMEOUT_S + 120) == 0, ranks.words(rank)
    assert "asked to stop: saved at step" in ranks.words(0)


def damaged_checkpoint(ranks: Ranks, step: int, number: int) -> None:
    checkpoints = ranks.run_dir / "checkpoints"
    ranks.until(step)
    until(lambda: len(saved_steps(checkpoints)) > 1, "second checkpoint")
    killed(ranks, step, number)
    newest, before = saved_steps(checkpoints)[:2]
    part = checkpoints / f"step-{newest:08d}" / f"part-{number:05d}.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    (ranks.run_dir / "expect").write_text(f"{part} is damaged|step {before} of")


def corrupt_shard(ranks: Ranks, step: int, number: int) -> None:
    ranks.until(step)
    shards = Path(next(o for o in ranks.overrides if o.startswith("data.train=")).removeprefix("data.train="))
    shard = sorted(shards.glob("*.tar"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(whole))
    try:
        codes = [ranks.ends(rank, TIMEOUT_S + 120) for rank in (0, 1)]
        assert all(codes), codes
        for rank in (0, 1):  # one of them reads it first, and the other repeats its message
            assert shard.name in ranks.error_of(rank) and "damaged" in ranks.error_of(rank)
    finally:
        shard.write_bytes(whole)


def full_disk(ranks: Ranks, step: int, number: int) -> None:
    """A rank cannot write files of more than 100 kB, so its part of the next checkpoint does not fit."""
    before = saved_steps(ranks.run_dir / "checkpoints")
    for rank in (0, 1):
        assert ranks.ends(rank, 240) == 1
        line = ranks.error_of(rank)
        assert f"rank {number} cannot save step" in line and f"last complete checkpoint is of step {before[0]}" in line
    assert saved_steps(ranks.run_dir / "checkpoints") == before


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


FAULTS = [killed, stopped, worker_killed, terminated, damaged_checkpoint, corrupt_shard, full_disk]
SOME = [worker_killed, damaged_checkpoint, full_disk]  # the second kills a rank, too


@pytest.mark.parametrize(
    ("faults", "steps"),
    [pytest.param(SOME, 80, id="some"), pytest.param(FAULTS, 200, id="all", marks=pytest.mark.slow)],
)
def test_one_run_survives_every_fault(
    overrides: list[str], tmp_path: Path, faults: list[Callable[[Ranks, int, int], None]], steps: int
) -> None:
    overrides = [*overrides, f"max_steps={steps}"]
    undisturbed = start(overrides, tmp_path / "undisturbed")
    chance = random.Random()
    seed = chance.randrange(10**6)
    chance.seed(seed)
    print(f"seed of the faults: {seed}")
    for rank in (0, 1):
        assert undisturbed.ends(rank, 240) == 0, undisturbed.words(rank)

    disturbed, at = tmp_path / "disturbed", 16
    table = []
    for fault in faults:
        number = 1 if fault is full_disk else chance.randrange(2)  # rank 0 also writes logs and curves
        if fault is full_disk:  # without workers: they write batches to shared memory, which the limit would stop first
            ranks = start([*overrides, "data.num_workers=0"], disturbed, {number: small_files})
        else:
            ranks = start(overrides, disturbed)
        began = time.monotonic()
        at += chance.randrange(4, 24)
        try:
            fault(ranks, at, number)
        except AssertionError as error:
            raise AssertionError(f"{fault.__name__} of rank {number} at step {at} (seed {seed}): {error}") from error
        finally:
            for process in ranks.processes:
                process.kill()
        expect = disturbed / "expect"
        lines = ranks.words(1 - number).splitlines() or ["nothing was written"]
        table.append(f"{fault.__name__} of rank {number} at step {at}: {time.monotonic() - began:.1f} s; {lines[-1]}")
        if expect.is_file():
            kept, expected = disturbed / "kept", expect.read_text().split("|")
            shutil.move(expect, kept)
            again = start(overrides, disturbed)
            again.until(saved_steps(disturbed / "checkpoints")[1] + 1)
            for process in again.processes:
                process.kill()
            assert all(words in again.words(0) for words in expected), again.words(0)
    print("\n".join(table))
    last = start(overrides, disturbed)
    for rank in (0, 1):
        assert last.ends(rank, 240) == 0, last.words(rank)
    one, other = (weights_of(r / "checkpoints" / f"step-{steps:08d}") for r in (undisturbed.run_dir, disturbed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not list((disturbed / "checkpoints").glob("tmp-*"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(disturbed)).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, steps + 1))
    validated = [event.step for event in events.Scalars("metrics/val/query_conditioned/M20/t2v_R@1")]
    assert validated == [0, *range(15, steps, 15), steps]  # the demo validates before its first step too
    again = start(overrides, disturbed)  # nothing is left to do
    for rank in (0, 1):
        assert again.ends(rank, 240) == 0, again.words(rank)


INSIDE = """
import os, time
from tmass_dist.training import loop, objective

RANK, AT, calls = int(os.environ["RANK"]), {at}, []
inputs, build = loop.step_inputs, objective.build_objective

def broken_inputs(batch, step, *more):
    calls.append(step)
    if RANK == {number} and step == AT:
        {action}
    return inputs(batch, step, *more)

def broken_model(config, **more):
    model = build(config, **more)
    if "{action}" == "pass":
        weight = model.head.pooling.linear.weight
        weight.register_hook(lambda g: g * (float("nan") if RANK == {number} and calls[-1] == AT else 1.0))
    return model

loop.step_inputs, objective.build_objective = broken_inputs, broken_model
"""
"""Breaks one rank at one step by ``action``; if that is ``pass``, by a gradient that is not a number."""


RAISES = ("raise RuntimeError('out of luck')", "failed: RuntimeError: out of luck")
HANGS = ("time.sleep(1000)", "is behind, at step")


@pytest.mark.parametrize(
    ("number", "action", "said"),
    [
        pytest.param(1, *RAISES, id="raises-1"),
        pytest.param(0, *HANGS, id="hangs-0"),  # it holds the store that the ranks talk through
        pytest.param(0, *RAISES, id="raises-0", marks=pytest.mark.slow),
        pytest.param(1, *HANGS, id="hangs-1", marks=pytest.mark.slow),
    ],
)
def test_a_rank_fails_or_hangs_and_the_other_names_it(
    overrides: list[str], tmp_path: Path, number: int, action: str, said: str
) -> None:
    at = random.randrange(5, 30)
    fault = INSIDE.format(at=at, number=number, action=action)
    ranks = start(overrides, tmp_path / "run", fault=fault)
    try:
        codes = [ranks.ends(rank, 180 + TIMEOUT_S) for rank in (1 - number, number)]
    finally:
        for process in ranks.processes:
            process.kill()
    print(f"{action} on rank {number} at step {at + 1}: {ranks.error_of(1 - number)}")
    assert codes == [1, 1]
    assert f"rank {number} {said}" in ranks.error_of(1 - number)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_gradient_of_one_rank_that_is_not_a_number(overrides: list[str], tmp_path: Path, policy: str) -> None:
    at, number = random.randrange(5, 15), random.randrange(2)
    more = ["max_steps=20", "eval_every=20", f"engine.nonfinite={policy}"]
    fault = INSIDE.format(at=at, number=number, action="pass")
    ranks = start([*overrides, *more], tmp_path / "run", fault=fault)
    codes = [ranks.ends(rank, 240) for rank in (0, 1)]
    [note] = (tmp_path / "run" / "nonfinite").glob("*.json")
    [found] = json.loads(note.read_text())
    assert note.name == f"step-{at + 1:08d}.json" and found["rank"] == number and len(found["pairs"]) == 4
    line = f"step {at + 1}: the loss or a gradient of rank {number} is not a number; no rank updated"
    if policy == "stop":
        assert codes == [2, 2] and all(line in ranks.error_of(rank) for rank in (0, 1))
    else:
        assert codes == [0, 0] and line in ranks.words(0) and "step 20/20" in ranks.words(0)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_a_number(overrides: list[str], tmp_path: Path, policy: str) -> None:
    """On every rank: the learning rate is so high that the weights overflow."""
    wild = ["optim.lr=1e38", "optim.warmup=0", "max_steps=4", "eval_every=4", f"engine.nonfinite={policy}"]
    ranks = start([*overrides, *wild], tmp_path / "run")
    codes = [ranks.ends(rank, 240) for rank in (0, 1)]
    notes = sorted((tmp_path / "run" / "nonfinite").glob("*.json"))
    found = json.loads(notes[0].read_text())
    assert [entry["rank"] for entry in found] == [0, 1] and len(found[0]["pairs"]) == 4
    if policy == "stop":
        assert codes == [2, 2] and len(notes) == 1
        assert "is not a number; no rank updated" in ranks.error_of(0)
    else:
        assert len(notes) > 1 and "; skipped" in ranks.words(0)


def test_a_run_is_resumed_by_another_number_of_ranks_and_another_stage(overrides: list[str], tmp_path: Path) -> None:
    """Two ranks are stopped, one process under ZeRO-3 finishes: the weights are those of one undisturbed process."""
    more = [*overrides, "max_steps=40"]
    ranks = start(more, tmp_path / "run")
    terminated(ranks, 12, 1)
    saved = saved_steps(tmp_path / "run" / "checkpoints")[0]
    assert 12 <= saved < 40
    alone = ["-m", "tmass_dist.train", "--config", "demo.yaml", *more]
    for name, further in (("run", ["engine.zero_stage=3"]), ("undisturbed", [])):
        done = run(*alone, f"run_dir={tmp_path / name}", *further)
        assert done.returncode == 0, done.stderr
    assert f"step {saved} of 40, 1 ranks" in (tmp_path / "run" / "train.log").read_text()
    one, other = (weights_of(tmp_path / name / "checkpoints" / "step-00000040") for name in ("run", "undisturbed"))
    distance = sum(float((one[n] - other[n]).square().sum()) for n in one) ** 0.5
    relative = distance / sum(float(other[n].square().sum()) for n in one) ** 0.5
    print(f"2 ranks under ZeRO-1, then 1 under ZeRO-3: weights differ by {relative:.1e} after 40 steps")
    assert relative < 1e-5
