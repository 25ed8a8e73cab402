"""The pooling of evaluation: every pooled vector of a video as a weighted sum of a few vectors of that video."""

# Shapes: T texts, V videos, F frames, H heads, K = H F, L = K + 2 (1 for mean pooling), D embedding width, E = D / H.

from __future__ import annotations

import torch
from torch import Tensor

from tmass_dist.models.pooling import MeanPool, XPool


class FoldedVideos:
    """Videos prepared once, to be pooled by any texts with few operations for each pair.

    The attention weights sum to one and both LayerNorms after them are affine except for one number of each pair, so
    every pooled vector of a video lies in the span of ``basis_VLD``. Nothing of size D x D is done for a pair.

    Its twin with dropout, for training, is :meth:`tmass_dist.models.pooling.XPool.pool`; ``tests/test_scoring.py``
    holds the two equal.
    """

    def __init__(self, pooling: XPool | MeanPool, frames_VFD: Tensor) -> None:
        self.pooling = pooling
        if isinstance(pooling, MeanPool):
            self.basis_VLD = pooling.prepare(frames_VFD).mean_VD[:, None]
            return
        width = frames_VFD.shape[-1]
        self.prepared = pooling.prepare(frames_VFD)
        first, last = pooling.norm_attended, pooling.norm_out
        constant_D = first.bias + pooling.linear(first.bias)
        contributions = [self.prepared.attended_VKD + self.prepared.projected_VKD]
        basis = torch.cat([*contributions, constant_D.expand(len(frames_VFD), 1, width)], dim=1)
        basis = basis - basis.mean(-1, keepdim=True)
        self.gram_out = basis @ basis.transpose(1, 2) / width
        self.basis_VLD = torch.cat([basis * last.weight, last.bias.expand(len(frames_VFD), 1, width)], dim=1)

    def queries(self, text_TD: Tensor) -> Tensor:
        """Attention queries of the texts for :meth:`coefficients`; they serve all videos folded with this pooling."""
        if isinstance(self.pooling, MeanPool):
            return text_TD[None]
        return self.pooling.queries(text_TD, self.prepared.in_frame_space)

    def coefficients(self, query_HTE: Tensor) -> Tensor:
        """Weights ``(V, T, L)`` of each pooled vector on its video's basis."""
        pooling = self.pooling
        if isinstance(pooling, MeanPool):
            return query_HTE.new_ones(len(self.basis_VLD), query_HTE.shape[1], 1)
        weights = pooling.attended_weights(query_HTE, self.prepared)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        weights = pooling.normalised(weights, self.gram_out, pooling.norm_out.eps)
        return torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1).transpose(1, 2)

    def pooled(self, text_TD: Tensor) -> Tensor:
        """The pooled vectors ``(V, T, D)``."""
        return self.coefficients(self.queries(text_TD)) @ self.basis_VLD
