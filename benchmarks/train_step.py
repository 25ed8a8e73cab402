"""One training step of the head, forward to backward, beside the plain published head in the same run: JSON lines.

``python benchmarks/train_step.py`` on this machine's CPU, one thread, and on its GPU where there is one;
``python benchmarks/train_step.py step-vitb32`` measures a step of towers and head (``benchmarks/whole_step.py``).
Memory is what autograd keeps for the backward pass: the same number on every machine.
"""

# Shapes: B pairs, F frames, D embedding width.

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.config import ModelConfig, StochasticConfig  # noqa: E402
from tmass_dist.models.head import RetrievalHead, build_head  # noqa: E402
from tmass_dist.training.objective import global_losses  # noqa: E402

NUM_FRAMES, WIDTH, DROPOUT = 12, 512, 0.3


def ours(head: RetrievalHead, text: Tensor, frames: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
    """The objective of tmass_dist."""
    keys = list(range(len(text)))
    return global_losses(head, text, frames, noise, scale, StochasticConfig(), dropout_keys=keys).total


def published(head: RetrievalHead, text: Tensor, frames: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
    """The published head, plainly and in its order: each projection of each pair, then both similarity matrices."""
    pool, mass = head.pooling, head.mass
    width = text.shape[-1]
    query, normed = pool.query(pool.norm_in(text)), pool.norm_in(frames)
    key, value = pool.key(normed), pool.value(normed)
    weights = (torch.einsum("td,vfd->vtf", query, key) / width**0.5).softmax(-1)
    attended = pool.norm_attended(pool.out(weights @ value))
    pooled = pool.norm_out(attended + F.dropout(pool.linear(attended), DROPOUT))
    cosine = (F.normalize(frames, dim=-1) @ F.normalize(text, dim=-1)[:, :, None]).squeeze(-1)
    radius = mass.linear(cosine).exp()
    sampled = text + radius * noise
    support = text + radius * F.normalize(pooled.mean(dim=1) - text, dim=-1)
    total = torch.zeros((), device=text.device)
    for anchor, weight in ((sampled, 1.0), (support, 0.8)):
        similarity = torch.einsum("td,vtd->tv", F.normalize(anchor, dim=-1), F.normalize(pooled, dim=-1))
        logits, truth = similarity * scale.exp().clamp(max=100), torch.arange(len(text), device=text.device)
        total = total + weight * (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    return total


def prepare(step: Callable[..., Tensor], batch: int, device: str) -> tuple[Callable[[], None], float]:
    """A whole step to be timed, and the MB that its forward keeps for the backward pass."""
    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=NUM_FRAMES, dropout=DROPOUT), WIDTH).train().to(device)
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, WIDTH), (batch, NUM_FRAMES, WIDTH), (batch, WIDTH))
    text, frames, noise = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    text.requires_grad_()
    frames.requires_grad_()
    scale = torch.full((1,), 4.6, device=device, requires_grad=True)
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(head, text, frames, noise, scale).backward()
    return lambda: step(head, text, frames, noise, scale).backward(), sum(held.values()) / 1e6


def seconds_of(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    if sys.argv[1:] not in ([], ["step-vitb32"]):
        raise SystemExit(f"usage: python benchmarks/train_step.py [step-vitb32], not {' '.join(sys.argv[1:])}")
    if sys.argv[1:]:
        from benchmarks.whole_step import lines

        for line in lines():
            print(json.dumps(line), flush=True)
        return
    torch.set_num_threads(1)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for batch in (32, 64, 128, 256):
            (our_step, megabytes), (plain_step, plain_mb) = (prepare(s, batch, device) for s in (ours, published))
            # In turn, and the best of each: what else the machine does meets both.
            times = [
                (seconds_of(our_step, device), seconds_of(plain_step, device))
                for _ in range(20 if device == "cuda" else max(3, 1024 // batch))
            ]
            seconds, plain_s = (min(column) for column in zip(*times))
            for what, unit, found, reference in (
                ("seconds", "s", seconds, plain_s),
                ("memory", "MB kept for backward", megabytes, plain_mb),
            ):
                line = {"name": f"head-step-b{batch}-{device}-{what}", "value": round(found, 4), "unit": unit}
                line |= {
                    "reference": f"plain published head, {reference:.4g} {unit}",
                    "ratio": round(reference / found, 2),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
