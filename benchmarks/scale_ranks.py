"""Groups of ``benchmarks/scale.py`` against the number of ranks: heartbeats, reading at resume, the plan."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.points import in_fresh_process, say, say_growth

PERIOD_S = 1.0
"""Seconds between two heartbeats of a rank in training."""
NUM_THREADS = 16


class CountingStore:
    """A store that counts its requests."""

    def __init__(self, store: Any) -> None:
        self.store, self.num_requests = store, 0

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: Any) -> Any:
            self.num_requests += 1
            return getattr(self.store, name)(*arguments)

        return request


def heartbeat_rounds(num_ranks: int, num_rounds: int = 5) -> dict[str, float]:
    """Real clients of a real store, one for each rank, in one process; each sends its heartbeat once a round.

    Returns:
        Requests of a round: of all ranks, of rank 0 and of another rank; seconds of a round, with the clients working
        as fast as they can, and of rank 0's part of it.
    """
    # torch looks up the name of every 25th client. Without a name server that answers, each look-up takes its timeout.
    os.environ["RES_OPTIONS"] = "attempts:1 timeout:1"
    from torch.distributed import TCPStore

    from tmass_dist.training.heartbeats import Heartbeats

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [server, *(TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(num_ranks - 1))]
    stores = [CountingStore(client) for client in clients]
    ranks = [Heartbeats(store, rank, num_ranks, PERIOD_S) for rank, store in enumerate(stores)]
    for store in stores:
        store.num_requests = 0
    total_s = first_s = 0.0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for number in range(num_rounds):
            began = time.perf_counter()
            ranks[0].exchange(number, number)
            first_s += time.perf_counter() - began
            list(pool.map(lambda heartbeats, step=number: heartbeats.exchange(step, step), ranks[1:]))
            total_s += time.perf_counter() - began
    assert all(heartbeats.summary.number == num_rounds for heartbeats in ranks)  # all read the last summary
    requests = [store.num_requests / num_rounds for store in stores]
    return {
        "all": sum(requests),
        "first": requests[0],
        "other": requests[-1],
        "round_s": total_s / num_rounds,
        "first_s": first_s / num_rounds,
    }


def heartbeat_lines() -> None:
    """``heartbeats``: requests to the store; each rank sends one heartbeat a second."""
    totals: dict[int, float] = {}
    for n in (16, 64, 256, 1024):
        found = in_fresh_process(heartbeat_rounds, n)
        totals[n] = found["all"]
        say("heartbeats-rank", found["other"], "requests/s", n, "at most 3 a rank", 3 / found["other"])
        say("heartbeats-rank-0", found["first"], "requests/s", n, "at most 6", 6 / found["first"])
        say("heartbeats-all", found["all"], "requests/s", n, "3 for each rank", 3 * n / found["all"])
        reference = f"a period of {PERIOD_S:g} s; clients and store share this machine"
        say("heartbeats-round", found["round_s"], "s", n, reference, PERIOD_S / found["round_s"])
        say("heartbeats-rank-0-time", found["first_s"], "s", n, reference, PERIOD_S / found["first_s"])
    say_growth("heartbeats-all", totals, 16)


def read_at_resume(folder: str, num_ranks: int) -> dict[str, float]:
    """What rank 0 of a fake process group of ``num_ranks`` reads of the demo's checkpoint, with ZeRO 1.

    Returns:
        Numbers of the whole state, numbers read, and seconds.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tmass_dist.config import load_config
    from tmass_dist.training.checkpoint import CheckpointReader
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    config = load_config("demo.yaml", ["model.pretrained=null", f"data.batch_size={2 * num_ranks}"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    engine = Engine(build_objective(config), config)
    began = time.perf_counter()
    with CheckpointReader(Path(folder)) as reader:
        engine.shards.load(engine.state_keys, reader.read)
    num_trained = sum(parameter.numel() for parameter in engine.named.values())
    return {"whole": 3 * num_trained, "read": reader.num_read, "seconds": time.perf_counter() - began}


def save_checkpoint(directory: str) -> str:
    """A checkpoint of the untrained demo by one process; returns its folder."""
    import torch

    from tmass_dist.config import load_config
    from tmass_dist.training.checkpoint import Saver
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    torch.manual_seed(0)
    config = load_config("demo.yaml", ["model.pretrained=null", "data.batch_size=2"])
    saver = Saver(Engine(build_objective(config), config), Path(directory))
    saver.begin(1)
    saver.finish()
    return str(Path(directory) / "step-00000001")


def resume_lines() -> None:
    """``resume-reading``: numbers that a rank reads of a checkpoint; weights and two moments of each parameter."""
    points: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = in_fresh_process(save_checkpoint, directory)
        for n in (1, 16, 256, 1024):
            found = in_fresh_process(read_at_resume, folder, n)
            points[n] = found["read"]
            reference = f"the whole state, {found['whole']:.0f} numbers"
            say("resume-reading", found["read"], "numbers a rank", n, reference, found["whole"] / found["read"])
            say(
                "resume-reading-all",
                n * found["read"] / found["whole"],
                "states",
                n,
                "one state",
                found["whole"] / n / found["read"],
            )
    say_growth("resume-reading", points, 16)


def plan_cost(num_ranks: int) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of a plan for ViT-B/32 with 32 pairs on each of ``num_ranks``."""
    from launch.forecast import simulate
    from tmass_dist.config import load_config

    config = load_config("vatex.yaml", ["model.pretrained=null", f"data.batch_size={32 * num_ranks}"])
    began = time.perf_counter()
    simulate(config, num_ranks)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s, peak_mb = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6
    return {"wall_s": time.perf_counter() - began, "cpu_s": cpu_s, "peak_mb": peak_mb}


def plan_lines() -> None:
    """``plan``: time and memory of the simulation behind ``--plan``."""
    for n in (8, 64, 1024):
        cost = in_fresh_process(plan_cost, n)
        say("plan-time", cost["wall_s"], "s", n, "at most 60 s", 60 / cost["wall_s"])
        say("plan-cpu", cost["cpu_s"], "s", n, "at most 60 s", 60 / cost["cpu_s"])
        say("plan-memory", cost["peak_mb"], "MB", n, "at most 2,000 MB", 2000 / cost["peak_mb"])
