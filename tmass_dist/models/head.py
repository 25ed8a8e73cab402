"""The head of every system of the paper: a pooling, and optionally a text mass."""

from __future__ import annotations

from torch import nn

from tmass_dist.config import ModelConfig
from tmass_dist.models.pooling import MeanPool, XPool
from tmass_dist.models.stochastic import TextMass


class RetrievalHead(nn.Module):
    """``pooling`` makes one vector of a video's frames for each pair; ``mass`` is None without stochastic text."""

    def __init__(self, pooling: XPool | MeanPool, mass: TextMass | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.mass = mass


def build_head(config: ModelConfig, embed_dim: int) -> RetrievalHead:
    """A head with its initial weights (by default those of the authors), for embeddings of width ``embed_dim``."""
    pooling = MeanPool() if config.pooling == "mean" else XPool(embed_dim, config.num_heads, config.dropout)
    if config.radius == "none":
        return RetrievalHead(pooling, None)
    return RetrievalHead(pooling, TextMass(config.num_frames, embed_dim, config.radius, config.radius_start))
