"""Exact scores of one text with some videos, and its attention over their frames.

The twin of ``evaluation/scoring.py`` for a single query. That module prepares each video once, for many texts, by
products of D x D matrices with all its frames. For one text it is faster to sum the frames first, with their attention
weights, and to multiply the sums. ``tests/test_search.py`` holds the two equal.
"""

# Shapes: V videos, F frames, H heads, E = D / H, M trials, D embedding width.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.pooling import XPool


@torch.inference_mode()
def score_one_text(
    head: RetrievalHead, text_D: Tensor, frames_VFD: Tensor, noise_MD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores ``(V,)`` of a text, and attention weights ``(V, F)``, mean over heads.

    Without an attention (mean pooling), the weights are the cosines of text and frames.

    Args:
        head: in evaluation mode, pooling with the text as the query.
        text_D: the text embedding.
        frames_VFD: the videos, raw embeddings in time order.
        noise_MD: of the text's samples; None scores the text embedding itself.
    """
    unit_VFD = F.normalize(frames_VFD, dim=-1)
    cosine_VF = unit_VFD @ F.normalize(text_D, dim=-1)
    if isinstance(head.pooling, XPool):
        pooled_VD, weights_VF = _pool(head.pooling, text_D, frames_VFD)
    else:
        pooled_VD, weights_VF = unit_VFD.mean(dim=1), cosine_VF
    pooled_VD = F.normalize(pooled_VD, dim=-1)
    if noise_MD is None or head.mass is None:
        return pooled_VD @ F.normalize(text_D, dim=-1), weights_VF
    radius_VD = head.mass.radius_of(cosine_VF, text_D.expand(len(frames_VFD), -1)).expand_as(pooled_VD)
    # |t + R eps| and (t + R eps).v by products of matrices; the samples themselves, V M D numbers, are not needed.
    dot_VM = (pooled_VD @ text_D)[:, None] + (radius_VD * pooled_VD) @ noise_MD.T
    square_VM = text_D.square().sum() + radius_VD @ (2 * text_D * noise_MD).T + radius_VD.square() @ noise_MD.square().T
    return (dot_VM / square_VM.clamp_min(1e-24).sqrt()).amax(dim=1), weights_VF


def _pool(pool: XPool, text_D: Tensor, frames_VFD: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled vectors ``(V, D)`` and attention weights ``(V, F)``, mean over heads."""
    normed_VFD = pool.norm_in(frames_VFD)
    query_HD = pool.queries(text_D[None], in_frame_space=True)[:, 0]
    weights_VHF = (query_HD @ normed_VFD.transpose(1, 2)).softmax(dim=-1)
    mean_VHD = weights_VHF @ normed_VFD
    # Each head's weights sum to one, so the value projection may follow the sum; each head has its part of the matrix.
    weight_HED = pool.value.weight.unflatten(0, (pool.num_heads, -1))
    value_VD = torch.einsum("vhd,hed->vhe", mean_VHD, weight_HED).flatten(1) + pool.value.bias
    attended_VD = pool.norm_attended(pool.out(value_VD))
    return pool.norm_out(attended_VD + pool.linear(attended_VD)), weights_VHF.mean(dim=1)
