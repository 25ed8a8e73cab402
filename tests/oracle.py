"""Slow and plain references: the equations of the paper one pair at a time, and ranks of whole matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.evaluation.ranking import DSL_SCALE, rank
from tmass_dist.models.frame_pooling import FramePool
from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.late_interaction import LateInteraction
from tmass_dist.models.pooling import XPool
from tmass_dist.training.losses import temperature

# Shapes: T texts, V videos, F frames, M trials, D embedding width.


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def pooled(head: RetrievalHead, query_D: Tensor, frames_FD: Tensor) -> Tensor:
    """One video pooled with one text (or sample) as the query, ``(D,)``."""
    pool = head.pooling
    unit_FD = _unit(frames_FD)
    cosine_F = unit_FD @ _unit(query_D)
    if isinstance(pool, FramePool) and pool.kind == "query_scored":
        return (cosine_F / pool.tau).softmax(dim=0) @ unit_FD
    if isinstance(pool, FramePool):
        return unit_FD[cosine_F.argmax()]
    if not isinstance(pool, XPool):
        return unit_FD.mean(dim=0)
    attended_D = _attended(pool, query_D, frames_FD)
    if pool.best_frame is None:
        return attended_D
    return attended_D + pool.best_frame_weight * unit_FD[cosine_F.argmax()]


def _attended(pool: XPool, text_D: Tensor, frames_FD: Tensor) -> Tensor:
    """The attention layer of X-Pool for one text and one video."""
    width = text_D.shape[0] // pool.num_heads
    query_D, key_FD = pool.query(pool.norm_in(text_D)), pool.key(pool.norm_in(frames_FD))
    value_FD = pool.value(pool.norm_in(frames_FD))
    parts = []
    for number in range(pool.num_heads):
        columns = slice(number * width, (number + 1) * width)
        weight_F = (key_FD[:, columns] @ query_D[columns] / width**0.5).softmax(dim=0)
        parts.append(weight_F @ value_FD[:, columns])
    attended_D = pool.norm_attended(pool.out(torch.cat(parts)))
    return pool.norm_out(attended_D + pool.linear(attended_D))


def similarities(
    head: RetrievalHead, text_TD: Tensor, frames_VFD: Tensor, noise_TMD: Tensor | None, pooled_by: str = "text"
) -> Tensor:
    """``query_conditioned`` similarity ``(T, V)``: every pair pooled with its own text, the best of its samples."""
    rows = []
    for number, text_D in enumerate(text_TD):
        row = []
        for frames_FD in frames_VFD:
            if isinstance(head.pooling, LateInteraction):
                row.append(late_interaction(head.pooling, text_D.unflatten(0, (-1, frames_FD.shape[1])), frames_FD))
                continue
            if head.mass is not None and head.mass.scoring != "samples":
                row.append(closed_form(head, text_D, frames_FD))
                continue
            if head.mass is None or noise_TMD is None:
                row.append(_unit(text_D) @ _unit(pooled(head, text_D, frames_FD)))
                continue
            cosine_F = _unit(frames_FD) @ _unit(text_D)
            radius_D = head.mass.radius_of(cosine_F, text_D)
            samples = [text_D + radius_D * noise_D for noise_D in noise_TMD[number % len(noise_TMD)]]
            queries = samples if pooled_by == "sample" else [text_D] * len(samples)
            row.append(max(_unit(s) @ _unit(pooled(head, q, frames_FD)) for s, q in zip(samples, queries)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def late_interaction(pool: LateInteraction, tokens_LD: Tensor, frames_FD: Tensor) -> Tensor:
    """Score of one pair: each token's cosine with its closest frame, averaged; rows of zeros are no tokens."""
    tokens = [_unit(token_D) for token_D in tokens_LD if token_D.any()]
    found_L = torch.stack([max(_unit(frames_FD) @ token_D) for token_D in tokens])
    if pool.token_weight is None:
        return found_L.mean()
    return torch.stack([pool.token_weight(token_D)[0] for token_D in tokens]).softmax(dim=0) @ found_L


def closed_form(head: RetrievalHead, text_D: Tensor, frames_FD: Tensor) -> Tensor:
    """Score of one pair by the whole mass, from its moments."""
    assert head.mass is not None
    radius_D = head.mass.radius_of(_unit(frames_FD) @ _unit(text_D), text_D).expand_as(text_D)
    direction_D = _unit(pooled(head, text_D, frames_FD))
    if head.mass.scoring == "temperature":
        return _unit(text_D) @ direction_D / radius_D.mean()
    # E[(t + R eps) . d] and E[|t + R eps|^2] for eps of mean 0 and variance 1.
    return (text_D @ direction_D) / (text_D.square() + radius_D.square()).sum().sqrt()


def rank_texts(similarity_TV: Tensor, owner_T: Tensor) -> Tensor:
    """Text-to-video ranks of a whole matrix; videos need no caption."""
    assert not torch.isnan(similarity_TV).any()
    return (similarity_TV >= similarity_TV.gather(1, owner_T[:, None])).sum(dim=1)


def rank_videos(similarity_TV: Tensor, owner_T: Tensor) -> Tensor:
    """Video-to-text ranks of a whole matrix, with texts in any order."""
    order = owner_T.argsort(stable=True)
    return rank(lambda: [similarity_TV[order]], owner_T[order], similarity_TV.shape[1]).v2t_V


def dsl(similarity_TV: Tensor) -> Tensor:
    """Each similarity times its softmax over the queries (rows). Source: Cheng et al., 2021, arXiv:2109.04290."""
    return similarity_TV * (DSL_SCALE * similarity_TV).softmax(dim=0)


def symmetric_info_nce(similarity_NN: Tensor, logit_scale: Tensor) -> Tensor:
    """The mean of the cross-entropies over rows and over columns of one whole matrix, rows texts, columns videos."""
    logits_NN = similarity_NN * temperature(logit_scale)
    truth_N = torch.arange(len(logits_NN))
    return (F.cross_entropy(logits_NN, truth_N) + F.cross_entropy(logits_NN.T, truth_N)) / 2
