"""Baselines without a head, from the features of the evaluated towers: what a head has to beat.

Source: query scoring is Bain et al., "A CLIP-Hitchhiker's Guide to Long Video Retrieval", 2022, arXiv:2205.08508.
"""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.evaluation.blocks import split_into_blocks
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.ranking import Ranks, metrics, rank

TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Temperatures of query scoring among which validation chooses."""
DEFAULT_TAU = 0.1
"""The temperature of Bain et al., used where no validation has chosen one."""
AUTOMATIC_PAIRS = 2.5e8
"""``evaluation.baselines=auto`` leaves them out above this number of pairs: one process computes them."""
CACHED_BYTES = 2**29
VIDEOS_PER_TILE = 1024


def mean_pooling(cosine_TVF: Tensor, gram_VFF: Tensor) -> Tensor:
    """Cosine ``(T, V)`` of each text with the mean of a video's normalised frames."""
    return _pooled_cosine(cosine_TVF, torch.full_like(cosine_TVF[:1, :1], 1 / cosine_TVF.shape[-1]), gram_VFF)


def best_frame(cosine_TVF: Tensor, gram_VFF: Tensor) -> Tensor:
    """Cosine ``(T, V)`` of each text with its closest frame."""
    return cosine_TVF.amax(dim=-1)


def query_scoring(tau: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Cosine ``(T, V)`` of each text with the sum of a video's frames weighted by ``softmax(cosine / tau)``."""
    return lambda cosine_TVF, gram_VFF: _pooled_cosine(cosine_TVF, (cosine_TVF / tau).softmax(dim=-1), gram_VFF)


def _pooled_cosine(cosine_TVF: Tensor, weights_TVF: Tensor, gram_VFF: Tensor) -> Tensor:
    """Cosine of a text with a weighted sum of normalised frames: w.c / sqrt(w G w)."""
    weights_TVF = weights_TVF.expand_as(cosine_TVF)
    length_TV = torch.einsum("tvf,vfg,tvg->tv", weights_TVF, gram_VFF, weights_TVF).clamp_min(1e-24).sqrt()
    return (weights_TVF * cosine_TVF).sum(dim=-1) / length_TV


def baseline_ranks(features: Features, scores: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> dict[str, Ranks]:
    """Rank both directions by each of several scores of the same cosines.

    Args:
        features: of a split.
        scores: functions of ``cosine_TVF`` and ``gram_VFF`` (the frames' cosines with each other), by name.
    """
    num_texts, num_videos = len(features.owner_T), len(features.video_ids)
    fits = 4 * num_texts * num_videos * len(scores) <= CACHED_BYTES
    cache = list(_blocks(features, scores)) if fits else None

    def blocks_of(name: str) -> Iterator[Tensor]:
        alone = {name: scores[name]}
        return (block[name] for block in (_blocks(features, alone) if cache is None else cache))

    return {name: rank(lambda n=name: blocks_of(n), features.owner_T, num_videos) for name in scores}


def _blocks(features: Features, scores: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Each block's scores by name, ``(block, V)``."""
    text_TD = F.normalize(features.sentences.float(), dim=-1)
    with torch.no_grad():
        for texts in split_into_blocks(features.owner_T):
            tiles: dict[str, list[Tensor]] = {name: [] for name in scores}
            for start in range(0, len(features.frames_VFD), VIDEOS_PER_TILE):
                frames_VFD = F.normalize(features.frames_VFD[start : start + VIDEOS_PER_TILE].float(), dim=-1)
                gram_VFF = frames_VFD @ frames_VFD.transpose(1, 2)
                cosine_TVF = (text_TD[texts] @ frames_VFD.flatten(0, 1).T).unflatten(1, frames_VFD.shape[:2])
                for name, score in scores.items():
                    tiles[name].append(score(cosine_TVF, gram_VFF))
            yield {name: torch.cat(parts, dim=1) for name, parts in tiles.items()}


def frame_baselines(features: Features, tau: float | None) -> dict[str, Ranks]:
    """Ranks of mean pooling, best frame and query scoring, by their name in the tables.

    Args:
        features: of the split.
        tau: of query scoring, as validation chose it; None takes ``DEFAULT_TAU`` and says so.
    """
    source = f"tau {DEFAULT_TAU}, not chosen here" if tau is None else f"tau {tau}, chosen on validation"
    return baseline_ranks(
        features,
        {
            "mean pooling of these towers": mean_pooling,
            "best frame of these towers": best_frame,
            f"query scoring of these towers ({source})": query_scoring(DEFAULT_TAU if tau is None else tau),
        },
    )


def choose_tau(features: Features) -> float:
    """The temperature of query scoring with the highest text-to-video R@1 on the selection split."""
    scores = {str(tau): query_scoring(tau) for tau in TAUS}
    recall = {name: metrics(ranks.t2v_T)["R@1"] for name, ranks in baseline_ranks(features, scores).items()}
    return float(max(recall, key=recall.__getitem__))
