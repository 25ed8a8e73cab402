"""This rank's videos pooled by every text of the global batch: its columns of the similarity matrices.

Either all pairs are kept for the backward pass, or they are computed in tiles of some videos and some texts, each of
which is computed again in the backward pass. So memory does not grow with the number of pairs.
"""

# Shapes: B videos of this rank, b of a tile; N texts of all ranks, n of a tile; A anchors, K samples of a text,
# F frames, D embedding width.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.late_interaction import LateInteraction, TokenPairs
from tmass_dist.models.pair_products import DropoutKeys, PooledPairs
from tmass_dist.models.stochastic import TextMass, frame_cosines

PAIR_TENSORS = 8
"""Tensors of ``(b, n, D)`` that the forward and backward pass of a tile hold at the same time, those of the samples of
``sample_cosines`` left out."""

_MIN_TEXTS = 64
"""Texts of a tile, if the budget allows: with fewer, projecting the texts anew for each tile dominates."""


class OwnColumns:
    """The videos of this rank, pooled by all texts within a memory budget."""

    def __init__(
        self,
        head: RetrievalHead,
        query_ND: Tensor,
        frames_BFD: Tensor,
        dropout_keys: DropoutKeys | None,
        memory_mb: float | None,
        *,
        copies: int = PAIR_TENSORS,
    ) -> None:
        """Prepare the videos, and pool them if all pairs fit into the budget.

        Args:
            head: pooling and mass.
            query_ND: the attention queries, one for each text of the global batch.
            frames_BFD: frame embeddings of this rank's videos.
            dropout_keys: one for each of this rank's videos; training needs them where there is dropout.
            memory_mb: budget in MB; None sets no limit.
            copies: tensors of ``(b, n, D)`` that the forward and backward pass of a tile hold at the same time.
        """
        self.head, self.query_ND, self.frames_BFD, self.keys = head, query_ND, frames_BFD, dropout_keys
        self.prepared = head.pooling.prepare(frames_BFD, len(query_ND))
        num_videos, num_texts = len(frames_BFD), len(query_ND)
        self._rows: list[tuple[Tensor, _Rows]] = []
        self.tile_videos, self.tile_texts = num_videos, num_texts
        self.pairs: PooledPairs | TokenPairs | None = None
        if memory_mb is not None:
            width = query_ND.shape[1]
            if isinstance(head.pooling, LateInteraction):  # of a pair it keeps the cosines of tokens with frames
                width = width // frames_BFD.shape[2] * frames_BFD.shape[1]
            pair_bytes = width * query_ND.element_size() * copies
            num_pairs = max(1, int(memory_mb * 2**20 / pair_bytes))
            if num_pairs < num_videos * num_texts:
                self.tile_texts = min(num_texts, max(num_pairs // num_videos, min(_MIN_TEXTS, num_pairs)))
                self.tile_videos = max(1, min(num_videos, num_pairs // self.tile_texts))
                return
        self.pairs = self._pool(query_ND, slice(None), 0)

    def pooled_mean(self) -> Tensor:
        """``(B, D)``: each video's pooled vector, averaged over all texts."""
        if isinstance(self.pairs, PooledPairs):
            return self.pairs.mean_VD

        def weighted_mean(pairs: PooledPairs, _: slice, query_nD: Tensor) -> Tensor:
            return pairs.mean_VD * (len(query_nD) / len(self.query_ND))

        return torch.cat([torch.stack(row).sum(dim=0) for row in self._map(weighted_mean, self.query_ND)])

    def cosines(self, anchors_ND: Sequence[Tensor]) -> Tensor:
        """``(B, A, N)``: cosines of each text's anchors with each video as pooled by that text."""

        def cosines(pairs: PooledPairs | TokenPairs, _: slice, *anchors_nD: Tensor) -> Tensor:
            return pairs.cosines(torch.stack(anchors_nD))

        return self._join(cosines, *anchors_ND)

    def sample_cosines(self, mass: TextMass, text_ND: Tensor, noise_NKD: Tensor) -> Tensor:
        """``(B, K, N)``: cosines of samples drawn with each pair's radius, ``t_i + R_ij eps_i``, as in evaluation."""
        unit_BFD = F.normalize(self.frames_BFD, dim=-1)

        def cosines(pairs: PooledPairs, videos: slice, text_nD: Tensor, noise_nKD: Tensor) -> Tensor:
            pooled_bnD = pairs.materialise()
            text_bnD = text_nD.expand_as(pooled_bnD)
            radius_bnD = mass.radius_of(frame_cosines(text_nD, unit_BFD[videos]), text_bnD)
            samples = (mass.sample(text_bnD, radius_bnD, noise_nD) for noise_nD in noise_nKD.unbind(1))
            return torch.stack([F.cosine_similarity(sample, pooled_bnD, dim=-1) for sample in samples], dim=1)

        return self._join(cosines, text_ND, noise_NKD)

    def closed_form_cosines(self, mass: TextMass, text_ND: Tensor) -> Tensor:
        """``(B, 1, N)``: scores of each text's whole mass, with the radius of each pair, as in evaluation."""
        unit_BFD = F.normalize(self.frames_BFD, dim=-1)

        def scores(pairs: PooledPairs, videos: slice, text_nD: Tensor) -> Tensor:
            text_bnD = text_nD.expand(len(unit_BFD[videos]), -1, -1)
            radius_bnD = mass.radius_of(frame_cosines(text_nD, unit_BFD[videos]), text_bnD)
            return pairs.cosines(text_nD[None]) * mass.cosine_factor(text_bnD, radius_bnD)[:, None]

        return self._join(scores, text_ND)

    def _join(self, function: Callable[..., Tensor], *of_texts: Tensor) -> Tensor:
        """``function`` of all pairs, ``(B, ..., N)``."""
        if self.pairs is not None:
            return function(self.pairs, slice(None), *of_texts)
        return torch.cat([torch.cat(row, dim=-1) for row in self._map(function, *of_texts)])

    def _map(self, function: Callable[..., Tensor], *of_texts: Tensor) -> list[list[Tensor]]:
        """``function`` of the pairs of each tile, its videos, and the rows of ``of_texts`` that belong to it.

        Its result for a pair must depend on that pair alone. Rows of the list are tiles of videos.
        """
        rows = [self._rows_of(values_N) for values_N in (self.query_ND, *of_texts)]

        def run(videos: slice, number: int, query_nD: Tensor, *values: Tensor) -> Tensor:
            return function(self._pool(query_nD, videos, number * self.tile_texts), videos, *values)

        results = []
        for first in range(0, len(self.frames_BFD), self.tile_videos):
            videos = slice(first, first + self.tile_videos)
            row = []
            for number, start in enumerate(range(0, len(self.query_ND), self.tile_texts)):
                tensors = [values.part(slice(start, start + self.tile_texts)) for values in rows]
                # The dropout mask is a function of its key, so no random state needs to be restored.
                row.append(
                    checkpoint(partial(run, videos, number), *tensors, use_reentrant=False, preserve_rng_state=False)
                )
            results.append(row)
        return results

    def _pool(self, query_nD: Tensor, videos: slice, first_text: int) -> PooledPairs | TokenPairs:
        keys = None if self.keys is None else self.keys[videos]
        prepared: Any = self.prepared.rows(videos)
        return self.head.pooling.pool(query_nD, prepared, keys, first_text)

    def _rows_of(self, values_N: Tensor) -> _Rows:
        """One object for each tensor, so that its gradient is one tensor."""
        for known, rows in self._rows:
            if known is values_N:
                return rows
        self._rows.append((values_N, _Rows(values_N)))
        return self._rows[-1][1]


class _Rows:
    """A tensor of which tiles take some rows; their gradients are added into one tensor of its size.

    ``Tensor.split`` would keep the gradients of all tiles until the last one is known, and then copy them.
    """

    def __init__(self, values_N: Tensor) -> None:
        self.total_N: Tensor | None = None
        """The gradient so far, during a backward pass."""
        self._values_N: Tensor = _Gradient.apply(values_N, self)  # pyright: ignore[reportAttributeAccessIssue]

    def part(self, rows: slice) -> Tensor:
        """These rows. Autograd reaches what was recorded last first: call it just before the rows are used."""
        return _Part.apply(self._values_N, self, rows)  # pyright: ignore[reportReturnType]


class _Gradient(torch.autograd.Function):
    """The identity; its backward pass comes after that of all parts and returns their sum."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        return values_N.view_as(values_N)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, None]:
        total_N, ctx.rows.total_N = ctx.rows.total_N, None
        return total_N, None


class _Part(torch.autograd.Function):
    """Some rows; the backward pass adds their gradient to the sum and hands nothing on."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, rows: _Rows, part: slice) -> Tensor:
        ctx.rows, ctx.part, ctx.shape = rows, part, values_N.shape
        return values_N[part]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        if ctx.rows.total_N is None:
            ctx.rows.total_N = gradients[0].new_zeros(ctx.shape)
        ctx.rows.total_N[ctx.part] += gradients[0]
        return None, None, None
