"""Exact scoring against a plain implementation of the published algorithm, in one run; prints JSON lines.

``python benchmarks/scoring.py`` prints all lines (about 8 minutes on 2 cores), ``--quick`` those of one thread. What is
compared on one thread runs alternately, three times, and the shortest time counts: other load only adds time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NUM_FRAMES, NUM_TRIALS, WIDTH = 12, 20, 512


def _inputs(num_texts: int, num_videos: int) -> tuple[Any, ...]:
    import torch

    from tmass_dist.config import ModelConfig
    from tmass_dist.models.head import build_head

    generator = torch.Generator().manual_seed(0)
    head = build_head(ModelConfig(num_frames=NUM_FRAMES), WIDTH).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    text = torch.randn(num_texts, WIDTH, generator=generator)
    return head, text, torch.randn(num_videos, NUM_FRAMES, WIDTH, generator=generator)


def ours(num_texts: int, num_videos: int, device: str = "cpu", precision: str = "float32") -> Any:
    """Score every text against every video, 64 texts at a time, with noise for each text."""
    import torch

    from tmass_dist.evaluation.blocks import TILE_SIZES
    from tmass_dist.evaluation.scoring import Gallery
    from tmass_dist.noise import keyed_noise

    tile_texts, tile_videos = TILE_SIZES[device]
    kind = getattr(torch, precision)
    head, text, frames = _inputs(num_texts, num_videos)
    head, text, frames = head.to(device), text.to(device), frames.to(device)
    gallery = Gallery(head, frames, tile_videos=tile_videos)
    for start in range(0, num_texts, 64):
        keys = torch.arange(start, min(start + 64, num_texts), device=device)
        noise = keyed_noise(keys, NUM_TRIALS * WIDTH, seed=0).view(-1, NUM_TRIALS, WIDTH)
        row = gallery.score(text[start : start + 64], noise, tile_texts=tile_texts, precision=kind)
    row.sum().item()
    return row


def ours_bf16(num_texts: int, num_videos: int) -> Any:
    """The same with the products of the samples in bfloat16."""
    return ours(num_texts, num_videos, precision="bfloat16")


def published(num_texts: int, num_videos: int, device: str = "cpu") -> None:
    """The published algorithm in its own order, without optimisations.

    It computes every projection for every pair. Then, M times, it computes the radii and samples of all pairs again,
    normalises both sides and multiplies them. At the end it takes the best of the M matrices.
    """
    import torch
    import torch.nn.functional as F

    head, text, frames = _inputs(num_texts, num_videos)
    pool = head.pooling
    with torch.no_grad():
        query, key = pool.query(pool.norm_in(text)), pool.key(pool.norm_in(frames))
        weights = (key @ query.T / WIDTH**0.5).softmax(dim=1)  # (V, F, T)
        attended = pool.norm_attended(pool.out(weights.transpose(1, 2) @ pool.value(pool.norm_in(frames))))
        pooled = pool.norm_out(attended + pool.linear(attended))  # (V, T, D)
        trials = []
        for _ in range(NUM_TRIALS):
            repeated = text.repeat(num_videos, 1, 1)
            cosine = F.normalize(repeated, dim=-1) @ F.normalize(frames, dim=-1).transpose(1, 2)
            samples = repeated + head.mass.radius_of(cosine, repeated) * torch.rand_like(repeated)
            samples = samples / samples.norm(dim=-1, keepdim=True)
            trials.append((samples * (pooled / pooled.norm(dim=-1, keepdim=True))).sum(-1))
        torch.stack(trials).max(dim=0)


def _peak_kb() -> int:
    """Peak resident set of this process, kB."""
    [line] = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM:")]
    return int(line.split()[1])


def _child(connection: Any, function: Callable[..., Any], threads: int, arguments: tuple[int, int]) -> None:
    import torch

    torch.set_num_threads(threads)
    function(8, 8)  # imports and first allocations are not measured
    # A process inherits the peak of its parent; this resets it.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    base = _peak_kb()
    began, used = time.perf_counter(), time.process_time()
    function(*arguments)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - used
    connection.send((seconds, cpu_s, (_peak_kb() - base) * 1024 / 1e9))


def measure(function: Callable[..., Any], threads: int, num_texts: int, num_videos: int) -> tuple[float, ...]:
    """Seconds, CPU seconds, and peak memory in GB above that after the imports; in a process of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (sender, function, threads, (num_texts, num_videos))
    process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
    process.start()
    measured = receiver.recv()
    process.join()
    return measured


def bf16_against_float32() -> tuple[float, float]:
    """Largest difference of two scores, and the share of texts whose correct video has the same rank.

    The 1,000 texts are the mean of their video's frames plus noise, so that about half of them rank their video first.
    """
    import torch

    from tmass_dist.evaluation.scoring import Gallery
    from tmass_dist.noise import keyed_noise

    torch.set_num_threads(1)
    head, text, frames = _inputs(1000, 1000)
    text = frames.mean(dim=1) + 1.2 * text
    gallery, noise = Gallery(head, frames), keyed_noise(torch.arange(1000), NUM_TRIALS * WIDTH, seed=0)
    noise = noise.view(-1, NUM_TRIALS, WIDTH)
    exact, rounded = (gallery.score(text, noise, precision=kind) for kind in (torch.float32, torch.bfloat16))
    ranks = [(scores >= scores.diagonal()[:, None]).sum(dim=1) for scores in (exact, rounded)]
    return float((exact - rounded).abs().max()), float((ranks[0] == ranks[1]).float().mean())


def line(name: str, value: float, unit: str, reference: str, ratio: float, **more: Any) -> None:
    """Print one result."""
    result = {"name": name, "value": round(value, 4), "unit": unit, "reference": reference, "ratio": round(ratio, 2)}
    print(json.dumps(result | more), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/scoring.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the lines of one thread")
    arguments = parser.parse_args()
    sampled = 100  # videos on which the plain algorithm is timed
    rounds = [
        [measure(ours, 1, 1000, 1000), measure(ours_bf16, 1, 1000, 1000), measure(published, 1, 1000, sampled)]
        for _ in range(3)
    ]
    (seconds, cpu_s, memory), (bf16_s, bf16_cpu_s, _), plain = ([min(x) for x in zip(*one)] for one in zip(*rounds))
    plain_s, plain_cpu_s, plain_gb = (value * 1000 / sampled for value in plain)
    reference = f"plain published algorithm, 1 thread, timed on 1000 texts x {sampled} videos and scaled to 1000"
    cpu = {"cpu_s": round(cpu_s, 2), "reference_cpu_s": round(plain_cpu_s, 1)}
    line("score-1000x1000-m20", seconds, "s", reference, plain_s / seconds, reference_s=round(plain_s, 1), **cpu)
    reference = "the same plain algorithm, its peak scaled to 1000 videos"
    line("score-1000x1000-m20-memory", memory, "GB", reference, plain_gb / max(memory, 1e-3))
    error, agreeing = bf16_against_float32()
    more = {"cpu_s": round(bf16_cpu_s, 2), "greatest_error": round(error, 6), "same_rank": agreeing}
    line("score-1000x1000-m20-bf16", bf16_s, "s", "float32 of the same", seconds / bf16_s, **more)
    if arguments.quick:
        return
    two_s, *_ = measure(ours, 2, 1000, 1000)
    line("score-1000x1000-m20-threads2", two_s, "s", "1 thread of the same", seconds / two_s)
    for num_texts, num_videos in ((2000, 1000), (1000, 2000), (15000, 1500)):
        seconds, _, gigabytes = measure(ours, 2, num_texts, num_videos)
        growth = (seconds / two_s) / (num_texts * num_videos / 1e6)
        name = f"score-{num_texts}x{num_videos}-m20"
        reference = "1000 x 1000 of the same, per pair: 1 is linear"
        line(name, seconds, "s", reference, 1 / growth, memory_gb=round(gigabytes, 3))
    import torch

    if torch.cuda.is_available():
        for side in (1000, 10000):
            ours(64, 64, "cuda")
            began = time.perf_counter()
            ours(side, side, "cuda")
            line(f"score-{side}x{side}-m20-gpu", time.perf_counter() - began, "s", "none", 1.0)


if __name__ == "__main__":
    main()
