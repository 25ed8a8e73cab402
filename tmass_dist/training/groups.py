"""Which parameters are trained at which learning rate."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from tmass_dist.config import OptimConfig
from tmass_dist.errors import UserError
from tmass_dist.models.tmass import RetrievalModel

_BLOCK = re.compile(r"\.(?:resblocks|blocks|layers|layer)\.(\d+)\.")
_TOP = re.compile(r"\.(ln_post|ln_final|norm|proj|attn_pool|head|text_projection|logit_scale|logit_bias)(\.|$)")
"""Parameters of a tower that come after its blocks."""


def parameter_groups(model: RetrievalModel, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of an optimiser: the towers at ``clip_lr`` and the head at ``lr``; adapters at ``lr`` too.

    With ``layer_decay`` the towers are several groups: ``towers`` for what comes after the blocks, ``towers_1`` for the
    last block of each tower at ``layer_decay`` times that rate, and so on; the embeddings are the last group.
    TensorBoard shows the names.

    Raises:
        UserError: ``layer_decay``, and no tower with blocks is trained.
    """
    towers = {name: p for name, p in model.towers.named_parameters(prefix="towers") if p.requires_grad}
    name, rate = ("towers", config.clip_lr) if config.lora_rank is None else ("adapters", config.lr)
    groups = [{"name": name, "params": list(towers.values()), "lr": rate}]
    if config.layer_decay != 1:
        groups = [
            {
                "name": f"towers_{below}" if below else "towers",
                "params": parameters,
                "lr": rate * config.layer_decay**below,
            }
            for below, parameters in sorted(_by_layers_below_the_top(towers).items())
        ]
    groups.append({"name": "head", "params": [p for p in model.head.parameters() if p.requires_grad], "lr": config.lr})
    return [group for group in groups if group["params"]]


def _by_layers_below_the_top(towers: dict[str, nn.Parameter]) -> dict[int, list[nn.Parameter]]:
    """Trained parameters of both towers by their distance from the top, in blocks of their own tower."""
    num_blocks: dict[bool, int] = {}
    for name in towers:
        if match := _BLOCK.search(name):
            is_visual = ".visual." in name
            num_blocks[is_visual] = max(num_blocks.get(is_visual, 0), int(match[1]) + 1)
    if not num_blocks:
        raise UserError("optim.layer_decay needs a trained tower with numbered blocks, such as ViT-B-32-quickgelu's")
    layers: dict[int, list[nn.Parameter]] = {}
    for name, parameter in towers.items():
        blocks, match = num_blocks.get(".visual." in name, 0), _BLOCK.search(name)
        without_block = 0 if _TOP.search(name) else blocks + 1
        below = blocks - int(match[1]) if match else without_block
        layers.setdefault(below, []).append(parameter)
    return layers
