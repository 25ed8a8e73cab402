"""Small models and batches on which the tests of the engine run."""

# Shapes: N pairs of the global batch, F frames.

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tmass_dist.config import Config, load_config

N, F, SIDE, WIDTH, STEPS = 12, 4, 16, 32, 10
VARIANTS = {
    "tmass": [],
    "xpool": ["model.radius=none"],
    "kl": ["model.radius=variational", "stochastic.kl_weight=0.1", "stochastic.support_weight=0"],
}


TOWERS = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": WIDTH, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 30, "width": WIDTH, "heads": 2, "layers": 1},
    "vocabulary": ["a"],
}


def config_of(*overrides: str) -> Config:
    """A config with small random towers, four frames, dropout and gradient clipping."""
    path = Path(tempfile.gettempdir()) / f"tmass-towers-{os.getpid()}.json"
    path.write_text(json.dumps(TOWERS))
    small = [
        f"model.architecture={path}",
        "model.pretrained=null",
        f"model.num_frames={F}",
        f"data.batch_size={N}",
        "model.dropout=0.3",
    ]
    return load_config(
        "demo.yaml", [*small, "optim.clip_lr=1e-3", "optim.lr=1e-3", "optim.max_grad_norm=0.5", *overrides]
    )


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A whole global batch: pixels, tokens, noise, dropout keys."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (N, F, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(2, 20, (N, 8), generator=generator)
    tokens[:, -1] = 29
    return pixels, tokens, torch.randn(N, WIDTH, generator=generator), [step * 1000 + row for row in range(N)]


def own_rows(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """This rank's rows."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rows = slice(rank * N // world, (rank + 1) * N // world)
    return tuple(part[rows] for part in batch)


def perturb(model: torch.nn.Module) -> None:
    """Perturb the initial weights, at which many gradients are zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def small_objective(config: Config) -> Any:
    """The perturbed model of ``config``, the same in every process."""
    from tmass_dist.training.objective import build_objective

    torch.manual_seed(0)
    model = build_objective(config).train()
    perturb(model)
    return model


def without_unused_noise(config: Config, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch without the noise that a model without a mass does not take."""
    pixels, tokens, noise, keys = batch
    return pixels, tokens, None if config.model.radius == "none" else noise, keys


def plain_run(config: Config, steps: int = STEPS) -> dict[str, Any]:
    """One process, torch alone."""
    from tmass_dist.training.groups import parameter_groups
    from tmass_dist.training.optim import AuthorsAdamW, TorchAdamW

    model = small_objective(config)
    kind = AuthorsAdamW if config.optim.kind == "authors" else TorchAdamW
    optimizer = kind(parameter_groups(model, config.optim), lr=config.optim.lr)
    losses, gradients = [], {}
    for step in range(steps):
        found = model("whole", *without_unused_noise(config, batch_of(step)))
        found.total.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.total.item())
    return {"losses": losses, "gradients": gradients, "weights": {n: p.detach() for n, p in model.named_parameters()}}
