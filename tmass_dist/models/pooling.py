"""Text-conditioned pooling of a video's frames (X-Pool), factored so that ``(V, T, D)`` is computed once and kept once.

:class:`XPool` and :class:`MeanPool` share three methods: ``prepare`` does the work that depends on the videos alone,
``pool`` adds the texts, and ``pool_pairs`` is one after the other.
"""

# Shapes: T texts, V videos, F frames, H heads, K = H F, A anchors, D embedding width,
# E = D / H.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmass_dist.errors import UserError
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
        product_VAT: Tensor = _AnchorProducts.apply(anchor_ATD, self.vectors_VTD, self.gain_D, self.bias_D)  # pyright: ignore
        return product_VAT / torch.linalg.vector_norm(anchor_ATD, dim=-1).clamp_min(1e-12)


@dataclass(frozen=True)
class PreparedVideos:
    """What :meth:`XPool.pool` needs of some videos."""

    keys_VHFE: Tensor
    """Attention keys of the frames; with ``in_frame_space`` the normalised frames themselves, ``(V, H, F, D)``."""
    gram_VKK: Tensor
    attended_VKD: Tensor
    projected_VKD: Tensor
    in_frame_space: bool

    def rows(self, videos: slice) -> PreparedVideos:
        """Some of the videos."""
        tensors = (self.keys_VHFE, self.gram_VKK, self.attended_VKD, self.projected_VKD)
        keys_VHFE, gram_VKK, attended_VKD, projected_VKD = (values[videos] for values in tensors)
        return PreparedVideos(keys_VHFE, gram_VKK, attended_VKD, projected_VKD, self.in_frame_space)


class PreparedMeans(NamedTuple):
    """What :meth:`MeanPool.pool` needs of some videos."""

    mean_VD: Tensor

    def rows(self, videos: slice) -> PreparedMeans:
        """Some of the videos."""
        return PreparedMeans(self.mean_VD[videos])


class XPool(nn.Module):
    """One attention layer: the texts are the queries, the frames of each video the keys and values.

    Source: Gorti et al., CVPR 2022, as T-MASS uses it. There is no residual connection from the text and none around
    the attention.
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
            nn.init.eye_(layer.weight)  # as the authors initialise it: pooling begins as plain attention
            nn.init.zeros_(layer.bias)

    def queries(self, text_TD: Tensor, in_frame_space: bool = False) -> Tensor:
        """Scaled attention queries of the texts, ``(H, T, E)``; ``(H, T, D)`` with ``in_frame_space``.

        ``q.(W f + b)`` equals ``(W^T q).f`` plus a constant that the softmax over the frames ignores. So the key
        projection may be applied to the V F frames, or, transposed, to the T queries (``in_frame_space``).
        """
        query_HTE = self.query(self.norm_in(text_TD)).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        query_HTE = query_HTE * query_HTE.shape[-1] ** -0.5
        return query_HTE @ self.key.weight.unflatten(0, (self.num_heads, -1)) if in_frame_space else query_HTE

    def keys(self, normed_VFD: Tensor, in_frame_space: bool = False) -> Tensor:
        """Attention keys ``(V, H, F, E)`` of frames after ``norm_in``; see :meth:`queries`."""
        if in_frame_space:
            return normed_VFD[:, None].expand(-1, self.num_heads, -1, -1)
        return F.linear(normed_VFD, self.key.weight).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def attention(query_HTE: Tensor, key_VHFE: Tensor) -> Tensor:
        """Attention weights ``(V, H, F, T)``; each text's sum to one over the frames."""
        # One product for each head over the frames of all videos: many small products take twice the time. The texts
        # are the innermost dimension, so the softmax is vectorised over them; over 12 innermost frames it is ten
        # times slower.
        key_HNE = key_VHFE.transpose(0, 1).flatten(1, 2)
        score_HVFT = (key_HNE @ query_HTE.transpose(1, 2)).unflatten(1, (len(key_VHFE), -1))
        return score_HVFT.softmax(dim=2).transpose(0, 1)

    def prepare(self, frames_VFD: Tensor, num_texts: int | None = None) -> PreparedVideos:
        """The part of the pooling that depends on the videos alone.

        ``num_texts`` says how many texts will be pooled for; where they are fewer than the frames, the queries are
        moved into frame space and not the frames into key space. None: as suits any number of texts.

        A LayerNorm is affine except for one number of each pair, its standard deviation, and the Gram matrix of the
        frames' contributions gives that from the attention weights. So with weights divided by it
        (:meth:`normalised`), the attended vector is a weighted sum of ``attended_VKD`` and its projection the same
        sum of ``projected_VKD``: no product with a D x D matrix is done for a pair.
        """
        normed_VFD = self.norm_in(frames_VFD)
        in_frame_space = self.num_heads == 1
        if num_texts is not None:
            num_frames, width = frames_VFD.shape[:2].numel(), frames_VFD.shape[2]
            in_frame_space = num_texts * (width + (self.num_heads - 1) * num_frames) < num_frames * width
        # A head's weights sum to one, so the output projection and its bias may be applied to the V F frames instead
        # of the V T pooled rows.
        if self.num_heads == 1 and normed_VFD.shape[:2].numel() > self.out.out_features:
            # One product with the frames instead of two.
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
        projected_VKD = F.linear(attended_VKD, self.linear.weight)
        keys_VHFE = self.keys(normed_VFD, in_frame_space)
        return PreparedVideos(keys_VHFE, gram_VKK, attended_VKD, projected_VKD, in_frame_space)

    @staticmethod
    def normalised(weights_VKT: Tensor, gram_VKK: Tensor, eps: float) -> Tensor:
        """Weights divided by the standard deviation, over D, of the vector that is their weighted sum."""
        variance_V1T = ((gram_VKK @ weights_VKT) * weights_VKT).sum(1, keepdim=True).clamp_min(0)
        return weights_VKT * (variance_V1T + eps).rsqrt()

    def attended_weights(self, query_HTE: Tensor, videos: PreparedVideos) -> Tensor:
        """Attention weights ``(V, K, T)`` divided by the deviation that ``norm_attended`` divides by."""
        weights_VKT = self.attention(query_HTE, videos.keys_VHFE).flatten(1, 2)
        return self.normalised(weights_VKT, videos.gram_VKK, self.norm_attended.eps)

    def pool(
        self,
        text_TD: Tensor,
        videos: PreparedVideos,
        dropout_keys: DropoutKeys | None = None,
        first_text: int = 0,
    ) -> PooledPairs:
        """Prepared videos pooled by each text.

        Its twin without dropout is :class:`tmass_dist.models.folding.FoldedVideos`, which replaces ``norm_out`` by a
        second Gram matrix; ``tests/test_scoring.py`` holds the two equal.

        Args:
            text_TD: text embeddings of any norm; in training, of the whole global batch.
            videos: of :meth:`prepare`.
            dropout_keys: one for each video; training needs them where there is dropout.
            first_text: number of the first text in its batch; it selects the dropout masks.
        """
        weights_VTK = self.attended_weights(self.queries(text_TD, videos.in_frame_space), videos).transpose(1, 2)
        # The softmax ignores the bias of the keys; the parameter still gets a gradient, of zeros.
        bias_D = self.norm_attended.bias + 0 * self.key.bias
        dropout = self.dropout if self.training else 0.0
        assert dropout_keys is not None or not dropout, "in training every video needs the key of its dropout mask"
        vectors_VTD, mean_VD = _NormalisedMixture.apply(  # pyright: ignore[reportGeneralTypeIssues]
            weights_VTK,
            videos.attended_VKD,
            bias_D,
            videos.projected_VKD,
            self.linear(bias_D),
            dropout_keys,
            first_text,
            dropout,
            self.norm_out.eps,
        )
        gain_D, last_D = self.norm_out.weight, self.norm_out.bias
        return PooledPairs(vectors_VTD, torch.addcmul(last_D, mean_VD, gain_D), gain_D, last_D)

    def pool_pairs(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> PooledPairs:
        """Every video pooled by every text; embeddings of any norm, frames in time order. See :meth:`pool`."""
        return self.pool(text_TD, self.prepare(frames_VFD, len(text_TD)), dropout_keys)

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> Tensor:
        """The pooled vectors, ``(V, T, D)``; see :meth:`pool_pairs`."""
        return self.pool_pairs(text_TD, frames_VFD, dropout_keys).materialise()


class MeanPool(nn.Module):
    """The mean of the normalised frames, the same for every text."""

    def prepare(self, frames_VFD: Tensor, num_texts: int | None = None) -> PreparedMeans:
        """The means; ``num_texts`` makes no difference."""
        return PreparedMeans(F.normalize(frames_VFD, dim=-1).mean(dim=1))

    def pool(
        self,
        text_TD: Tensor,
        videos: PreparedMeans,
        dropout_keys: DropoutKeys | None = None,
        first_text: int = 0,
    ) -> PooledPairs:
        """As :meth:`XPool.pool`; the vectors are a view."""
        (mean_VD,) = videos
        one_D = torch.ones_like(mean_VD[0])
        return PooledPairs(mean_VD[:, None].expand(-1, len(text_TD), -1), mean_VD, one_D, torch.zeros_like(one_D))

    def pool_pairs(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> PooledPairs:
        """As :meth:`XPool.pool_pairs`."""
        return self.pool(text_TD, self.prepare(frames_VFD))

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> Tensor:
        """The pooled vectors, ``(V, T, D)``, a view."""
        return self.pool_pairs(text_TD, frames_VFD).vectors_VTD


def _tiles(pairs_VTD: Tensor) -> Iterator[slice]:
    """A few videos at a time, so that the intermediate results of a tile stay in the processor's cache."""
    numbers = TILE_NUMBERS["cpu" if pairs_VTD.device.type == "cpu" else "cuda"]
    tile = max(1, numbers // pairs_VTD[0].numel())
    return (slice(start, start + tile) for start in range(0, len(pairs_VTD), tile))


class _NormalisedMixture(torch.autograd.Function):
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


class _AnchorProducts(torch.autograd.Function):
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
            grad_anchor_TAD += grad_dot.permute(2, 1, 0) @ pooled.transpose(0, 1)
            grad_pooled = pooled.mul_(shrink_VT1[videos])
            for anchor_TD, grad_one in zip(anchor_ATD, grad_dot.unbind(1)):
                grad_pooled.addcmul_(anchor_TD, grad_one[..., None])
            grad_bias_D += grad_pooled.sum(dim=(0, 1))
            torch.mul(grad_pooled, gain_D, out=grad_vectors_VTD[videos])
            grad_gain_D += grad_pooled.mul_(vectors).sum(dim=(0, 1))
        return grad_anchor_TAD.transpose(0, 1), grad_vectors_VTD, grad_gain_D, grad_bias_D
