"""Text-conditioned pooling of a video's frames (X-Pool), and its plain alternative."""

# Shapes: T texts, V videos, F frames, H heads, K = H F, A anchors, D embedding width,
# E = D / H.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmass_dist.errors import UserError
from tmass_dist.noise import keyed_mask


class Seen(NamedTuple):
    """Every video as every text sees it: ``vectors_VTD * gain_D + bias_D``, which nobody need write down."""

    vectors_VTD: Tensor
    mean_VD: Tensor
    """Mean of the whole expression over the texts."""
    gain_D: Tensor
    bias_D: Tensor

    def pooled(self) -> Tensor:
        """The expression itself, ``(V, T, D)``."""
        return torch.addcmul(self.bias_D, self.vectors_VTD, self.gain_D)

    def cosines(self, anchor_ATD: Tensor) -> Tensor:
        """``(V, A, T)``: of each text's anchors with each video as the text sees it."""
        along_VAT: Tensor = _Projections.apply(anchor_ATD, self.vectors_VTD, self.gain_D, self.bias_D)  # pyright: ignore
        return along_VAT / torch.linalg.vector_norm(anchor_ATD, dim=-1).clamp_min(1e-12)


class XPool(nn.Module):
    """One attention layer in which every text asks every video's frames.

    Source: Gorti et al., CVPR 2022, as T-MASS uses it. No residual from the text, none around the attention.
    """

    def __init__(self, embed_dim: int, num_heads: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"model.num_heads is {num_heads}: it must divide the embedding width {embed_dim}")
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out, self.linear = (nn.Linear(embed_dim, embed_dim) for _ in range(5))
        self.norm_in, self.norm_attended, self.norm_out = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.dropout = dropout
        for layer in (self.query, self.key, self.value, self.out, self.linear):
            nn.init.eye_(layer.weight)  # as the authors start it: pooling begins as plain attention
            nn.init.zeros_(layer.bias)

    def queries(self, text_TD: Tensor, of_frames: bool = False) -> Tensor:
        """What each head of a text asks, ``(H, T, E)``, scaled; ``(H, T, D)`` if it asks the frames themselves.

        ``q.(W f + b)`` is ``(W^T q).f`` and a number that the softmax over the frames does not see: so either the
        frames are projected, V F rows, or the queries once more, T rows.
        """
        query_HTE = self.query(self.norm_in(text_TD)).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        query_HTE = query_HTE * query_HTE.shape[-1] ** -0.5
        return query_HTE @ self._key_weight if of_frames else query_HTE

    def keys(self, normed_VFD: Tensor, of_frames: bool = False) -> Tensor:
        """What frames after ``norm_in`` answer to, ``(V, H, F, E)``; see :meth:`queries`."""
        if of_frames:
            return normed_VFD[:, None].expand(-1, self.num_heads, -1, -1)
        return normed_VFD[:, None] @ self._key_weight.transpose(1, 2)

    @property
    def _key_weight(self) -> Tensor:
        """``(H, E, D)``."""
        return self.key.weight.unflatten(0, (self.num_heads, -1))

    @staticmethod
    def attention(query_HTE: Tensor, key_VHFE: Tensor) -> Tensor:
        """Weights ``(V, H, F, T)``; each text's sum to one over the frames."""
        # One product a head over the frames of all videos: many small ones take twice the time. The texts lie side by
        # side in memory, and the softmax takes many at once: over 12 frames side by side it is ten times slower.
        key_HNE = key_VHFE.transpose(0, 1).flatten(1, 2)
        score_HVFT = (key_HNE @ query_HTE.transpose(1, 2)).unflatten(1, (len(key_VHFE), -1))
        return score_HVFT.softmax(dim=2).transpose(0, 1)

    def span(self, normed_VFD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a video's pooled vectors are made of: ``gram_VKK``, ``attended_VKD`` and ``projected_VKD``, K = H F.

        The frames come after ``norm_in``.

        A normalisation is affine but for one number a pair, its deviation, and the Gram matrix gives that from the
        weights. So with weights divided by it (:meth:`normalised`), the attended vector is a sum of ``attended_VKD``
        and its projection one of ``projected_VKD``: nothing of size D x D is done for a pair.
        """
        # What each frame and head adds to the output projection: a head's weights sum to one, so the projection and
        # its bias may be applied to the frames, V F rows, in place of the V T pooled rows.
        if self.num_heads == 1 and normed_VFD.shape[:2].numel() > self.out.out_features:
            # One product with the frames in place of two.
            weight_DD, bias_D = self.out.weight @ self.value.weight, self.out(self.value.bias)
            values_VKD = F.linear(normed_VFD, weight_DD, bias_D)
        else:
            value_VFHE = self.value(normed_VFD).unflatten(-1, (self.num_heads, -1))
            weight_DHE = self.out.weight.unflatten(1, (self.num_heads, -1))
            values_VHFD = torch.einsum("vfhe,dhe->vhfd", value_VFHE, weight_DHE) + self.out.bias / self.num_heads
            values_VKD = values_VHFD.flatten(1, 2)
        values_VKD = values_VKD - values_VKD.mean(-1, keepdim=True)
        attended_VKD = values_VKD * self.norm_attended.weight
        gram_VKK = values_VKD @ values_VKD.transpose(1, 2) / values_VKD.shape[-1]
        return gram_VKK, attended_VKD, F.linear(attended_VKD, self.linear.weight)

    @staticmethod
    def normalised(weights_VKT: Tensor, gram_VKK: Tensor, eps: float) -> Tensor:
        """Weights divided by the deviation, over D, of the vector that they make."""
        variance_V1T = ((gram_VKK @ weights_VKT) * weights_VKT).sum(1, keepdim=True).clamp_min(0)
        return weights_VKT * (variance_V1T + eps).rsqrt()

    def seen(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: list[int] | None = None) -> Seen:
        """Every video as every text sees it; embeddings of any norm.

        Args:
            text_TD: what asks: text embeddings, of the whole global batch in training.
            frames_VFD: frame embeddings in time order.
            dropout_keys: one of each video; training needs them where there is dropout.
        """
        normed_VFD = self.norm_in(frames_VFD)
        num_frames, num_texts, width = normed_VFD.shape[:2].numel(), len(text_TD), text_TD.shape[1]
        shorter = num_texts * (width + (self.num_heads - 1) * num_frames) < num_frames * width
        query_HTE, key_VHFE = self.queries(text_TD, shorter), self.keys(normed_VFD, shorter)
        weights_VKT = self.attention(query_HTE, key_VHFE).flatten(1, 2)
        gram_VKK, attended_VKD, projected_VKD = self.span(normed_VFD)
        weights_VTK = self.normalised(weights_VKT, gram_VKK, self.norm_attended.eps).transpose(1, 2)
        # The softmax does not see the bias of the keys, which yet keeps its gradient: zeros.
        bias_D = self.norm_attended.bias + 0 * self.key.bias
        dropout = self.dropout if self.training else 0.0
        assert dropout_keys or not dropout, "in training every video brings the key of its dropout mask"
        vectors_VTD, mean_VD = _Mixture.apply(  # pyright: ignore[reportGeneralTypeIssues]
            weights_VTK,
            attended_VKD,
            bias_D,
            projected_VKD,
            self.linear(bias_D),
            dropout_keys,
            dropout,
            self.norm_out.eps,
        )
        gain_D, last_D = self.norm_out.weight, self.norm_out.bias
        return Seen(vectors_VTD, torch.addcmul(last_D, mean_VD, gain_D), gain_D, last_D)

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: list[int] | None = None) -> Tensor:
        """``pooled_VTD``; see :meth:`seen`."""
        return self.seen(text_TD, frames_VFD, dropout_keys).pooled()


class MeanPool(nn.Module):
    """The mean of the normalised frames, whatever the text."""

    def seen(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: list[int] | None = None) -> Seen:
        """The same for every text (a view)."""
        mean_VD = F.normalize(frames_VFD, dim=-1).mean(dim=1)
        one_D = torch.ones_like(mean_VD[0])
        return Seen(mean_VD[:, None].expand(-1, len(text_TD), -1), mean_VD, one_D, torch.zeros_like(one_D))

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: list[int] | None = None) -> Tensor:
        """``pooled_VTD``, a view."""
        return self.seen(text_TD, frames_VFD, dropout_keys).vectors_VTD


def _tiles(pairs_VTD: Tensor) -> Iterator[slice]:
    """A few videos at a time: what the steps of a tile hand on to each other stays in the processor's cache."""
    numbers = 2**19 if pairs_VTD.device.type == "cpu" else 2**24
    tile = max(1, numbers // pairs_VTD[0].numel())
    return (slice(start, start + tile) for start in range(0, len(pairs_VTD), tile))


class _Mixture(torch.autograd.Function):
    """``x + dropout(y)``, normalised over D, and its mean over the texts; each is ``weights @ vectors + bias``.

    For the backward pass it keeps its result alone, and draws the mask again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights_VTK: Tensor,
        x_VKD: Tensor,
        x_D: Tensor,
        y_VKD: Tensor,
        y_D: Tensor,
        keys: list[int],
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
            if dropout:
                y = torch.baddbmm(y_D, weights, y_VKD[videos])
                out.addcmul_(y, keyed_mask(keys[videos], out, dropout), value=1 / (1 - dropout))
            out -= out.mean(-1, keepdim=True)
            variance = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_() / width
            out *= torch.rsqrt(variance + eps, out=factor)
            mean_VD[videos] = out.mean(dim=1)
        ctx.keys, ctx.dropout = keys, dropout
        ctx.save_for_backward(weights_VTK, x_VKD, y_VKD, out_VTD, factor_VT1)
        return out_VTD, mean_VD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights_VTK, x_VKD, y_VKD, out_VTD, factor_VT1 = ctx.saved_tensors
        scale = 1 / (1 - ctx.dropout)
        of_out_VTD, of_mean_VD = gradients
        of_weights_VKT = torch.empty_like(weights_VTK.transpose(1, 2))
        of_x_VKD, of_y_VKD = torch.empty_like(x_VKD), torch.empty_like(x_VKD)
        of_x_D, of_y_D = of_x_VKD.new_zeros(out_VTD.shape[-1]), of_x_VKD.new_zeros(out_VTD.shape[-1])
        for videos in _tiles(out_VTD):
            out, factor = out_VTD[videos], factor_VT1[videos]
            pairs = of_out_VTD[videos] + of_mean_VD[videos, None] / out.shape[1]
            # Back through the normalisation, but for its factor, which the weights carry: they are fewer.
            along = (pairs * out).mean(-1, keepdim=True)
            pairs -= pairs.mean(-1, keepdim=True)
            pairs.addcmul_(out, along, value=-1)
            weights_KT = (weights_VTK[videos] * factor).transpose(1, 2)
            torch.bmm(weights_KT, pairs, out=of_x_VKD[videos])
            of_x_D += factor.flatten() @ pairs.flatten(0, 1)
            of_weights = x_VKD[videos] @ pairs.transpose(1, 2)
            if ctx.dropout:
                pairs *= keyed_mask(ctx.keys[videos], pairs, ctx.dropout)
                torch.bmm(weights_KT * scale, pairs, out=of_y_VKD[videos])
                of_y_D += factor.flatten() @ pairs.flatten(0, 1) * scale
                of_weights.baddbmm_(y_VKD[videos], pairs.transpose(1, 2), alpha=scale)
            torch.mul(of_weights, factor.transpose(1, 2), out=of_weights_VKT[videos])
        if not ctx.dropout:
            of_y_VKD, of_y_D = of_x_VKD, of_x_D
        return of_weights_VKT.transpose(1, 2), of_x_VKD, of_x_D, of_y_VKD, of_y_D, None, None, None


class _Projections(torch.autograd.Function):
    """Anchors along the directions of ``vectors * gain + bias``, ``(V, A, T)``; these are made again when needed."""

    @staticmethod
    def forward(ctx: Any, anchor_ATD: Tensor, vectors_VTD: Tensor, gain_D: Tensor, bias_D: Tensor) -> Tensor:
        along_VAT = vectors_VTD.new_empty(len(vectors_VTD), *anchor_ATD.shape[:2])
        norm_V1T = torch.empty_like(along_VAT[:, :1])
        for videos in _tiles(vectors_VTD):
            pooled = torch.addcmul(bias_D, vectors_VTD[videos], gain_D)
            norm_V1T[videos] = torch.linalg.vector_norm(pooled, dim=-1)[:, None].clamp_min_(1e-12)
            product_TAV = anchor_ATD.transpose(0, 1) @ pooled.permute(1, 2, 0)
            torch.div(product_TAV.permute(2, 1, 0), norm_V1T[videos], out=along_VAT[videos])
        ctx.save_for_backward(anchor_ATD, vectors_VTD, gain_D, bias_D, along_VAT, norm_V1T)
        return along_VAT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        anchor_ATD, vectors_VTD, gain_D, bias_D, along_VAT, norm_V1T = ctx.saved_tensors
        of_product_VAT = gradients[0] / norm_V1T
        shrink_VT1 = -((of_product_VAT * along_VAT).sum(1) / norm_V1T[:, 0])[..., None]
        of_anchor_TAD = anchor_ATD.new_zeros(anchor_ATD.transpose(0, 1).shape)
        of_vectors_VTD = vectors_VTD.new_empty(vectors_VTD.shape)
        of_gain_D, of_bias_D = torch.zeros_like(gain_D), torch.zeros_like(bias_D)
        for videos in _tiles(vectors_VTD):
            vectors, of_product = vectors_VTD[videos], of_product_VAT[videos]
            pooled = torch.addcmul(bias_D, vectors, gain_D)
            of_anchor_TAD += of_product.permute(2, 1, 0) @ pooled.transpose(0, 1)
            of_pooled = pooled.mul_(shrink_VT1[videos])
            for anchor_TD, of_one in zip(anchor_ATD, of_product.unbind(1)):
                of_pooled.addcmul_(anchor_TD, of_one[..., None])
            of_bias_D += of_pooled.sum(dim=(0, 1))
            torch.mul(of_pooled, gain_D, out=of_vectors_VTD[videos])
            of_gain_D += of_pooled.mul_(vectors).sum(dim=(0, 1))
        return of_anchor_TAD.transpose(0, 1), of_vectors_VTD, of_gain_D, of_bias_D
