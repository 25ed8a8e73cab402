"""Products over all pairs of texts and videos, whose backward pass computes again what is too large to keep."""

# Shapes: T texts, V videos, F frames, H heads, K = H F, A anchors, D embedding width.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tmass_dist.noise import keyed_mask

DropoutKeys = Sequence[int] | Tensor
"""One whole number for each video; see :func:`tmass_dist.noise.keyed_mask`."""

TILE_NUMBERS = {"cpu": 2**19, "cuda": 2**24}
"""By type of device: most numbers of a pair tensor that are worked on at a time."""


class PooledPairs(NamedTuple):
    """Every video pooled by every text, in factored form: the pooled vectors are ``vectors_VTD * gain_D + bias_D``."""

    vectors_VTD: Tensor
    mean_VD: Tensor
    """Mean over the texts of the pooled vectors (gain and bias included)."""
    gain_D: Tensor
    bias_D: Tensor

    def materialise(self) -> Tensor:
        """The pooled vectors, ``(V, T, D)``."""
        return torch.addcmul(self.bias_D, self.vectors_VTD, self.gain_D)

    def cosines(self, anchor_ATD: Tensor) -> Tensor:
        """``(V, A, T)``: cosine of each text's anchors with each video as pooled by that text."""
        product_VAT: Tensor = AnchorProducts.apply(anchor_ATD, self.vectors_VTD, self.gain_D, self.bias_D)  # pyright: ignore
        return product_VAT / torch.linalg.vector_norm(anchor_ATD, dim=-1).clamp_min(1e-12)


def _tiles(pairs_VTD: Tensor) -> Iterator[slice]:
    """A few videos at a time, so that the intermediate results of a tile stay in the processor's cache."""
    numbers = TILE_NUMBERS["cpu" if pairs_VTD.device.type == "cpu" else "cuda"]
    tile = max(1, numbers // pairs_VTD[0].numel())
    return (slice(start, start + tile) for start in range(0, len(pairs_VTD), tile))


class NormalisedMixture(torch.autograd.Function):
    """``x + dropout(y)``, normalised over D, and its mean over the texts.

    ``x`` and ``y`` are ``weights @ vectors + bias``. Only the result is kept for the backward pass; the
    dropout mask is drawn again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights_VTK: Tensor,
        x_VKD: Tensor,
        x_D: Tensor,
        y_VKD: Tensor,
        y_D: Tensor,
        keys: DropoutKeys | None,
        first_text: int,
        dropout: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        if not dropout:
            x_VKD, x_D = x_VKD + y_VKD, x_D + y_D
        (num_videos, num_texts, _), width = weights_VTK.shape, x_D.shape[0]
        out_VTD, mean_VD = x_D.new_empty(num_videos, num_texts, width), x_D.new_empty(num_videos, width)
        factor_VT1 = x_D.new_empty(num_videos, num_texts, 1)
        for videos in _tiles(out_VTD):
            weights, out, factor = weights_VTK[videos], out_VTD[videos], factor_VT1[videos]
            torch.baddbmm(x_D, weights, x_VKD[videos], out=out)
            if keys is not None and dropout:
                y = torch.baddbmm(y_D, weights, y_VKD[videos])
                out.addcmul_(y, keyed_mask(keys[videos], out, dropout, first_text), value=1 / (1 - dropout))
            out -= out.mean(-1, keepdim=True)
            variance = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_() / width
            out *= torch.rsqrt(variance + eps, out=factor)
            mean_VD[videos] = out.mean(dim=1)
        ctx.keys, ctx.first_text, ctx.dropout = keys, first_text, dropout
        ctx.save_for_backward(weights_VTK, x_VKD, y_VKD, out_VTD, factor_VT1)
        return out_VTD, mean_VD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights_VTK, x_VKD, y_VKD, out_VTD, factor_VT1 = ctx.saved_tensors
        scale = 1 / (1 - ctx.dropout)
        grad_out_VTD, grad_mean_VD = gradients
        grad_weights_VKT = torch.empty_like(weights_VTK.transpose(1, 2))
        grad_x_VKD, grad_y_VKD = torch.empty_like(x_VKD), torch.empty_like(x_VKD)
        grad_x_D, grad_y_D = grad_x_VKD.new_zeros(out_VTD.shape[-1]), grad_x_VKD.new_zeros(out_VTD.shape[-1])
        for videos in _tiles(out_VTD):
            out, factor = out_VTD[videos], factor_VT1[videos]
            grad_pairs = grad_out_VTD[videos] + grad_mean_VD[videos, None] / out.shape[1]
            # Back through the normalisation, except for its factor, which multiplies the weights: they are smaller.
            along = (grad_pairs * out).mean(-1, keepdim=True)
            grad_pairs -= grad_pairs.mean(-1, keepdim=True)
            grad_pairs.addcmul_(out, along, value=-1)
            weights_KT = (weights_VTK[videos] * factor).transpose(1, 2)
            torch.bmm(weights_KT, grad_pairs, out=grad_x_VKD[videos])
            grad_x_D += factor.flatten() @ grad_pairs.flatten(0, 1)
            grad_weights = x_VKD[videos] @ grad_pairs.transpose(1, 2)
            if ctx.dropout:
                grad_pairs *= keyed_mask(ctx.keys[videos], grad_pairs, ctx.dropout, ctx.first_text)
                torch.bmm(weights_KT * scale, grad_pairs, out=grad_y_VKD[videos])
                grad_y_D += factor.flatten() @ grad_pairs.flatten(0, 1) * scale
                grad_weights.baddbmm_(y_VKD[videos], grad_pairs.transpose(1, 2), alpha=scale)
            torch.mul(grad_weights, factor.transpose(1, 2), out=grad_weights_VKT[videos])
        if not ctx.dropout:
            grad_y_VKD, grad_y_D = grad_x_VKD, grad_x_D
        return grad_weights_VKT.transpose(1, 2), grad_x_VKD, grad_x_D, grad_y_VKD, grad_y_D, None, None, None, None


class AnchorProducts(torch.autograd.Function):
    """Products ``(V, A, T)`` of anchors with the directions of ``vectors * gain + bias``, which are not kept."""

    @staticmethod
    def forward(ctx: Any, anchor_ATD: Tensor, vectors_VTD: Tensor, gain_D: Tensor, bias_D: Tensor) -> Tensor:
        product_VAT = vectors_VTD.new_empty(len(vectors_VTD), *anchor_ATD.shape[:2])
        norm_V1T = torch.empty_like(product_VAT[:, :1])
        for videos in _tiles(vectors_VTD):
            pooled = torch.addcmul(bias_D, vectors_VTD[videos], gain_D)
            norm_V1T[videos] = torch.linalg.vector_norm(pooled, dim=-1)[:, None].clamp_min_(1e-12)
            product_TAV = anchor_ATD.transpose(0, 1) @ pooled.permute(1, 2, 0)
            torch.div(product_TAV.permute(2, 1, 0), norm_V1T[videos], out=product_VAT[videos])
        ctx.save_for_backward(anchor_ATD, vectors_VTD, gain_D, bias_D, product_VAT, norm_V1T)
        return product_VAT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        anchor_ATD, vectors_VTD, gain_D, bias_D, product_VAT, norm_V1T = ctx.saved_tensors
        grad_dot_VAT = gradients[0] / norm_V1T
        shrink_VT1 = -((grad_dot_VAT * product_VAT).sum(1) / norm_V1T[:, 0])[..., None]
        grad_anchor_TAD = anchor_ATD.new_zeros(anchor_ATD.transpose(0, 1).shape)
        grad_vectors_VTD = vectors_VTD.new_empty(vectors_VTD.shape)
        grad_gain_D, grad_bias_D = torch.zeros_like(gain_D), torch.zeros_like(bias_D)
        for videos in _tiles(vectors_VTD):
            vectors, grad_dot = vectors_VTD[videos], grad_dot_VAT[videos]
            pooled = torch.addcmul(bias_D, vectors, gain_D)
            # Of another layout the product takes three times as long: one small product for each text.
            grad_anchor_TAD += grad_dot.permute(2, 1, 0).contiguous() @ pooled.transpose(0, 1)
            grad_pooled = pooled.mul_(shrink_VT1[videos])
            for anchor_TD, grad_one in zip(anchor_ATD, grad_dot.unbind(1)):
                grad_pooled.addcmul_(anchor_TD, grad_one[..., None])
            grad_bias_D += grad_pooled.sum(dim=(0, 1))
            torch.mul(grad_pooled, gain_D, out=grad_vectors_VTD[videos])
            grad_gain_D += grad_pooled.mul_(vectors).sum(dim=(0, 1))
        return grad_anchor_TAD.transpose(0, 1), grad_vectors_VTD, grad_gain_D, grad_bias_D
