"""Towers and head from their config."""

from __future__ import annotations

from torch import nn

from tmass_dist.config import ModelConfig
from tmass_dist.models.backbone import Towers, build_towers
from tmass_dist.models.head import RetrievalHead, build_head


class RetrievalModel(nn.Module):
    """Towers and head; parameter names begin with ``towers.`` and ``head.``."""

    def __init__(self, towers: Towers, head: RetrievalHead) -> None:
        super().__init__()
        self.towers, self.head = towers, head


def build_model(config: ModelConfig) -> RetrievalModel:
    """Towers (pretrained or not) and a head in its initial state."""
    towers = build_towers(config.architecture, config.pretrained)
    return RetrievalModel(towers, build_head(config, towers.embed_dim))
