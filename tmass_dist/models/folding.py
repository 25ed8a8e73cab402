"""The pooling of evaluation: every pooled vector of a video as a weighted sum of a few vectors of that video."""

# Shapes: T texts, V videos, F frames, H heads, K = H F, L vectors of a video's basis, D embedding width, E = D / H.
# L is K + 2 for X-Pool, K + 2 + F with the best frame added, F for weighted frames, 1 for their mean.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.models.frame_pooling import FramePool, MeanPool
from tmass_dist.models.head import Pooling
from tmass_dist.models.late_interaction import LateInteraction, TokenPairs
from tmass_dist.models.pooling import XPool


class FoldedVideos:
    """Videos prepared once, to be pooled by any texts with few operations for each pair.

    The attention weights sum to one and both LayerNorms after them are affine except for one number of each pair, so
    every pooled vector of a video lies in the span of ``basis_VLD``. Nothing of size D x D is done for a pair.

    Its twin with dropout, for training, is :meth:`tmass_dist.models.pooling.XPool.pool`; ``tests/test_scoring.py``
    holds the two equal.
    """

    def __init__(self, pooling: Pooling, frames_VFD: Tensor) -> None:
        self.pooling = pooling
        if isinstance(pooling, MeanPool):
            self.basis_VLD = pooling.prepare(frames_VFD).mean_VD[:, None]
            return
        if isinstance(pooling, FramePool | LateInteraction):
            self.basis_VLD = pooling.prepare(frames_VFD).unit_VFD
            return
        width = frames_VFD.shape[-1]
        self.prepared = pooling.prepare(frames_VFD)
        first, last = pooling.norm_attended, pooling.norm_out
        constant_D = first.bias + pooling.linear(first.bias)
        contributions = [self.prepared.attended_VKD + self.prepared.projected_VKD]
        basis = torch.cat([*contributions, constant_D.expand(len(frames_VFD), 1, width)], dim=1)
        basis = basis - basis.mean(-1, keepdim=True)
        self.gram_out = basis @ basis.transpose(1, 2) / width
        parts = [basis * last.weight, last.bias.expand(len(frames_VFD), 1, width)]
        if self.prepared.unit_VFD is not None:
            parts.append(pooling.best_frame_weight * self.prepared.unit_VFD)
        self.basis_VLD = torch.cat(parts, dim=1)

    def queries(self, text_TD: Tensor) -> Tensor:
        """Attention queries of the texts for :meth:`coefficients`; they serve all videos folded with this pooling."""
        if not isinstance(self.pooling, XPool):
            return text_TD[None]
        return self.pooling.queries(text_TD, self.prepared.in_frame_space)

    def coefficients(self, text_TD: Tensor, query_HTE: Tensor) -> Tensor:
        """Weights ``(V, T, L)`` of each pooled vector on its video's basis.

        Args:
            text_TD: what pools: the texts, or their samples.
            query_HTE: :meth:`queries` of it.
        """
        pooling = self.pooling
        assert not isinstance(pooling, LateInteraction), "it does not pool"
        if isinstance(pooling, MeanPool):
            return text_TD.new_ones(len(self.basis_VLD), len(text_TD), 1)
        if isinstance(pooling, FramePool):
            return pooling.weights(text_TD, self.basis_VLD)
        weights = pooling.attended_weights(query_HTE, self.prepared)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        weights = pooling.normalised(weights, self.gram_out, pooling.norm_out.eps)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1).transpose(1, 2)
        if pooling.best_frame is None or self.prepared.unit_VFD is None:
            return weights
        return torch.cat([weights, pooling.best_frame.weights(text_TD, self.prepared.unit_VFD)], dim=-1)

    def pooled(self, text_TD: Tensor) -> Tensor:
        """The pooled vectors ``(V, T, D)``."""
        return self.coefficients(text_TD, self.queries(text_TD)) @ self.basis_VLD

    def cosines(self, text_TD: Tensor) -> Tensor:
        """Cosine ``(T, V)`` of each text with each video as it is pooled by that text."""
        if isinstance(self.pooling, LateInteraction):
            return TokenPairs(self.pooling, self.basis_VLD).cosines(text_TD[None])[:, 0].T
        direction_TVD = F.normalize(self.pooled(text_TD).transpose(0, 1), dim=-1)
        return torch.einsum("td,tvd->tv", F.normalize(text_TD, dim=-1), direction_TVD)
