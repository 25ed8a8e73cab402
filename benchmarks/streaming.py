"""The streaming order and the limited cache, a JSON line for each target; ``benchmarks/data.py`` runs it as well."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from tmass_dist.data.cache import CachePlan, needed_bytes, node_uses  # noqa: E402
from tmass_dist.data.order import GlobalOrder, Order  # noqa: E402
from tmass_dist.data.streaming import StreamingOrder  # noqa: E402


def line(name: str, value: float, unit: str, reference: str, ratio: float | None = None) -> None:
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit, "reference": reference, "ratio": ratio}))


def peak_mb() -> float:
    """Peak memory of this program; ``getrusage`` would count the program that started this one too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def plan_speed() -> None:
    """An epoch of 10 million videos in 40,000 shards: planned for all lanes, and resumed in the middle."""
    num_captions, shard_of = np.ones(10_000_000, np.int32), np.repeat(np.arange(40_000, dtype=np.int32), 250)
    before_mb, began = peak_mb(), time.perf_counter()
    order = StreamingOrder(num_captions, shard_of, seed=0, batch_size=4096, lanes=64)
    for lane in range(order.lanes):
        order.shard_uses(lane, 0)
    line("streaming-plan", time.perf_counter() - began, "s", "5 s", round(5 / (time.perf_counter() - began), 1))
    began = time.perf_counter()
    order.pairs(order.steps_per_epoch // 2, range(order.batch_size))
    resumed_s = time.perf_counter() - began
    line("streaming-plan-resume", resumed_s, "s", "1 s", round(1 / resumed_s, 1))
    grown_mb = peak_mb() - before_mb
    line("streaming-plan-memory", grown_mb, "MB", "200 MB", round(200 / max(grown_mb, 1e-3), 1))


def fetches(num_shards: int = 4000, per_shard: int = 64, nodes: int = 8, lanes: int = 64, epochs: int = 4) -> None:
    """Downloads on a simulated cluster, with the smallest cache: (W + 2) shards for each lane of a node."""
    num_captions = np.ones(num_shards * per_shard, np.int32)
    shard_of = np.repeat(np.arange(num_shards, dtype=np.int32), per_shard)
    shard_bytes = np.random.default_rng(0).integers(80, 120, num_shards) * 10**6
    order = StreamingOrder(num_captions, shard_of, seed=0, batch_size=8 * lanes, lanes=lanes)
    per_epoch, peaks = [], []
    for node in range(nodes):
        own = range(node * lanes // nodes, (node + 1) * lanes // nodes)
        capacity = needed_bytes(order, own, shard_bytes, order.window + 2)
        plan = CachePlan(node_uses(order, own), shard_bytes, capacity, order.steps_per_epoch, 0)
        share = np.unique(np.concatenate([order.shards_of(lane) for lane in own]))
        number = peak = 0
        for step in range(epochs * order.steps_per_epoch):
            plan.advance(step)
            while next_download := plan.next_download():
                number += 1
                plan.downloaded(next_download[0])
                peak = max(peak, plan.used_bytes)
            open_shards = {
                int(shard)
                for epoch in (step // order.steps_per_epoch,)
                for lane in own
                for uses in (order.shard_uses(lane, epoch),)
                for shard in uses.shard[(uses.first_step <= step) & (step <= uses.last_step)]
            }
            assert open_shards <= plan.held, "a shard is needed and not there"
        ahead = len(plan.held)  # for the epoch that follows
        boundary = len(own)
        per_epoch.append(((number - ahead) / epochs - boundary) / (len(share) - boundary))
        peaks.append(peak / capacity)
    worst = max(per_epoch)
    line("streaming-fetches", worst, "downloads per shard and epoch, worst of 8 nodes", "1.05", round(1.05 / worst, 3))
    line("streaming-cache-peak", max(peaks), "of data.cache_gb, worst of 8 nodes", "1", round(1 / max(peaks), 3))


def randomness(num_shards: int = 36, per_shard: int = 250, captions: int = 20, batch_size: int = 128) -> None:
    """How far batches are from independent draws: a number belongs to each video, and batches have their means of it.

    ``alike``: all videos of a shard have the same number, the worst case; ``shuffled``: each video has its own. The
    autocorrelation is that of the means of consecutive batches. The spread is the variance of the means; 1 is that of
    batches of independent pairs, and batches with a larger spread are less varied within. Means of 3 seeds.
    """
    num_videos = num_shards * per_shard
    num_captions = np.full(num_videos, captions, np.int32)
    shard_of = np.repeat(np.arange(num_shards, dtype=np.int32), per_shard)
    orders: dict[str, Callable[[int], Order]] = {
        "global": lambda seed: GlobalOrder(num_captions, seed=seed, batch_size=batch_size)
    }
    for lanes, window in ((8, 2), (8, 4), (32, 2)):
        orders[f"{lanes} lanes, window {window}"] = lambda seed, lanes=lanes, window=window: StreamingOrder(
            num_captions, shard_of, seed=seed, batch_size=batch_size, lanes=lanes, window=window
        )
    measured: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        values = {"alike": rng.normal(size=num_shards)[shard_of], "shuffled": rng.normal(size=num_videos)}
        for name, make in orders.items():
            order = make(seed)
            videos = np.stack([order.pairs(step, range(batch_size))[:, 0] for step in range(order.steps_per_epoch)])
            for kind, value in values.items():
                means = value[videos].mean(axis=1) - value.mean()
                spread = float(means.var() / value.var() * batch_size)
                measured[kind, name].append((float((means[1:] * means[:-1]).mean() / means.var()), spread))
    for (kind, name), results in measured.items():
        correlation, spread = np.mean(results, axis=0)
        global_correlation, global_spread = np.mean(measured[kind, "global"], axis=0)
        if name != "global":
            reference = f"data.order=global: {global_correlation:.3f}"
            line(f"streaming-neighbours-{kind}", correlation, f"autocorrelation of batch means, {name}", reference)
            reference = f"data.order=global: {global_spread:.3f}"
            ratio = round(spread / global_spread, 2)
            line(f"streaming-spread-{kind}", spread, f"variance of batch means, {name}", reference, ratio)


def main() -> None:
    plan_speed()
    fetches()
    randomness()


if __name__ == "__main__":
    main()
