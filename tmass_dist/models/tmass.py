"""The whole model from its config: towers, head and objective. The one place that unpacks the config."""

from __future__ import annotations

from torch import nn

from tmass_dist.config import Config
from tmass_dist.models.backbone import build_towers
from tmass_dist.models.head import build_head
from tmass_dist.objective import Objective


def build_model(config: Config) -> Objective:
    """Towers (pretrained or not) and a head in its initial state."""
    towers = build_towers(config.model.architecture, config.model.pretrained)
    head = build_head(
        embed_dim=towers.embed_dim,
        num_frames=config.model.num_frames,
        pooling=config.model.pooling,
        num_heads=config.model.num_heads,
        dropout=config.model.dropout,
        radius=config.model.radius,
        radius_start=config.model.radius_start,
    )
    if config.stochastic.training == "mean" and head.mass is not None:
        head.mass.requires_grad_(False)  # the loss does not see it
    model = Objective(
        towers,
        head,
        config.stochastic.support_weight,
        kl_weight=config.stochastic.kl_weight,
        pooled_by=config.model.pooled_by,
        trials=config.stochastic.trials,
        training_radius=config.stochastic.training_radius,
        memory_mb=config.engine.head_memory_mb,
        bf16=config.engine.bf16,
    )
    names = [name for name, _ in model.named_parameters()]
    for prefix in config.optim.frozen:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"optim.frozen names {prefix!r}, and no parameter begins so; the first is {names[0]}")
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(config.optim.frozen)):
            parameter.requires_grad_(False)
    return model


def parameter_groups(model: Objective, config: Config) -> list[dict[str, object]]:
    """The towers at ``clip_lr``, the head at ``lr``; names serve TensorBoard."""

    def trainable(module: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    groups = [
        {"name": "towers", "params": trainable(model.towers), "lr": config.optim.clip_lr},
        {"name": "head", "params": trainable(model.head), "lr": config.optim.lr},
    ]
    return [group for group in groups if group["params"]]
