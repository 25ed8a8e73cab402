"""From similarities to ranks and metrics; pure. Rows are texts, columns videos; ties count against us."""

# Shapes: T texts, V videos.

from __future__ import annotations

import torch
from torch import Tensor


def _checked(similarity_TV: Tensor) -> Tensor:
    bad = torch.isnan(similarity_TV).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{len(bad)} texts have a similarity that is not a number; the first rows are {bad[:5]}")
    return similarity_TV


def rank_texts(similarity_TV: Tensor, owner_T: Tensor) -> Tensor:
    """Text to video: the 1-based rank of each text's own video.

    Args:
        similarity_TV: higher is closer.
        owner_T: number of the video that each text belongs to.
    """
    own_T1 = _checked(similarity_TV).gather(1, owner_T[:, None])
    return (similarity_TV >= own_T1).sum(dim=1)  # the own video counts once: 1-based


def rank_videos(similarity_TV: Tensor, owner_T: Tensor) -> Tensor:
    """Video to text: each video is asked by its best caption against the best caption of every other video.

    Returns:
        1-based ranks ``(V,)``.

    Raises:
        ValueError: a video has no caption.
    """
    num_videos = similarity_TV.shape[1]
    captioned = torch.bincount(owner_T, minlength=num_videos) > 0
    if not captioned.all():
        raise ValueError(
            f"{int((~captioned).sum())} videos have no caption: {(~captioned).nonzero().flatten().tolist()[:5]}"
        )
    best_VV = torch.full((num_videos, num_videos), -torch.inf, dtype=similarity_TV.dtype)
    best_VV.scatter_reduce_(0, owner_T[:, None].expand_as(similarity_TV), _checked(similarity_TV), reduce="amax")
    return (best_VV >= best_VV.diagonal()[None]).sum(dim=0)


def metrics(ranks: Tensor) -> dict[str, float]:
    """R@K in percent, median and mean rank of 1-based ranks."""
    recalls = {f"R@{k}": 100.0 * (ranks <= k).double().mean().item() for k in (1, 5, 10, 50, 100)}
    return recalls | {"MdR": ranks.double().quantile(0.5).item(), "MnR": ranks.double().mean().item()}


def dsl(similarity_TV: Tensor, scale: float = 100.0) -> Tensor:
    """Dual softmax: each similarity times its softmax over the queries (rows). It sees all queries: transductive.

    Source: Cheng et al., 2021, arXiv:2109.04290.
    """
    return similarity_TV * (scale * similarity_TV).softmax(dim=0)
