"""Poolings that weight the normalised frames by their cosines with the text, and the plain mean of the frames.

They have the methods of :class:`tmass_dist.models.pooling.XPool`: ``prepare``, ``pool`` and ``pool_pairs``.
"""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmass_dist.models.pair_products import DropoutKeys, PooledPairs
from tmass_dist.models.stochastic import frame_cosines

INITIAL_TAU = 0.1
"""Initial temperature of query scoring, that of Bain et al., 2022."""


class PreparedMeans(NamedTuple):
    """What :meth:`MeanPool.pool` needs of some videos."""

    mean_VD: Tensor

    def rows(self, videos: slice) -> PreparedMeans:
        """Some of the videos."""
        return PreparedMeans(self.mean_VD[videos])


class MeanPool(nn.Module):
    """The mean of the normalised frames, the same for every text."""

    def prepare(self, frames_VFD: Tensor, num_texts: int | None = None) -> PreparedMeans:
        """The means; ``num_texts`` makes no difference."""
        return PreparedMeans(F.normalize(frames_VFD, dim=-1).mean(dim=1))

    def pool(
        self,
        text_TD: Tensor,
        videos: PreparedMeans,
        dropout_keys: DropoutKeys | None = None,
        first_text: int = 0,
    ) -> PooledPairs:
        """As :meth:`XPool.pool <tmass_dist.models.pooling.XPool.pool>`; the vectors are a view."""
        (mean_VD,) = videos
        one_D = torch.ones_like(mean_VD[0])
        return PooledPairs(mean_VD[:, None].expand(-1, len(text_TD), -1), mean_VD, one_D, torch.zeros_like(one_D))

    def pool_pairs(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> PooledPairs:
        """As :meth:`XPool.pool_pairs <tmass_dist.models.pooling.XPool.pool_pairs>`."""
        return self.pool(text_TD, self.prepare(frames_VFD))

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> Tensor:
        """The pooled vectors, ``(V, T, D)``, a view."""
        return self.pool_pairs(text_TD, frames_VFD).vectors_VTD


class PreparedFrames(NamedTuple):
    """What :meth:`FramePool.pool` needs of some videos."""

    unit_VFD: Tensor
    """Frames of norm 1."""

    def rows(self, videos: slice) -> PreparedFrames:
        """Some of the videos."""
        return PreparedFrames(self.unit_VFD[videos])


class FramePool(nn.Module):
    """The closest frame (``best_frame``), or all frames weighted by ``softmax(cosine / tau)`` (``query_scored``).

    The cosine of a text with its pooled vector is the score of the pair; tau is learnt.

    Source of query scoring: Bain et al., "A CLIP-Hitchhiker's Guide to Long Video Retrieval", 2022, arXiv:2205.08508.
    """

    def __init__(self, kind: Literal["best_frame", "query_scored"]) -> None:
        super().__init__()
        self.kind = kind
        if kind == "query_scored":
            # In this form, weight decay pulls tau to its initial value.
            self.log_relative_tau = nn.Parameter(torch.zeros(1))

    @property
    def tau(self) -> Tensor:
        """The temperature of ``query_scored``, shape [1]."""
        return INITIAL_TAU * self.log_relative_tau.exp()

    def weights(self, text_TD: Tensor, unit_VFD: Tensor) -> Tensor:
        """Weights ``(V, T, F)`` of the frames; each text's sum to one."""
        return self.weights_of(frame_cosines(text_TD, unit_VFD))

    def weights_of(self, cosine_PF: Tensor) -> Tensor:
        """Weights of the frames, from their cosines with the text; any leading dimensions."""
        return best_frame_weights(cosine_PF) if self.kind == "best_frame" else (cosine_PF / self.tau).softmax(dim=-1)

    def prepare(self, frames_VFD: Tensor, num_texts: int | None = None) -> PreparedFrames:
        """The normalised frames; ``num_texts`` makes no difference."""
        return PreparedFrames(F.normalize(frames_VFD, dim=-1))

    def pool(
        self,
        text_TD: Tensor,
        videos: PreparedFrames,
        dropout_keys: DropoutKeys | None = None,
        first_text: int = 0,
    ) -> PooledPairs:
        """As :meth:`XPool.pool <tmass_dist.models.pooling.XPool.pool>`; there is no dropout."""
        (unit_VFD,) = videos
        vectors_VTD = self.weights(text_TD, unit_VFD) @ unit_VFD
        one_D = torch.ones_like(unit_VFD[0, 0])
        return PooledPairs(vectors_VTD, vectors_VTD.mean(dim=1), one_D, torch.zeros_like(one_D))

    def pool_pairs(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> PooledPairs:
        """As :meth:`XPool.pool_pairs <tmass_dist.models.pooling.XPool.pool_pairs>`."""
        return self.pool(text_TD, self.prepare(frames_VFD))

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> Tensor:
        """The pooled vectors, ``(V, T, D)``."""
        return self.pool_pairs(text_TD, frames_VFD).vectors_VTD


def best_frame_weights(cosine_PF: Tensor) -> Tensor:
    """1 for the closest frame of each pair (the first of equal ones), 0 for the others; no gradient passes."""
    return F.one_hot(cosine_PF.argmax(dim=-1), cosine_PF.shape[-1]).to(cosine_PF.dtype)
