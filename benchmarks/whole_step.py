"""One optimisation step of towers and head, ours beside the bare one of open_clip and torch, in turn: JSON lines.

``python benchmarks/train_step.py step-vitb32`` runs it. The bare step is open_clip's forward and backward pass of the
same frames and of texts of the full context, a contrastive loss on the mean of the frames, and torch's fused AdamW.
Ours adds the head, both losses, dropout and noise keyed by pair, clipping, the check for numbers that are not finite,
and ZeRO; its tokenizer trims the texts.
"""

# Shapes: B pairs, F frames, H W pixels, C colours, L tokens, D embedding width.

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.config import Config, load_config  # noqa: E402

Step = Callable[[], None]
TOKENS = 32
"""Tokens of the longest text of a batch, as our tokenizer trims them; MSR-VTT's longest captions have about so many."""


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Step, device: torch.device) -> float:
    """One call, waiting for the GPU before and after."""
    synchronise(device)
    began = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - began


def config_of(architecture: str, batch: int, frames: int, *overrides: str) -> Config:
    """Settings of T-MASS with random weights."""
    return load_config(
        "msrvtt.yaml",
        [
            f"model.architecture={architecture}",
            "model.pretrained=null",
            f"model.num_frames={frames}",
            f"data.batch_size={batch}",
            *overrides,
        ],
    )


def batch_of(
    batch: int, frames: int, image_size: int, embed_dim: int, context: int, device: torch.device
) -> tuple[Any, ...]:
    """Pixels, tokens, noise and dropout keys of one rank's batch."""
    generator = torch.Generator().manual_seed(0)
    B = batch
    pixels = torch.randint(0, 256, (B, frames, image_size, image_size, 3), generator=generator, dtype=torch.uint8)
    length = min(TOKENS, context)
    tokens = torch.randint(2, 40, (B, length), generator=generator)
    tokens[:, -1] = 49407 if context == 77 else 41  # the end token has the highest id
    noise = torch.rand(B, 1, embed_dim, generator=generator)
    return tuple(part.to(device) for part in (pixels, tokens, noise, torch.arange(B)))


def our_step(config: Config, device: torch.device, local: int | None = None) -> tuple[Step, Any, tuple[Any, ...]]:
    """A whole step through the engine, the model, and the inputs of the step.

    Args:
        config: of the run.
        device: of this rank.
        local: pairs of this rank; by default the whole batch.
    """
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    torch.manual_seed(0)
    model = build_objective(config).train().to(device)
    towers = model.towers
    shape = (towers.image_size, towers.embed_dim, towers.context_length)
    inputs = batch_of(local or config.data.batch_size, config.model.num_frames, *shape, device)
    engine = Engine(model, config)

    def step() -> None:
        engine.backward(*inputs)
        assert engine.last_step_was_finite()  # of the step before, as in training
        engine.step(1.0)

    return step, model, inputs


def bare_step(config: Config, device: torch.device) -> Step:
    """The towers alone, by open_clip and torch."""
    from tmass_dist.models.backbone import build_towers

    torch.manual_seed(0)
    towers = build_towers(config.model.architecture, None).train().to(device)
    clip = towers.clip
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-6, fused=True)
    shape = (towers.image_size, towers.embed_dim, towers.context_length)
    pixels, tokens, *_ = batch_of(config.data.batch_size, config.model.num_frames, *shape, device)
    images = (pixels.flatten(0, 1).permute(0, 3, 1, 2).float() / 255).contiguous()
    full = F.pad(tokens, (0, towers.context_length - tokens.shape[1]))
    low = torch.bfloat16 if config.engine.bf16 is True else torch.float32

    def step() -> None:
        with torch.autocast(device.type, low, enabled=low != torch.float32):
            frames, text = clip.encode_image(images), clip.encode_text(full)
        frames_BD = F.normalize(frames.float().unflatten(0, (len(tokens), -1)).mean(dim=1), dim=-1)
        similarity_BB: Tensor = F.normalize(text.float(), dim=-1) @ frames_BD.T * clip.logit_scale.exp()
        target_B = torch.arange(len(tokens), device=device)
        loss = F.cross_entropy(similarity_BB, target_B) + F.cross_entropy(similarity_BB.T, target_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(config: Config, device: torch.device, rounds: int) -> tuple[float, float]:
    """Seconds of our step and of the bare one: the least of several, in turn."""
    ours, bare = our_step(config, device)[0], bare_step(config, device)
    ours()
    bare()  # first touches and plans are no part of a step
    times = [(seconds_of(ours, device), seconds_of(bare, device)) for _ in range(rounds)]
    our_s, bare_s = (min(column) for column in zip(*times))
    return our_s, bare_s


def lines(rounds: int = 3) -> Iterator[dict[str, Any]]:
    """Our step at ZeRO-0 and ZeRO-1 against the bare one: ViT-B/32, 4 pairs of 12 frames."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for stage in (0, 1):
        config = config_of("ViT-B-32-quickgelu", 4, 12, f"engine.zero_stage={stage}", "engine.bf16=false")
        our_s, bare_s = compare(config, device, rounds)
        yield {
            "name": f"step-vitb32-zero{stage}-{device.type}",
            "value": round(our_s, 3),
            "unit": "s",
            "reference": f"open_clip's forward and backward and torch's fused AdamW, {bare_s:.3f} s",
            "ratio": round(bare_s / our_s, 2),
        }
