"""Plots of the ranks of one evaluation, as PNG."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tmass_dist.evaluation.ranking import Ranks
from tmass_dist.pictures import figure, png

TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def recall_curve(ranks: Ranks, title: str) -> bytes:
    """R@K of both directions by K, as steps."""
    drawn, (axes,) = figure()
    for name, rank_Q in (("text to video", ranks.t2v_T), ("video to text", ranks.v2t_V)):
        rank, count = rank_Q.unique(return_counts=True)
        recall = count.cumsum(0).double() / len(rank_Q) * 100
        # From 0 at K = 1 to the last K of the axis: both curves span it.
        steps = [1, *rank.tolist(), max(len(ranks.v2t_V), int(rank[-1]))], [0.0, *recall.tolist(), 100.0]
        axes.step(*steps, where="post", label=name)
    axes.set(xscale="log", xlabel="K", ylabel="R@K, percent", ylim=(0, 102))
    _ticks(axes, len(ranks.v2t_V))
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=9)
    axes.legend()
    return png(drawn)


def histogram(rank_Q: Tensor, direction: str, queries: str, title: str) -> bytes:
    """How many queries have which rank.

    Args:
        rank_Q: of one direction.
        direction, queries: their names.
        title: above the plot.
    """
    drawn, (axes,) = figure()
    top = max(int(rank_Q.max()), 2)
    axes.hist(rank_Q.numpy(), bins=_edges(top).numpy())
    axes.set(xscale="log", xlabel=f"rank ({direction})", ylabel=queries)
    _ticks(axes, top)
    axes.set_title(title, fontsize=9)
    return png(drawn)


def _edges(top: int) -> Tensor:
    """Edges of bins of equal width on a logarithmic axis, each with at least one whole number."""
    edges = torch.logspace(0, torch.log10(torch.tensor(top + 1.0)).item(), 25).round().unique()
    return edges - 0.5


def _ticks(axes: Any, top: int) -> None:
    ticks = [tick for tick in TICKS if tick <= top]
    if len(ticks) > 8:  # on a phone, more would touch
        ticks = [tick for tick in ticks if not str(tick).startswith("2")]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
