"""The head of every system of the paper: a pooling, and a text mass or none."""

from __future__ import annotations

from typing import Literal

from torch import nn

from tmass_dist.models.pooling import MeanPool, XPool
from tmass_dist.models.stochastic import RadiusKind, TextMass


class RetrievalHead(nn.Module):
    """``pooling`` turns frames into one vector a pair; ``mass`` is None for a system without stochastic text."""

    def __init__(self, pooling: XPool | MeanPool, mass: TextMass | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.mass = mass


def build_head(
    *,
    embed_dim: int,
    num_frames: int,
    pooling: Literal["xpool", "mean"] = "xpool",
    num_heads: int = 1,
    dropout: float = 0.3,
    radius: RadiusKind | Literal["none"] = "exp_linear",
    radius_start: Literal["rising", "falling"] = "rising",
) -> RetrievalHead:
    """A head in its initial state, by default the authors'."""
    pool = MeanPool() if pooling == "mean" else XPool(embed_dim, num_heads, dropout)
    return RetrievalHead(pool, None if radius == "none" else TextMass(num_frames, embed_dim, radius, radius_start))
