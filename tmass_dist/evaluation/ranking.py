"""From similarities to ranks and metrics. Rows are texts, columns videos; a tie counts against us.

The similarities come as blocks of rows, which may be read several times: one block is in memory at a time.
"""

# Shapes: T texts, V videos.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tmass_dist.errors import UserError

Blocks = Callable[[], Iterable[Tensor]]
"""Returns all rows in order, in blocks of any size, each time it is called."""

PostProcessing = Literal["none", "dsl", "qbnorm"]

CombineOverRanks = Callable[[Tensor, Literal["amax", "sum", "logsumexp"]], Tensor]
"""Reduces a tensor of one rank's rows over all ranks."""

RECALL_AT = (1, 5, 10, 50, 100)


@dataclass(frozen=True)
class Ranks:
    """1-based ranks of the correct answer."""

    t2v_T: Tensor
    v2t_V: Tensor
    owner_T: Tensor
    """Number of each text's video."""


def rank(
    blocks: Blocks,
    owner_T: Tensor,
    num_videos: int,
    post: PostProcessing = "none",
    bank: Bank | None = None,
    combine: CombineOverRanks | None = None,
) -> Ranks:
    """Rank both directions.

    Text to video: each text's own video among all videos. Video to text: a video's best caption among the best captions
    of all videos.

    Args:
        blocks: similarities; higher is closer.
        owner_T: number of the video that each row belongs to; non-decreasing.
        num_videos: columns.
        post: ``dsl`` needs all queries, ``qbnorm`` a bank of training queries; both are transductive.
        bank: needed for ``qbnorm``.
        combine: for several ranks, each with the rows of some videos: ``v2t_V`` is of all of them, ``t2v_T`` of the
            rank's own rows.

    Raises:
        UserError: a similarity that is not a number (rows named), a video without a caption, or too few rows.
    """
    if (owner_T.diff() < 0).any():
        raise UserError("texts must come in the order of their videos")
    captioned_V = torch.bincount(owner_T, minlength=num_videos)
    captioned_V = combine(captioned_V, "sum") if combine else captioned_V
    if not (captioned_V > 0).all():
        bad = (captioned_V == 0).nonzero().flatten().tolist()
        raise UserError(f"{len(bad)} videos have no caption: {bad[:5]}")
    if post == "qbnorm" and bank is None:
        raise UserError("qbnorm needs a bank of training queries: give --bank FEATURES")

    def processed() -> Iterator[tuple[int, Tensor, Tensor]]:
        end = 0
        for start, t2v, v2t in processed_blocks(blocks, num_videos, post, bank, over_texts_V):
            end = start + len(t2v)
            yield start, t2v, v2t
        if end != len(owner_T):
            raise UserError(f"there are {end} rows of similarities and {len(owner_T)} texts")

    over_texts_V = None
    if post == "dsl":
        over_texts_V = _log_sum_exp_of_columns(blocks, num_videos)
        over_texts_V = combine(over_texts_V, "logsumexp") if combine else over_texts_V
    t2v_ranks, own_best_V = [owner_T[:0]], torch.full((num_videos,), -torch.inf, dtype=torch.float64)
    for start, t2v, v2t in processed():
        owner = owner_T[start : start + len(t2v)]
        t2v_ranks.append((t2v >= t2v.gather(1, owner[:, None])).sum(dim=1))  # its own video counts once: 1-based
        own_best_V.scatter_reduce_(0, owner, v2t.gather(1, owner[:, None])[:, 0].to(own_best_V.dtype), "amax")
    own_best_V = combine(own_best_V, "amax") if combine else own_best_V
    # A video's captions may lie in two blocks: its best row so far is carried over.
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
    if carried_V is not None:
        v2t_V += carried_V >= own_best_V
    return Ranks(torch.cat(t2v_ranks), combine(v2t_V, "sum") if combine else v2t_V, owner_T)


def processed_blocks(
    blocks: Blocks,
    num_videos: int,
    post: PostProcessing = "none",
    bank: Bank | None = None,
    over_texts_V: Tensor | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The similarities after post-processing, block by block.

    Args:
        blocks, num_videos, post, bank: as for :func:`rank`.
        over_texts_V: of ``dsl``, log sum of exponentials of each column; None: computed from all blocks.

    Yields:
        Number of the first row, and scores ``(T, V)`` for text to video and for video to text.

    Raises:
        UserError: a similarity that is not a number; rows are named.
    """
    if post == "dsl" and over_texts_V is None:
        over_texts_V = _log_sum_exp_of_columns(blocks, num_videos)
    start = 0
    for block_TV in blocks():
        check_numbers(block_TV, start)
        t2v = v2t = block_TV
        if over_texts_V is not None:
            t2v = block_TV * (DSL_SCALE * block_TV - over_texts_V).exp()
            v2t = block_TV * (DSL_SCALE * block_TV).softmax(dim=1)
        elif bank is not None and post == "qbnorm":
            t2v = bank.normalised(block_TV)
        yield start, t2v, v2t
        start += len(block_TV)


def check_numbers(block_TV: Tensor, first_row: int) -> None:
    """Raise a UserError that names the rows of a block that are not numbers."""
    bad = torch.isnan(block_TV).any(dim=1).nonzero().flatten()
    if len(bad):
        rows = (bad + first_row).tolist()
        raise UserError(f"{len(rows)} texts have a similarity that is not a number; the first rows are {rows[:5]}")


DSL_SCALE = 100.0
"""Inverse temperature of the dual softmax. Source: Cheng et al., 2021, arXiv:2109.04290."""


def _log_sum_exp_of_columns(blocks: Blocks, num_videos: int) -> Tensor:
    """``log sum_t exp(100 S)`` ``(V,)`` of every column."""
    total_V = torch.full((num_videos,), -torch.inf)
    for block_TV in blocks():
        total_V = torch.logaddexp(total_V, torch.logsumexp(DSL_SCALE * block_TV, dim=0))
    return total_V


class Bank:
    """Training queries against the gallery, for QB-Norm's dynamic inverted softmax.

    Source: Bogolin et al., CVPR 2022, arXiv:2112.12777.

    Args:
        blocks: similarities of the bank's queries (rows) with the gallery's videos.
        num_videos: of the gallery.
        beta: inverse temperature.
    """

    def __init__(self, blocks: Blocks, num_videos: int, beta: float = 20.0) -> None:
        self.beta = beta
        self.total_V = torch.full((num_videos,), -torch.inf)
        self.is_hub_V = torch.zeros(num_videos, dtype=torch.bool)
        """Whether a video is the nearest of some query of the bank."""
        for block_QV in blocks():
            self.total_V = torch.logaddexp(self.total_V, torch.logsumexp(beta * block_QV, dim=0))
            self.is_hub_V[block_QV.argmax(dim=1)] = True

    def normalised(self, block_TV: Tensor) -> Tensor:
        """Divides a row whose nearest video is a hub by the bank's sum over each video."""
        inverted_TV = (self.beta * block_TV - self.total_V).exp()
        return torch.where(self.is_hub_V[block_TV.argmax(dim=1)][:, None], inverted_TV, block_TV)


def metrics(ranks: Tensor) -> dict[str, float]:
    """R@K in percent, median (MdR) and mean (MnR) of 1-based ranks."""
    recalls = {f"R@{k}": 100.0 * (ranks <= k).double().mean().item() for k in RECALL_AT}
    return recalls | {"MdR": ranks.double().quantile(0.5).item(), "MnR": ranks.double().mean().item()}


def chance(num_videos: int) -> dict[str, float]:
    """Expected metrics of a random order of ``num_videos`` videos with one correct answer."""
    recalls = {f"R@{k}": 100.0 * min(k, num_videos) / num_videos for k in RECALL_AT}
    middle = math.fsum((1, num_videos)) / 2
    return recalls | {"MdR": middle, "MnR": middle}
