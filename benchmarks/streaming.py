"""The streaming order and the limited cache, a JSON line for each target; ``benchmarks/data.py`` calls it as well."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from tmass_dist.data.cache import CachePlan, needed_bytes, node_uses  # noqa: E402
from tmass_dist.data.streaming import StreamingOrder  # noqa: E402


def line(name: str, value: float, unit: str, reference: str, ratio: float) -> None:
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit, "reference": reference, "ratio": ratio}))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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


def main() -> None:
    plan_speed()
    fetches()


if __name__ == "__main__":
    main()
