"""From similarities to ranks and metrics; pure. Rows are texts, columns videos; ties count against us.

The similarities come as blocks of rows, read as often as needed, so that no more than one of them is in memory.
"""

# Shapes: T texts, V videos.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tmass_dist.errors import UserError

Blocks = Callable[[], Iterable[Tensor]]
"""Gives the rows from the first to the last, in blocks of any size, every time it is called."""

PostProcessing = Literal["none", "dsl", "qbnorm"]


@dataclass(frozen=True)
class Ranks:
    """1-based ranks of the right answer."""

    t2v_T: Tensor
    v2t_V: Tensor


def rank(
    blocks: Blocks, owner_T: Tensor, num_videos: int, post: PostProcessing = "none", bank: Bank | None = None
) -> Ranks:
    """Rank both directions.

    Text to video: each text's own video among all. Video to text: each video is asked by its best caption against
    the best caption of every other video.

    Args:
        blocks: similarities, higher is closer.
        owner_T: number of the video that each text belongs to; it never falls.
        num_videos: columns.
        post: ``dsl`` sees all queries, ``qbnorm`` a bank of training queries: transductive, and labelled so.
        bank: what ``qbnorm`` needs.

    Raises:
        UserError: a similarity that is not a number (rows named), a video without a caption, or too few rows.
    """
    if (owner_T.diff() < 0).any():
        raise UserError("texts must come in the order of their videos")
    captioned = torch.bincount(owner_T, minlength=num_videos) > 0
    if not captioned.all():
        bad = (~captioned).nonzero().flatten().tolist()
        raise UserError(f"{len(bad)} videos have no caption: {bad[:5]}")
    if post == "qbnorm" and bank is None:
        raise UserError("qbnorm needs a bank of training queries: give --bank FEATURES")
    over_texts = _log_sum_exp_of_columns(blocks, num_videos) if post == "dsl" else None

    def processed() -> Iterable[tuple[int, Tensor, Tensor]]:
        start = 0
        for block in blocks():
            bad = torch.isnan(block).any(dim=1).nonzero().flatten()
            if len(bad):
                rows = (bad + start).tolist()
                raise UserError(
                    f"{len(rows)} texts have a similarity that is not a number; the first rows are {rows[:5]}"
                )
            t2v = v2t = block
            if over_texts is not None:
                t2v = block * (_SCALE * block - over_texts).exp()
                v2t = block * (_SCALE * block).softmax(dim=1)
            elif bank is not None and post == "qbnorm":
                t2v = bank.normalised(block)
            yield start, t2v, v2t
            start += len(block)
        if start != len(owner_T):
            raise UserError(f"there are {start} rows of similarities and {len(owner_T)} texts")

    t2v_ranks, own_best_V = [], torch.full((num_videos,), -torch.inf, dtype=torch.float64)
    for start, t2v, v2t in processed():
        owner = owner_T[start : start + len(t2v)]
        t2v_ranks.append((t2v >= t2v.gather(1, owner[:, None])).sum(dim=1))  # the own video counts once: 1-based
        own_best_V.scatter_reduce_(0, owner, v2t.gather(1, owner[:, None])[:, 0].to(own_best_V.dtype), "amax")
    # A video's captions may lie in two blocks: its best row is carried over.
    v2t_V, carried_V, current = torch.zeros(num_videos, dtype=torch.long), None, -1
    for start, _, v2t in processed():
        owner = owner_T[start : start + len(v2t)]
        ids, counts = owner.unique_consecutive(return_counts=True)
        for video, rows in zip(ids.tolist(), v2t.split(counts.tolist())):
            best_V = rows.amax(dim=0)
            if video == current and carried_V is not None:
                carried_V = torch.maximum(carried_V, best_V)
                continue
            if carried_V is not None:
                v2t_V += carried_V >= own_best_V
            carried_V, current = best_V, video
    assert carried_V is not None
    v2t_V += carried_V >= own_best_V
    return Ranks(torch.cat(t2v_ranks), v2t_V)


_SCALE = 100.0
"""Inverse temperature of the dual softmax (Cheng et al., 2021)."""


def _log_sum_exp_of_columns(blocks: Blocks, num_videos: int) -> Tensor:
    """``log sum_t exp(100 S)`` of every column, streamed."""
    total_V = torch.full((num_videos,), -torch.inf)
    for block in blocks():
        total_V = torch.logaddexp(total_V, torch.logsumexp(_SCALE * block, dim=0))
    return total_V


class Bank:
    """Training queries against the gallery, for QB-Norm's dynamic inverted softmax.

    Source: Bogolin et al., CVPR 2022, arXiv:2112.12777.
    """

    def __init__(self, blocks: Blocks, num_videos: int, beta: float = 20.0) -> None:
        self.beta = beta
        self.total_V = torch.full((num_videos,), -torch.inf)
        self.hub_V = torch.zeros(num_videos, dtype=torch.bool)
        for block in blocks():
            self.total_V = torch.logaddexp(self.total_V, torch.logsumexp(beta * block, dim=0))
            self.hub_V[block.argmax(dim=1)] = True  # the nearest video of some query of the bank

    def normalised(self, block: Tensor) -> Tensor:
        """Rows whose nearest video is a hub are divided by what the bank's queries give each video."""
        inverted = (self.beta * block - self.total_V).exp()
        return torch.where(self.hub_V[block.argmax(dim=1)][:, None], inverted, block)


def rank_texts(similarity_TV: Tensor, owner_T: Tensor) -> Tensor:
    """Text to video from a whole matrix; see :func:`rank`. Videos need no caption."""
    bad = torch.isnan(similarity_TV).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{len(bad)} texts have a similarity that is not a number; the first rows are {bad[:5]}")
    return (similarity_TV >= similarity_TV.gather(1, owner_T[:, None])).sum(dim=1)


def rank_videos(similarity_TV: Tensor, owner_T: Tensor) -> Tensor:
    """Video to text from a whole matrix; see :func:`rank`."""
    order = owner_T.argsort(stable=True)
    return rank(lambda: [similarity_TV[order]], owner_T[order], similarity_TV.shape[1]).v2t_V


def metrics(ranks: Tensor) -> dict[str, float]:
    """R@K in percent, median and mean rank of 1-based ranks."""
    recalls = {f"R@{k}": 100.0 * (ranks <= k).double().mean().item() for k in (1, 5, 10, 50, 100)}
    return recalls | {"MdR": ranks.double().quantile(0.5).item(), "MnR": ranks.double().mean().item()}


def intervals(ranks: Tensor, num_samples: int = 1000, seed: int = 0) -> dict[str, list[float]]:
    """Bootstrap 95 % interval of each metric over the queries."""
    rng, values = np.random.default_rng(seed), ranks.double().numpy()
    names = list(metrics(ranks))
    found = []
    for _ in range(num_samples):
        sample = values[rng.integers(len(values), size=len(values))]
        recalls = [100.0 * float((sample <= k).mean()) for k in (1, 5, 10, 50, 100)]
        found.append([*recalls, float(np.median(sample)), float(sample.mean())])
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(names, low, high)}


def dsl(similarity_TV: Tensor) -> Tensor:
    """Dual softmax of a whole matrix: each similarity times its softmax over the queries (rows).

    Source: Cheng et al., 2021, arXiv:2109.04290.
    """
    return similarity_TV * (_SCALE * similarity_TV).softmax(dim=0)


def chance(num_videos: int) -> dict[str, float]:
    """Metrics of a random order of ``num_videos`` videos with one right answer."""
    recall = {f"R@{k}": 100.0 * min(k, num_videos) / num_videos for k in (1, 5, 10, 50, 100)}
    middle = math.fsum((1, num_videos)) / 2
    return recall | {"MdR": middle, "MnR": middle}
