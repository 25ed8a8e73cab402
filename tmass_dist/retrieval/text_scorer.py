"""Exact scores of one text with some videos, and its attention over their frames.

The twin of ``evaluation/scoring.py`` for a single query. That module prepares each video once, for many texts, by
products of D x D matrices with all its frames. For one text it is faster to sum the frames first, with their attention
weights, and to multiply the sums. ``tests/test_search.py`` holds the two equal.
"""

# Shapes: V videos, F frames, H heads, C columns, M trials, D embedding width.

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.evaluation.blocks import caption_noise
from tmass_dist.evaluation.shortlist import TILE_VIDEOS, Shortlist, attended_sums, frame_queries
from tmass_dist.models.frame_pooling import FramePool, best_frame_weights
from tmass_dist.models.late_interaction import LateInteraction
from tmass_dist.models.pooling import XPool
from tmass_dist.retrieval.model import TMass


class _Text(NamedTuple):
    """A text, and its products that no video changes."""

    text_D: Tensor
    unit_D: Tensor
    columns_CD: Tensor
    """What every frame is multiplied by: 1 / D (for the mean), the text of norm 1, and the queries of each head."""
    noise_MD: Tensor | None


class TextScorer:
    """Scores texts one at a time. What depends on the model alone is computed once.

    Args:
        model: its head must not change afterwards.
    """

    def __init__(self, model: TMass) -> None:
        self.model, self.head = model, model.head
        self.shortlist = Shortlist(self.head)

    @torch.inference_mode()
    def score(self, text: str, text_D: Tensor, frames_VFD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``(V,)``, as :meth:`TMass.similarity` gives them, and attention ``(V, F)``, mean over heads.

        Both are on the CPU. A head without attention (mean pooling) gives the softmax of the cosines of text and
        frames, at the towers' temperature; ``xpool_best_frame`` gives the attention without the added frame.

        Args:
            text: the query; its noise is a function of it.
            text_D: its embedding.
            frames_VFD: the videos, raw embeddings in time order, of any floating type.
        """
        model, text_D = self.model, text_D.to(self.model.device)
        # Each sample, or each token, has frames of its own.
        if model.config.model.pooled_by == "sample" or isinstance(self.head.pooling, LateInteraction):
            frames_VFD = frames_VFD.to(model.device).float()
            scores_V = model.similarity([text], frames_VFD, text_TD=text_D[None])[0]
            return scores_V.cpu(), model.attention(text_D[None], frames_VFD)[:, 0].cpu()
        noise_MD = None
        if self.head.draws_samples:
            noise_MD = caption_noise([text], model.config, model.embed_dim, model.device)[0]
        unit_D = F.normalize(text_D, dim=-1)
        columns = [torch.full_like(text_D, 1 / len(text_D)), unit_D]
        if isinstance(self.head.pooling, XPool):
            columns += list(frame_queries(self.head.pooling, text_D))
        query = _Text(text_D, unit_D, torch.stack(columns), noise_MD)
        tiles = [self._score_tile(query, tile.to(model.device).float()) for tile in frames_VFD.split(TILE_VIDEOS)]
        scores, weights = zip(*tiles)
        return torch.cat(scores).cpu(), torch.cat(weights).cpu()

    def _score_tile(self, query: _Text, frames_VFD: Tensor) -> tuple[Tensor, Tensor]:
        products_VFC = F.linear(frames_VFD, query.columns_CD)
        norm_VF = torch.linalg.vector_norm(frames_VFD, dim=-1)
        cosine_VF = products_VFC[..., 1] / norm_VF.clamp_min(1e-12)
        if isinstance(self.head.pooling, XPool):
            pooled_VD, weights_VF = self._pool(self.head.pooling, query, frames_VFD, products_VFC, norm_VF)
            if self.head.pooling.best_frame is not None:
                closest_VD = _weighted_frames(best_frame_weights(cosine_VF), frames_VFD, norm_VF)
                pooled_VD = pooled_VD + self.head.pooling.best_frame_weight * closest_VD
        elif isinstance(self.head.pooling, FramePool):
            weights_VF = self.head.pooling.weights_of(cosine_VF)
            pooled_VD = _weighted_frames(weights_VF, frames_VFD, norm_VF)
        else:
            pooled_VD = (frames_VFD / norm_VF.clamp_min(1e-12)[..., None]).mean(dim=1)
            weights_VF = (cosine_VF * self.model.towers.logit_scale.exp()).softmax(dim=-1)
        pooled_VD = F.normalize(pooled_VD, dim=-1)
        if self.head.mass is None:
            return pooled_VD @ query.unit_D, weights_VF
        text_D, noise_MD = query.text_D, query.noise_MD
        radius_VD = self.head.mass.radius_of(cosine_VF, text_D.expand_as(pooled_VD))
        if noise_MD is None:
            factor_V = self.head.mass.cosine_factor(text_D.expand_as(pooled_VD), radius_VD)
            return pooled_VD @ query.unit_D * factor_V, weights_VF
        radius_VD = radius_VD.expand_as(pooled_VD)
        # |t + R eps| and (t + R eps).v by products of matrices; the samples themselves, V M D numbers, are not needed.
        dot_VM = (pooled_VD @ text_D)[:, None] + (radius_VD * pooled_VD) @ noise_MD.T
        square_VM = (
            text_D.square().sum() + radius_VD @ (2 * text_D * noise_MD).T + radius_VD.square() @ noise_MD.square().T
        )
        return (dot_VM / square_VM.clamp_min(1e-24).sqrt()).amax(dim=1), weights_VF

    def _pool(
        self, pool: XPool, query: _Text, frames_VFD: Tensor, products_VFC: Tensor, norm_VF: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled vectors ``(V, D)`` and attention weights ``(V, F)``, mean over heads."""
        mean_VF, queries_HD = products_VFC[..., 0], query.columns_CD[2:]
        summed_VHD, weights_VFH = attended_sums(pool, queries_HD, frames_VFD, mean_VF, products_VFC[..., 2:], norm_VF)
        attended_VD = summed_VHD.flatten(1) @ self.shortlist.projection_KD + self.shortlist.projection_bias_D
        attended_VD = pool.norm_attended(attended_VD)
        return pool.norm_out(attended_VD + pool.linear(attended_VD)), weights_VFH.mean(dim=2)


def _weighted_frames(weights_VF: Tensor, frames_VFD: Tensor, norm_VF: Tensor) -> Tensor:
    """Weighted sums ``(V, D)`` of the frames, each divided by its norm."""
    return ((weights_VF / norm_VF.clamp_min(1e-12))[:, None] @ frames_VFD).squeeze(1)
