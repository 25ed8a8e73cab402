"""Text-conditioned pooling of a video's frames (X-Pool), and its plain alternative."""

# Shapes: T texts, V videos, F frames, H heads, K = H F, D embedding width, E = D / H.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmass_dist.noise import keyed_mask


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

    def values(self, frames_VFD: Tensor) -> Tensor:
        """What each frame and head adds to the output projection, ``(V, H, F, D)``.

        The weights of a head sum to one, so the projection and its bias may be applied to the frames, V F rows,
        in place of the V T pooled rows.
        """
        value_VFHE = self.value(self.norm_in(frames_VFD)).unflatten(-1, (self.num_heads, -1))
        weight_DHE = self.out.weight.unflatten(1, (self.num_heads, -1))
        return torch.einsum("vfhe,dhe->vhfd", value_VFHE, weight_DHE) + self.out.bias / self.num_heads

    def span(self, frames_VFD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What pooled vectors of a video are made of: ``gram_VKK``, ``attended_VKD`` and ``projected_VKD``, K = H F.

        A normalisation is affine but for one number a pair, its deviation, and the Gram matrix gives that from the
        weights. So with weights divided by it (:meth:`normalised`), the attended vector is a sum of ``attended_VKD``
        and its projection one of ``projected_VKD``: nothing of size D x D is done for a pair.
        """
        values_VKD = self.values(frames_VFD).flatten(1, 2)
        values_VKD = values_VKD - values_VKD.mean(-1, keepdim=True)
        attended_VKD = values_VKD * self.norm_attended.weight
        gram_VKK = values_VKD @ values_VKD.transpose(1, 2) / values_VKD.shape[-1]
        return gram_VKK, attended_VKD, F.linear(attended_VKD, self.linear.weight)

    @staticmethod
    def normalised(weights_VTK: Tensor, gram_VKK: Tensor, eps: float) -> Tensor:
        """Weights divided by the deviation, over D, of the vector that they make."""
        variance_VT1 = ((weights_VTK @ gram_VKK) * weights_VTK).sum(-1, keepdim=True).clamp_min(0)
        return weights_VTK * (variance_VT1 + eps).rsqrt()

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: list[int] | None = None) -> Tensor:
        """Every video as every text sees it, ``pooled_VTD``; embeddings of any norm.

        Args:
            text_TD: what asks: text embeddings, of the whole global batch in training.
            frames_VFD: frame embeddings in time order.
            dropout_keys: one of each video; training needs them where there is dropout.
        """
        weights_VTK = self.attention(self.queries(text_TD), self.keys(frames_VFD)).transpose(1, 2).flatten(2)
        gram_VKK, attended_VKD, projected_VKD = self.span(frames_VFD)
        weights_VTK = self.normalised(weights_VTK, gram_VKK, self.norm_attended.eps)
        constant_D = self.linear(self.norm_attended.bias)
        if not (self.training and self.dropout):
            both_VTD = weights_VTK @ (attended_VKD + projected_VKD) + (self.norm_attended.bias + constant_D)
            return self.norm_out(both_VTD)
        assert dropout_keys is not None, "in training every video brings the key of its dropout mask"
        keep_VTD = keyed_mask(dropout_keys, (len(text_TD), text_TD.shape[1]), self.dropout, text_TD.device)
        scale = 1 / (1 - self.dropout)  # of what is kept; on the frames' vectors it costs nothing
        dropped_VTD = (weights_VTK @ (scale * projected_VKD) + scale * constant_D) * keep_VTD
        return self.norm_out(weights_VTK @ attended_VKD + self.norm_attended.bias + dropped_VTD)


class MeanPool(nn.Module):
    """The mean of the normalised frames, whatever the text."""

    def forward(self, text_TD: Tensor, frames_VFD: Tensor, dropout_keys: list[int] | None = None) -> Tensor:
        """``pooled_VTD``, the same for every text (a view)."""
        mean_VD = F.normalize(frames_VFD, dim=-1).mean(dim=1)
        return mean_VD[:, None].expand(-1, len(text_TD), -1)
