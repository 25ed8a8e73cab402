"""Towers and head from their config."""

from __future__ import annotations

from typing import Any

from torch import nn

from tmass_dist.config import ModelConfig
from tmass_dist.models.backbone import Towers, build_towers
from tmass_dist.models.head import RetrievalHead, build_head


class RetrievalModel(nn.Module):
    """Towers and head; parameter names begin with ``towers.`` and ``head.``."""

    def __init__(self, towers: Towers, head: RetrievalHead) -> None:
        super().__init__()
        self.towers, self.head = towers, head


def build_model(
    config: ModelConfig, description: dict[str, Any] | None = None, *, without_weights: bool = False
) -> RetrievalModel:
    """Towers and a head in its initial state.

    Args:
        config: the settings.
        description: of the towers, in place of the file that ``config.architecture`` names.
        without_weights: leave the towers' weights random, for a checkpoint to fill.
    """
    towers = build_towers(description or config.architecture, config.pretrained, without_weights=without_weights)
    if config.by_token:
        towers.keep_tokens()
    return RetrievalModel(towers, build_head(config, towers.embed_dim))
