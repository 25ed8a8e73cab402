"""Exact scores of one text with some videos, and its attention over their frames.

The twin of ``evaluation/scoring.py`` for a single query. That module prepares each video once, for many texts, by
products of D x D matrices with all its frames. For one text it is faster to sum the frames first, with their attention
weights, and to multiply the sums. ``tests/test_search.py`` holds the two equal.
"""

# Shapes: V videos, F frames, H heads, C columns, M trials, D embedding width.

from __future__ import annotations

from collections.abc import Iterable
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


class _Attended(NamedTuple):
    """Videos as a text attends to them: what their scores need."""

    summed_VHD: Tensor
    """Sums of the frames, weighed by each head."""
    weights_VF: Tensor
    """Of the frames, mean over heads."""
    cosine_VF: Tensor
    """Of the text with each frame."""


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
            # It refuses frames that are not numbers; here, as below, only the scores of their videos are none.
            is_number_V = frames_VFD.isfinite().flatten(1).all(dim=1)
            finite_VFD = frames_VFD.where(is_number_V[:, None, None], 0)
            scores_V = model.similarity([text], finite_VFD, text_TD=text_D[None])[0].where(is_number_V, torch.nan)
            return scores_V.cpu(), model.attention(text_D[None], frames_VFD)[:, 0].cpu()
        query = self._query(text, text_D)
        tiles = [self._score_tile(query, tile.to(model.device).float()) for tile in frames_VFD.split(TILE_VIDEOS)]
        scores, weights = zip(*tiles)
        return torch.cat(scores).cpu(), torch.cat(weights).cpu()

    @torch.inference_mode()
    def score_shortlist(
        self, text: str, text_D: Tensor, tiles: Iterable[Tensor], number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ``number`` best videos by the approximate score: their numbers, ascending, and what :meth:`score` gives.

        Both scores need the same sums of frames, so each video is read and attended to once.

        Args:
            text: the query.
            text_D: its embedding.
            tiles: at least ``number`` videos, some at a time: ``(V, F, D)``, of any floating type.
            number: K.

        Returns:
            Numbers ``(K,)`` of the videos, their exact scores ``(K,)`` and their attention ``(K, F)``, on the CPU.
        """
        pool, query = self.head.pooling, self._query(text, text_D.to(self.model.device))
        assert isinstance(pool, XPool)
        direction = self.shortlist.direction(query.text_D)
        attended = [self._attend(pool, query, tile.to(self.model.device).float()) for tile in tiles]
        score_V = torch.cat([direction.scores(tile.summed_VHD) for tile in attended])
        best_K = score_V.topk(number).indices.sort().values
        best = _Attended(*(torch.cat(parts)[best_K] for parts in zip(*attended)))
        score_K = self._scores(query, self._pool(pool, best.summed_VHD), best.cosine_VF)
        return best_K.cpu(), score_K.cpu(), best.weights_VF.cpu()

    def _query(self, text: str, text_D: Tensor) -> _Text:
        model, noise_MD = self.model, None
        if self.head.draws_samples:
            noise_MD = caption_noise([text], model.config, model.embed_dim, model.device)[0]
        unit_D = F.normalize(text_D, dim=-1)
        columns = [torch.full_like(text_D, 1 / len(text_D)), unit_D]
        if isinstance(self.head.pooling, XPool):
            columns += list(frame_queries(self.head.pooling, text_D))
        return _Text(text_D, unit_D, torch.stack(columns), noise_MD)

    def _score_tile(self, query: _Text, frames_VFD: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.head.pooling, XPool):
            pool, attended = self.head.pooling, self._attend(self.head.pooling, query, frames_VFD)
            weights_VF, cosine_VF = attended.weights_VF, attended.cosine_VF
            pooled_VD = self._pool(pool, attended.summed_VHD)
            if pool.best_frame is not None:
                closest_VD = _weighted_frames(best_frame_weights(cosine_VF), frames_VFD)
                pooled_VD = pooled_VD + pool.best_frame_weight * closest_VD
            return self._scores(query, pooled_VD, cosine_VF), weights_VF
        cosine_VF = F.linear(frames_VFD, query.unit_D[None])[..., 0] / _norms(frames_VFD)
        if isinstance(self.head.pooling, FramePool):
            weights_VF = self.head.pooling.weights_of(cosine_VF)
            pooled_VD = _weighted_frames(weights_VF, frames_VFD)
        else:
            pooled_VD = (frames_VFD / _norms(frames_VFD)[..., None]).mean(dim=1)
            weights_VF = (cosine_VF * self.model.towers.logit_scale.exp()).softmax(dim=-1)
        return self._scores(query, pooled_VD, cosine_VF), weights_VF

    def _scores(self, query: _Text, pooled_VD: Tensor, cosine_VF: Tensor) -> Tensor:
        """Scores ``(V,)`` of the text with pooled videos, best of M where samples are drawn."""
        pooled_VD = F.normalize(pooled_VD, dim=-1)
        if self.head.mass is None:
            return pooled_VD @ query.unit_D
        text_D, noise_MD = query.text_D, query.noise_MD
        radius_VD = self.head.mass.radius_of(cosine_VF, text_D.expand_as(pooled_VD))
        if noise_MD is None:
            return pooled_VD @ query.unit_D * self.head.mass.cosine_factor(text_D.expand_as(pooled_VD), radius_VD)
        radius_VD = radius_VD.expand_as(pooled_VD)
        # |t + R eps| and (t + R eps).v by products of matrices; the samples themselves, V M D numbers, are not needed.
        dot_VM = (pooled_VD @ text_D)[:, None] + (radius_VD * pooled_VD) @ noise_MD.T
        square_VM = (
            text_D.square().sum() + radius_VD @ (2 * text_D * noise_MD).T + radius_VD.square() @ noise_MD.square().T
        )
        return (dot_VM / square_VM.clamp_min(1e-24).sqrt()).amax(dim=1)

    def _attend(self, pool: XPool, query: _Text, frames_VFD: Tensor) -> _Attended:
        products_VFC = F.linear(frames_VFD, query.columns_CD)
        norm_VF, mean_VF, queries_HD = _norms(frames_VFD), products_VFC[..., 0], query.columns_CD[2:]
        summed_VHD, weights_VFH = attended_sums(pool, queries_HD, frames_VFD, mean_VF, products_VFC[..., 2:], norm_VF)
        return _Attended(summed_VHD, weights_VFH.mean(dim=2), products_VFC[..., 1] / norm_VF)

    def _pool(self, pool: XPool, summed_VHD: Tensor) -> Tensor:
        """Pooled vectors ``(V, D)`` of the attended sums of frames."""
        attended_VD = summed_VHD.flatten(1) @ self.shortlist.projection_KD + self.shortlist.projection_bias_D
        attended_VD = pool.norm_attended(attended_VD)
        return pool.norm_out(attended_VD + pool.linear(attended_VD))


def _norms(frames_VFD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(frames_VFD, dim=-1).clamp_min(1e-12)


def _weighted_frames(weights_VF: Tensor, frames_VFD: Tensor) -> Tensor:
    """Weighted sums ``(V, D)`` of the frames, each divided by its norm."""
    return ((weights_VF / _norms(frames_VFD))[:, None] @ frames_VFD).squeeze(1)
