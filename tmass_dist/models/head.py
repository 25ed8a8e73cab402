"""The head of every system: a pooling, and optionally a text mass."""

from __future__ import annotations

from torch import nn

from tmass_dist.config import ModelConfig
from tmass_dist.models.frame_pooling import FramePool, MeanPool
from tmass_dist.models.late_interaction import LateInteraction
from tmass_dist.models.pooling import XPool
from tmass_dist.models.stochastic import TextMass

Pooling = XPool | MeanPool | FramePool | LateInteraction


class RetrievalHead(nn.Module):
    """``pooling`` makes one vector of a video's frames for each pair; ``mass`` is None without stochastic text."""

    def __init__(self, pooling: Pooling, mass: TextMass | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.mass = mass

    @property
    def draws_samples(self) -> bool:
        """Whether scores are those of samples of the mass."""
        return self.mass is not None and self.mass.scoring == "samples"

    @property
    def tau(self) -> float | None:
        """The learnt temperature of query scoring; None with another pooling."""
        pooling = self.pooling
        return pooling.tau.item() if isinstance(pooling, FramePool) and pooling.kind == "query_scored" else None


def build_head(config: ModelConfig, embed_dim: int) -> RetrievalHead:
    """A head with its initial weights (by default those of the authors), for embeddings of width ``embed_dim``."""
    pooling: Pooling
    if config.pooling in ("best_frame", "query_scored"):
        pooling = FramePool(config.pooling)
    elif config.pooling == "mean":
        pooling = MeanPool()
    elif config.by_token:
        pooling = LateInteraction(embed_dim, weighted=config.pooling == "weighted_interaction")
    else:
        add_best_frame = config.pooling == "xpool_best_frame"
        pooling = XPool(embed_dim, config.num_heads, config.dropout, add_best_frame=add_best_frame)
    if config.radius == "none":
        return RetrievalHead(pooling, None)
    mass = TextMass(config.num_frames, embed_dim, config.radius, config.radius_start, config.mass_score)
    return RetrievalHead(pooling, mass)
