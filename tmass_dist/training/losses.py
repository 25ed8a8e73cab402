"""Symmetric InfoNCE on a similarity matrix of which each rank has the columns of its own videos."""

# Shapes: N texts and N videos of all ranks, B videos of this rank (columns of the matrix), S matrices.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tmass_dist.distributed import (
    all_reduce_elementwise_max,
    all_reduce_sum,
    differentiable_sum,
    rank,
    world_size,
)


def temperature(logit_scale: Tensor) -> Tensor:
    """The factor of the cosines: exp of the learnt logarithm, limited to 100 here, in the forward pass."""
    return logit_scale.clamp(max=math.log(100)).exp()


def column_info_nce(similarity_SBN: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE of several matrices: the mean of the cross-entropies over rows and over columns.

    Matching pairs lie on the diagonal. Other captions of the same video in the batch count as negatives, as in the
    paper.

    The cross-entropy of a column (a video over all texts) needs no other rank. That of a row (a text over all videos)
    needs the row's largest logit and its sum of exponentials: two all-reduces of N numbers for each matrix, as in
    vocabulary-parallel cross-entropy (Shoeybi et al., 2019, arXiv:1909.08053). The backward pass exchanges nothing.

    Args:
        similarity_SBN: cosines; ``[s, j, i]`` is of text ``i`` and this rank's video ``j``, which is video
            ``rank * B + j`` of all.
        logit_scale: logarithm of the temperature, shape [1] or []; see :func:`temperature`.

    Returns:
        The losses ``(S,)``, the same on every rank; gradients follow the convention of
        :func:`tmass_dist.distributed.all_gather_rows`. And the loss of each of this rank's pairs ``(S, B)``, without
        gradients: the mean of its two cross-entropies. The losses are the means over the pairs of all ranks.
    """
    return _ColumnInfoNCE.apply(similarity_SBN, temperature(logit_scale))  # pyright: ignore[reportReturnType]


def own_pairs(similarity_SBN: Tensor) -> Tensor:
    """``(S, B)``: the matching pairs of this rank's columns, a view."""
    first, num_columns = rank() * similarity_SBN.shape[1], similarity_SBN.shape[1]
    return similarity_SBN[:, :, first : first + num_columns].diagonal(dim1=1, dim2=2)


class _ColumnInfoNCE(torch.autograd.Function):
    """Keeps the similarities and one number for each row and column; the probabilities are computed again."""

    @staticmethod
    def forward(ctx: Any, similarity_SBN: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        num_matrices, num_columns, num_rows = similarity_SBN.shape
        own_rows = slice(rank() * num_columns, (rank() + 1) * num_columns)
        # Each cross-entropy is (largest logit - logit of the pair) + log(sum of exp(logit - largest logit)). Both terms
        # are small where the loss is small, so that it keeps its precision.
        row_max_SN = similarity_SBN.amax(dim=1).mul_(factor)  # the temperature is positive
        column_max_SB = similarity_SBN.amax(dim=2).mul_(factor)
        all_reduce_elementwise_max(row_max_SN)
        row_total_SN, column_total_SB = torch.empty_like(row_max_SN), torch.empty_like(column_max_SB)
        for number, similarity_BN in enumerate(similarity_SBN):
            logits_BN = similarity_BN * factor
            torch.sum((logits_BN - column_max_SB[number][:, None]).exp_(), dim=1, out=column_total_SB[number])
            torch.sum(logits_BN.sub_(row_max_SN[number]).exp_(), dim=0, out=row_total_SN[number])
        pair_SB = own_pairs(similarity_SBN) * factor
        gap_SB = (column_max_SB - pair_SB) + column_total_SB.log() + (row_max_SN[:, own_rows] - pair_SB)
        summed = torch.cat([row_total_SN.flatten(), gap_SB.sum(dim=1)])
        all_reduce_sum(summed)
        row_log_SN = summed[:-num_matrices].view_as(row_total_SN).log_()
        losses_S = (row_log_SN.sum(dim=1) + summed[-num_matrices:]) / (2 * num_rows)
        pair_loss_SB = (gap_SB + row_log_SN[:, own_rows]) / 2
        ctx.mark_non_differentiable(pair_loss_SB)
        ctx.save_for_backward(similarity_SBN, factor, column_max_SB + column_total_SB.log(), row_max_SN + row_log_SN)
        return losses_S, pair_loss_SB

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        similarity_SBN, factor, column_SB, row_SN = ctx.saved_tensors
        # Every rank computes the same loss, and the convention sums their gradients of these columns.
        weight_S = gradients[0] * (world_size() / (2 * similarity_SBN.shape[2]))
        grad_SBN, grad_factor = torch.empty_like(similarity_SBN), torch.zeros_like(factor)
        own_pairs_SB = own_pairs(grad_SBN)
        for number, similarity_BN in enumerate(similarity_SBN):
            logits_BN = similarity_BN * factor
            grad_BN = torch.sub(logits_BN, row_SN[number], out=grad_SBN[number]).exp_()
            grad_BN += logits_BN.sub_(column_SB[number][:, None]).exp_()
            own_pairs_SB[number] -= 2
            grad_BN *= weight_S[number]
            grad_factor += (grad_BN * similarity_BN).sum()
        return grad_SBN.mul_(factor), grad_factor


@torch.no_grad()
def similarity_metrics(similarity_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of the matching pairs, and of each text with its most similar wrong video; the same on every rank."""
    matching = mean_over_ranks(own_pairs(similarity_BN[None])[0])
    wrong_BN = similarity_BN.clone()
    own_pairs(wrong_BN[None]).fill_(-2.0)
    hardest_N = wrong_BN.amax(dim=0)
    all_reduce_elementwise_max(hardest_N)
    return matching, hardest_N.mean()


def mean_over_ranks(local_B: Tensor) -> Tensor:
    """The mean of every rank's numbers, with the gradient convention of ``all_gather_rows``."""
    return differentiable_sum(local_B.sum()) / (len(local_B) * world_size())
