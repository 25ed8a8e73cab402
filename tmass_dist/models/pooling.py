"""Text-conditioned pooling of a video's frames (X-Pool), factored so that ``(V, T, D)`` is computed once and kept once.

All poolings (see also ``frame_pooling.py``) have three methods: ``prepare`` does the work that depends on the videos
alone, ``pool`` adds the texts, and ``pool_pairs`` is one after the other.
"""

# Shapes: T texts, V videos, F frames, H heads, K = H F, D embedding width, E = D / H.

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmass_dist.errors import UserError
from tmass_dist.models.frame_pooling import FramePool
from tmass_dist.models.pair_products import DropoutKeys, NormalisedMixture, PooledPairs


@dataclass(frozen=True)
class PreparedVideos:
    """What :meth:`XPool.pool` needs of some videos."""

    keys_VHFE: Tensor
    """Attention keys of the frames; with ``in_frame_space`` the normalised frames themselves, ``(V, H, F, D)``."""
    gram_VKK: Tensor
    attended_VKD: Tensor
    projected_VKD: Tensor
    in_frame_space: bool
    unit_VFD: Tensor | None = None
    """Frames of norm 1, for the best frame."""

    def rows(self, videos: slice) -> PreparedVideos:
        """Some of the videos."""
        tensors = (self.keys_VHFE, self.gram_VKK, self.attended_VKD, self.projected_VKD)
        keys_VHFE, gram_VKK, attended_VKD, projected_VKD = (values[videos] for values in tensors)
        unit_VFD = None if self.unit_VFD is None else self.unit_VFD[videos]
        return PreparedVideos(keys_VHFE, gram_VKK, attended_VKD, projected_VKD, self.in_frame_space, unit_VFD)


class XPool(nn.Module):
    """One attention layer: the texts are the queries, the frames of each video the keys and values.

    Source: Gorti et al., CVPR 2022, as T-MASS uses it. There is no residual connection from the text and none around
    the attention.

    Args:
        embed_dim: D.
        num_heads: H, a divisor of D.
        dropout: its probability.
        add_best_frame: ours: add the direction of the frame closest to the text, times a learnt weight. Its initial
            weight is the norm of the initial pooled vectors.
    """

    def __init__(
        self, embed_dim: int, num_heads: int = 1, dropout: float = 0.3, *, add_best_frame: bool = False
    ) -> None:
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
        self.best_frame = FramePool("best_frame") if add_best_frame else None
        if add_best_frame:
            self.log_relative_weight = nn.Parameter(torch.zeros(1))

    @property
    def best_frame_weight(self) -> Tensor:
        """The weight of the best frame, shape [1]; only with ``add_best_frame``."""
        return self.norm_out.weight.shape[0] ** 0.5 * self.log_relative_weight.exp()

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
        unit_VFD = None if self.best_frame is None else F.normalize(frames_VFD, dim=-1)
        return PreparedVideos(keys_VHFE, gram_VKK, attended_VKD, projected_VKD, in_frame_space, unit_VFD)

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
        vectors_VTD, mean_VD = NormalisedMixture.apply(  # pyright: ignore[reportGeneralTypeIssues]
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
        pairs = PooledPairs(vectors_VTD, torch.addcmul(last_D, mean_VD, gain_D), gain_D, last_D)
        if self.best_frame is None or videos.unit_VFD is None:
            return pairs
        closest_VTD = self.best_frame.weights(text_TD, videos.unit_VFD) @ videos.unit_VFD
        vectors_VTD = torch.addcmul(pairs.materialise(), closest_VTD, self.best_frame_weight)
        return PooledPairs(vectors_VTD, vectors_VTD.mean(dim=1), torch.ones_like(gain_D), torch.zeros_like(last_D))

    def pool_pairs(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> PooledPairs:
        """Every video pooled by every text; embeddings of any norm, frames in time order. See :meth:`pool`."""
        return self.pool(text_TD, self.prepare(frames_VFD, len(text_TD)), dropout_keys)

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: DropoutKeys | None = None) -> Tensor:
        """The pooled vectors, ``(V, T, D)``; see :meth:`pool_pairs`."""
        return self.pool_pairs(text_TD, frames_VFD, dropout_keys).materialise()
