"""Text-conditioned pooling of a video's frames (X-Pool), and its plain alternative."""

# Shapes: T texts, V videos, F frames, H heads, K = H F (and one more for the bias), A anchors, D embedding width,
# E = D / H.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        """``(V, A, T)``: of each text's anchors, of norm one, with each video as the text sees it."""
        return _Cosines.apply(anchor_ATD, self.vectors_VTD, self.gain_D, self.bias_D)  # pyright: ignore


class XPool(nn.Module):
    """One attention layer in which every text asks every video's frames.

    Source: Gorti et al., CVPR 2022, as T-MASS uses it. No residual from the text, none around the attention.
    """

    def __init__(self, embed_dim: int, num_heads: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"model.num_heads is {num_heads}: it must divide the embedding width {embed_dim}")
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out, self.linear = (nn.Linear(embed_dim, embed_dim) for _ in range(5))
        self.norm_in, self.norm_attended, self.norm_out = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.dropout = dropout
        for layer in (self.query, self.key, self.value, self.out, self.linear):
            nn.init.eye_(layer.weight)  # as the authors start it: pooling begins as plain attention
            nn.init.zeros_(layer.bias)

    def queries(self, text_TD: Tensor) -> Tensor:
        """What each head of a text asks, ``(H, T, E)``, scaled."""
        query_HTE = self.query(self.norm_in(text_TD)).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        return query_HTE * query_HTE.shape[-1] ** -0.5

    def keys(self, frames_VFD: Tensor) -> Tensor:
        """What each head of a frame answers to, ``(V, H, F, E)``."""
        return self.key(self.norm_in(frames_VFD)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def attention(query_HTE: Tensor, key_VHFE: Tensor) -> Tensor:
        """Weights ``(V, H, T, F)``; each sums to one over the frames."""
        # One product a head over the frames of all videos: many small ones take twice the time.
        key_HNE = key_VHFE.transpose(0, 1).flatten(1, 2)
        score_HTVF = (query_HTE @ key_HNE.transpose(1, 2)).unflatten(-1, (len(key_VHFE), -1))
        return score_HTVF.softmax(dim=-1).permute(2, 0, 1, 3)

    def _weights(self, text_TD: Tensor, normed_VFD: Tensor) -> Tensor:
        """:meth:`attention` of raw texts and frames after ``norm_in``, by the shorter of two ways.

        ``q.(W f + b)`` is ``(W^T q).f`` and a number that the softmax over the frames does not see: so either the
        frames are projected, V F rows, or the queries once more, T rows.
        """
        query_HTE = self.queries(text_TD)
        weight_HED = self.key.weight.unflatten(0, (self.num_heads, -1))
        num_frames, num_texts, width = normed_VFD.shape[:2].numel(), len(text_TD), text_TD.shape[1]
        if num_texts * (width + (self.num_heads - 1) * num_frames) < num_frames * width:
            return self.attention(query_HTE @ weight_HED, normed_VFD[:, None].expand(-1, self.num_heads, -1, -1))
        return self.attention(query_HTE, normed_VFD[:, None] @ weight_HED.transpose(1, 2))

    def span(self, frames_VFD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What pooled vectors of a video are made of: ``gram_VKK``, ``attended_VKD`` and ``projected_VKD``, K = H F.

        A normalisation is affine but for one number a pair, its deviation, and the Gram matrix gives that from the
        weights. So with weights divided by it (:meth:`normalised`), the attended vector is a sum of ``attended_VKD``
        and its projection one of ``projected_VKD``: nothing of size D x D is done for a pair.
        """
        return self._span(self.norm_in(frames_VFD))

    def _span(self, normed_VFD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # What each frame and head adds to the output projection: a head's weights sum to one, so the projection and
        # its bias may be applied to the frames, V F rows, in place of the V T pooled rows.
        value_VFHE = self.value(normed_VFD).unflatten(-1, (self.num_heads, -1))
        weight_DHE = self.out.weight.unflatten(1, (self.num_heads, -1))
        values_VHFD = torch.einsum("vfhe,dhe->vhfd", value_VFHE, weight_DHE) + self.out.bias / self.num_heads
        values_VKD = values_VHFD.flatten(1, 2)
        values_VKD = values_VKD - values_VKD.mean(-1, keepdim=True)
        attended_VKD = values_VKD * self.norm_attended.weight
        gram_VKK = values_VKD @ values_VKD.transpose(1, 2) / values_VKD.shape[-1]
        return gram_VKK, attended_VKD, F.linear(attended_VKD, self.linear.weight)

    @staticmethod
    def normalised(weights_VTK: Tensor, gram_VKK: Tensor, eps: float) -> Tensor:
        """Weights divided by the deviation, over D, of the vector that they make."""
        variance_VT1 = ((weights_VTK @ gram_VKK) * weights_VTK).sum(-1, keepdim=True).clamp_min(0)
        return weights_VTK * (variance_VT1 + eps).rsqrt()

    def seen(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: list[int] | None = None) -> Seen:
        """Every video as every text sees it; embeddings of any norm.

        Args:
            text_TD: what asks: text embeddings, of the whole global batch in training.
            frames_VFD: frame embeddings in time order.
            dropout_keys: one of each video; training needs them where there is dropout.
        """
        normed_VFD = self.norm_in(frames_VFD)
        weights_VTK = self._weights(text_TD, normed_VFD).transpose(1, 2).flatten(2)
        gram_VKK, attended_VKD, projected_VKD = self._span(normed_VFD)
        weights_VTK = self.normalised(weights_VTK, gram_VKK, self.norm_attended.eps)
        # The bias of the normalisation is one more vector to sum, of weight one. That of the keys, which the softmax
        # does not see, keeps its gradient: zeros.
        bias_D = self.norm_attended.bias + 0 * self.key.bias
        weights_VTK = F.pad(weights_VTK, (0, 1), value=1.0)
        attended_VKD, projected_VKD = (
            torch.cat([vectors_VKD, constant_D.expand(len(frames_VFD), 1, -1)], dim=1)
            for vectors_VKD, constant_D in ((attended_VKD, bias_D), (projected_VKD, self.linear(bias_D)))
        )
        keep_VTD = None
        if self.training and self.dropout:
            assert dropout_keys is not None, "in training every video brings the key of its dropout mask"
            keep_VTD = keyed_mask(dropout_keys, (len(text_TD), text_TD.shape[1]), self.dropout, text_TD.device)
        vectors_VTD, mean_VD = _Mixture.apply(  # pyright: ignore[reportGeneralTypeIssues]
            weights_VTK, attended_VKD, projected_VKD, keep_VTD, 1 / (1 - self.dropout), self.norm_out.eps
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
    numbers = 2**18 if pairs_VTD.device.type == "cpu" else 2**24
    tile = max(1, numbers // pairs_VTD[0].numel())
    return (slice(start, start + tile) for start in range(0, len(pairs_VTD), tile))


class _Mixture(torch.autograd.Function):
    """``weights @ kept + scale * keep * (weights @ dropped)``, normalised over D, and its mean over the texts.

    It keeps its result and the mask, a byte an entry, for the backward pass; autograd would keep three times that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights_VTK: Tensor,
        kept_VKD: Tensor,
        dropped_VKD: Tensor,
        keep_VTD: Tensor | None,
        scale: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        if keep_VTD is None:
            kept_VKD = kept_VKD + dropped_VKD
        else:
            keep_VTD = keep_VTD.view(torch.uint8)  # bytes become floats five times faster than truth values
        shape = (*weights_VTK.shape[:2], kept_VKD.shape[-1])
        out_VTD, mean_VD = kept_VKD.new_empty(shape), kept_VKD.new_empty(shape[0], shape[2])
        factor_VT1 = kept_VKD.new_empty(*shape[:2], 1)
        for videos in _tiles(out_VTD):
            weights, out = weights_VTK[videos], out_VTD[videos]
            torch.bmm(weights, kept_VKD[videos], out=out)
            if keep_VTD is not None:
                out.addcmul_(weights @ dropped_VKD[videos], keep_VTD[videos].to(out.dtype), value=scale)
            out -= out.mean(-1, keepdim=True)
            variance = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_() / shape[2]
            factor_VT1[videos] = (variance + eps).rsqrt()
            out *= factor_VT1[videos]
            mean_VD[videos] = out.mean(dim=1)
        ctx.scale = scale
        ctx.save_for_backward(weights_VTK, kept_VKD, dropped_VKD, keep_VTD, out_VTD, factor_VT1)
        return out_VTD, mean_VD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights_VTK, kept_VKD, dropped_VKD, keep_VTD, out_VTD, factor_VT1 = ctx.saved_tensors
        of_out_VTD, of_mean_VD = gradients
        of_weights_VKT = torch.empty_like(weights_VTK.transpose(1, 2))
        of_kept_VKD, of_dropped_VKD = torch.empty_like(kept_VKD), torch.empty_like(kept_VKD)
        for videos in _tiles(out_VTD):
            out, kept, factor = out_VTD[videos], kept_VKD[videos], factor_VT1[videos]
            pairs = of_out_VTD[videos] + of_mean_VD[videos, None] / out.shape[1]
            # Back through the normalisation, but for its factor, which the weights carry: they are fewer.
            along = (pairs * out).mean(-1, keepdim=True)
            pairs -= pairs.mean(-1, keepdim=True)
            pairs.addcmul_(out, along, value=-1)
            weights_KT = (weights_VTK[videos] * factor).transpose(1, 2)
            torch.bmm(weights_KT, pairs, out=of_kept_VKD[videos])
            of_weights = kept @ pairs.transpose(1, 2)
            if keep_VTD is not None:
                pairs *= keep_VTD[videos].to(pairs.dtype)
                torch.bmm(weights_KT * ctx.scale, pairs, out=of_dropped_VKD[videos])
                of_weights.baddbmm_(dropped_VKD[videos], pairs.transpose(1, 2), alpha=ctx.scale)
            torch.mul(of_weights, factor.transpose(1, 2), out=of_weights_VKT[videos])
        of_dropped_VKD = of_kept_VKD if keep_VTD is None else of_dropped_VKD
        return of_weights_VKT.transpose(1, 2), of_kept_VKD, of_dropped_VKD, None, None, None


class _Cosines(torch.autograd.Function):
    """Cosines ``(V, A, T)`` of unit anchors with ``vectors * gain + bias``, which is made again when it is needed."""

    @staticmethod
    def forward(ctx: Any, anchor_ATD: Tensor, vectors_VTD: Tensor, gain_D: Tensor, bias_D: Tensor) -> Tensor:
        cosine_VAT = vectors_VTD.new_empty(len(vectors_VTD), *anchor_ATD.shape[:2])
        norm_V1T = torch.empty_like(cosine_VAT[:, :1])
        for videos in _tiles(vectors_VTD):
            pooled = torch.addcmul(bias_D, vectors_VTD[videos], gain_D)
            norm_V1T[videos] = torch.linalg.vector_norm(pooled, dim=-1)[:, None].clamp_min_(1e-12)
            product_TAV = anchor_ATD.transpose(0, 1) @ pooled.permute(1, 2, 0)
            torch.div(product_TAV.permute(2, 1, 0), norm_V1T[videos], out=cosine_VAT[videos])
        ctx.save_for_backward(anchor_ATD, vectors_VTD, gain_D, bias_D, cosine_VAT, norm_V1T)
        return cosine_VAT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        anchor_ATD, vectors_VTD, gain_D, bias_D, cosine_VAT, norm_V1T = ctx.saved_tensors
        of_product_VAT = gradients[0] / norm_V1T
        shrink_VT1 = -((of_product_VAT * cosine_VAT).sum(1) / norm_V1T[:, 0])[..., None]
        of_anchor_TAD = torch.zeros_like(anchor_ATD.transpose(0, 1), memory_format=torch.contiguous_format)
        of_vectors_VTD = torch.empty_like(vectors_VTD, memory_format=torch.contiguous_format)
        of_gain_D, of_bias_D = torch.zeros_like(gain_D), torch.zeros_like(bias_D)
        for videos in _tiles(vectors_VTD):
            vectors, of_product = vectors_VTD[videos], of_product_VAT[videos]
            pooled = torch.addcmul(bias_D, vectors, gain_D)
            of_anchor_TAD += of_product.permute(2, 1, 0) @ pooled.transpose(0, 1)
            of_pooled = pooled.mul_(shrink_VT1[videos])
            for anchor_TD, along in zip(anchor_ATD, of_product.unbind(1)):
                of_pooled.addcmul_(anchor_TD, along[..., None])
            of_bias_D += of_pooled.sum(dim=(0, 1))
            torch.mul(of_pooled, gain_D, out=of_vectors_VTD[videos])
            of_gain_D += of_pooled.mul_(vectors).sum(dim=(0, 1))
        return of_anchor_TAD.transpose(0, 1), of_vectors_VTD, of_gain_D, of_bias_D
