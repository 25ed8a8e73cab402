"""Parts of ``benchmarks/gpu.py`` that need several processes, one for each GPU (or each CPU rank)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

START = multiprocessing.get_context("spawn")
FAULT_STEP = 3
"""Step at which a rank of the fault tests is killed or stopped."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(
    rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], out: Path
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = (out / f"stderr-{rank}").open("w", buffering=1, encoding="utf-8")
    from tmass_dist import distributed

    device = distributed.initialise(60)
    (out / f"result-{rank}").write_text(json.dumps(function(device, out, *arguments)), encoding="utf-8")
    distributed.barrier()
    distributed.finish()
    os._exit(0)  # threads of libraries may still run, and one that is cut off would look like a failure


def start(world: int, out: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(device, out, *arguments)`` on every rank; its results are read by :func:`results`."""
    port = free_port()
    processes = [
        START.Process(target=_rank, args=(rank, world, port, function, arguments, out)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def results(processes: list[Any], out: Path, timeout_s: float) -> list[Any]:
    """What each rank returned.

    Raises:
        RuntimeError: a rank failed, or was not done in time; what it printed is in the message.
    """
    end = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    if failed:
        raise RuntimeError(f"ranks {failed} failed: {(out / f'stderr-{failed[0]}').read_text(encoding='utf-8')[-500:]}")
    return [json.loads((out / f"result-{rank}").read_text(encoding="utf-8")) for rank in range(len(processes))]


def losses(device: Any, out: Path, overrides: list[str], steps: int) -> list[float]:
    """Losses of the small model over some steps of the engine; every rank has its rows of the same global batch."""
    from tests.small_model import batch_of, config_of, own_rows, small_objective
    from tmass_dist.training.engine import Engine

    config = config_of(*overrides)
    engine = Engine(small_objective(config).to(device), config)
    found = []
    for step in range(steps):
        pixels, tokens, noise, keys = own_rows(batch_of(step))
        inputs = (pixels.to(device), tokens.to(device), noise.to(device), keys)
        found.append(engine.backward(*inputs).total.item())
        engine.step(1.0)
    return found


def run_until_lost(device: Any, out: Path, limit_s: float) -> None:
    """Steps of the small model under the watchdog, until a rank is lost."""
    from tests.small_model import batch_of, config_of, own_rows, small_objective
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.watchdog import Watchdog

    config = config_of()
    engine = Engine(small_objective(config).to(device), config)
    with Watchdog(limit_s) as watchdog:
        for step in range(10**6):
            watchdog.begin_step(step)
            pixels, tokens, noise, keys = own_rows(batch_of(step % 10))
            engine.backward(pixels.to(device), tokens.to(device), noise.to(device), keys)
            engine.step(1.0)
            (out / f"step-{os.environ['RANK']}").write_text(str(step), encoding="utf-8")


def lose_a_rank(world: int, out: Path, fault: int, limit_s: float) -> tuple[float, str]:
    """Kill (``SIGKILL``) or stop (``SIGSTOP``) the last rank while all train.

    Returns:
        Seconds until every other rank has ended, and the line in which rank 0 names the lost one.

    Raises:
        RuntimeError: the ranks did not get so far, or did not end.
    """
    processes = start(world, out, run_until_lost, limit_s)
    try:
        progress = out / f"step-{world - 1}"
        end = time.monotonic() + 180
        while not progress.is_file() or int(progress.read_text() or 0) < FAULT_STEP:
            if time.monotonic() > end or any(process.exitcode is not None for process in processes):
                raise RuntimeError(f"no step {FAULT_STEP}: {(out / 'stderr-0').read_text()[-500:]}")
            time.sleep(0.05)
        os.kill(processes[-1].pid, fault)
        began = time.monotonic()
        for process in processes[:-1]:
            process.join(max(0.0, began + limit_s + 60 - time.monotonic()))
        seconds = time.monotonic() - began
        if any(process.exitcode is None for process in processes[:-1]):
            raise RuntimeError(f"a rank still waits {seconds:.0f} s after rank {world - 1} was lost")
    finally:
        for process in processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            process.join(10)
    said = (out / "stderr-0").read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line for line in said if f"rank {world - 1}" in line]
    return seconds, named[-1][:200] if named else "NOT NAMED: " + (said[-1][:160] if said else "")


def step_seconds(device: Any, out: Path, architecture: str, batch: int, frames: int, overrides: list[str]) -> Any:
    """Seconds of a step, share of communication, peak memory, and FLOPs of a pair's forward pass, on this rank."""
    import torch

    from benchmarks.whole_step import config_of, our_step, seconds_of
    from tmass_dist.distributed import world_size
    from tmass_dist.phase_timer import PHASE_TIMER
    from tmass_dist.training.monitor import forward_flops, peak_memory_gb

    world = world_size()
    config = config_of(architecture, batch * world, frames, *overrides)
    # Every rank measures with its own batch of the local size.
    step, model, (pixels, tokens, *_) = our_step(config, device, local=batch)
    flops = forward_flops(model, pixels, tokens)
    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = sorted(seconds_of(step, device) for _ in range(5))[2]
    PHASE_TIMER.start("encode")
    step()
    spent = PHASE_TIMER.stop()()
    return {
        "seconds": seconds,
        "communication": spent.get("communication", 0.0) / sum(spent.values()),
        "memory_gb": peak_memory_gb(),
        "flops": flops,
    }
