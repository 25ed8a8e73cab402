"""The shortlist of a search: of many candidates, those whose exact score is worth computing.

Most of the time of an exact score goes into the layers of the pooling, products with D x D matrices for each video.
They are linear but for the deviations that their two LayerNorms divide by. So the dot product of a text with the pooled
vector is, up to these divisions, that of one direction, made from the text and the layers once, with the sum of frames
that the attention weighs. The approximate score is the cosine of the two: it takes the norm of that sum in place of the
deviations. It orders candidates well, and takes a fifth of the time; ``docs/performance.md`` has what it loses.
"""

# Shapes: V videos, F frames, H heads, K = H D, C columns, D embedding width.

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.pooling import XPool

SHORTLIST = 400
"""Fewest videos that get the exact score. Of 2,000 candidates among 100,000 generated videos, the best 400 by the
approximate score held as many of the exact first 10 as all 2,000."""
PER_RESULT = 40
"""Videos on the shortlist for each result that is wanted, where that is more."""
TILE_VIDEOS = 128
"""Videos of a tile: their frames, 3 MB at 12 x 512, stay in the processor's cache."""


def shortlist_size(num_results: int) -> int:
    """Number of videos that get the exact score."""
    return max(SHORTLIST, PER_RESULT * num_results)


def search_label(num_videos: int, num_candidates: int, num_exact: int, *, at_most: bool = False) -> str:
    """What a search states of its candidates: which videos got the exact score.

    Args:
        num_videos: of the gallery.
        num_candidates: K.
        num_exact: how many of them get the exact score.
        at_most: whether a query may have fewer candidates.
    """
    if num_candidates >= num_videos:
        return "exact scores of all videos"
    candidates = f"{'at most ' if at_most else ''}{num_candidates} candidates"
    if num_exact >= num_candidates:
        return f"exact scores of {candidates}"
    return f"exact scores of the best {num_exact} of {candidates}"


class Shortlist:
    """Approximate scores of one text with some videos.

    Args:
        head: it must not change afterwards.
    """

    def __init__(self, head: RetrievalHead) -> None:
        self.pool = head.pooling
        if not isinstance(self.pool, XPool):
            return
        pool = self.pool
        with torch.inference_mode():
            # The weights of a head sum to one, so the value and output projections may follow the sum of frames.
            value_HED = pool.value.weight.unflatten(0, (pool.num_heads, -1))
            out_HDE = pool.out.weight.unflatten(1, (pool.num_heads, -1)).transpose(0, 1)
            self.projection_KD = (out_HDE @ value_HED).transpose(1, 2).flatten(0, 1).contiguous()
            self.projection_bias_D = pool.out(pool.value.bias)

    @staticmethod
    def applies(head: RetrievalHead, pooled_by: str) -> bool:
        """Whether there is an approximate score: only for X-Pool, whose layers take the time."""
        return isinstance(head.pooling, XPool) and head.pooling.best_frame is None and pooled_by == "text"

    @torch.inference_mode()
    def scores(self, text_D: Tensor, tiles: Iterable[Tensor]) -> Tensor:
        """Approximate scores ``(V,)`` on the CPU. They order videos, and are comparable for one text only.

        Args:
            text_D: the text's embedding, on the head's device.
            tiles: the videos, some at a time: ``(V, F, D)`` raw embeddings in time order, of any floating type.
        """
        pool, direction, found = self.pool, self.direction(text_D), []
        assert isinstance(pool, XPool)
        queries_HD = frame_queries(pool, text_D)
        columns_CD = torch.cat([torch.full_like(text_D, 1 / len(text_D))[None], queries_HD])
        for tile in tiles:
            frames_VFD = tile.to(text_D.device).float()
            products_VFC = F.linear(frames_VFD, columns_CD)
            norm_VF = torch.linalg.vector_norm(frames_VFD, dim=-1)
            summed_VHD, _ = attended_sums(
                pool, queries_HD, frames_VFD, products_VFC[..., 0], products_VFC[..., 1:], norm_VF
            )
            found.append(direction.scores(summed_VHD))
        return torch.cat(found).cpu()

    def direction(self, text_D: Tensor) -> Direction:
        """What the approximate scores of a text need of it."""
        pool = self.pool
        assert isinstance(pool, XPool)
        # The layers, transposed, from the last to the first; a LayerNorm subtracts the mean and multiplies.
        after_D = _centred(text_D * pool.norm_out.weight)
        direction_D = _centred((after_D + after_D @ pool.linear.weight) * pool.norm_attended.weight)
        return Direction(self.projection_KD @ direction_D, direction_D @ self.projection_bias_D)


class Direction(NamedTuple):
    """A text, taken back through the layers of the pooling to the sums of frames."""

    direction_K: Tensor
    constant: Tensor

    def scores(self, summed_VHD: Tensor) -> Tensor:
        """Approximate scores ``(V,)`` of videos; ``summed_VHD`` as :func:`attended_sums` returns it."""
        summed_VK = summed_VHD.flatten(1)
        norm_V = torch.linalg.vector_norm(summed_VK, dim=1).clamp_min(1e-12)
        return (summed_VK @ self.direction_K + self.constant) / norm_V


def frame_queries(pool: XPool, text_D: Tensor) -> Tensor:
    """What raw frames are multiplied by for the attention of one text, ``(H, D)``."""
    return pool.norm_in.weight * pool.queries(text_D[None], in_frame_space=True)[:, 0]


def attended_sums(
    pool: XPool, queries_HD: Tensor, frames_VFD: Tensor, mean_VF: Tensor, products_VFH: Tensor, norm_VF: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums ``(V, H, D)`` of the frames after ``norm_in``, weighed by each head's attention; its weights ``(V, F, H)``.

    Args:
        pool: the pooling.
        queries_HD: :func:`frame_queries`.
        frames_VFD: raw embeddings.
        mean_VF: mean of each frame over D.
        products_VFH: of the frames with ``queries_HD``.
        norm_VF: of the frames.
    """
    # norm_in(f) is (f - mean) / deviation * gain + bias: neither the attention nor the sum needs it of every frame.
    norm_in, mean_VF1 = pool.norm_in, mean_VF[..., None]
    variance_VF1 = norm_VF[..., None].square() / frames_VFD.shape[-1] - mean_VF1.square()
    scale_VF1 = (variance_VF1.clamp_min(0) + norm_in.eps).rsqrt()
    logits_VFH = (products_VFH - mean_VF1 * queries_HD.sum(dim=1)) * scale_VF1
    weights_VFH = logits_VFH.softmax(dim=1)
    scaled_VHF = (weights_VFH * scale_VF1).transpose(1, 2)
    return (scaled_VHF @ frames_VFD - scaled_VHF @ mean_VF1) * norm_in.weight + norm_in.bias, weights_VFH


def _centred(vector_D: Tensor) -> Tensor:
    return vector_D - vector_D.mean()
