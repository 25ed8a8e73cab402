"""Exact scores of every text against every video, tile by tile; pure.

The pooling is folded: its attention weights sum to one and its LayerNorms are affine but for one scalar a pair, so
every pooled vector of a video lies in the span of H F + 2 vectors, and nothing of size D x D is done for a pair.
"""

# Shapes: T texts, V videos, F frames, H heads, K = H F, M trials, D embedding width.

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.pooling import XPool


def score(
    head: RetrievalHead,
    text_TD: Tensor,
    frames_VFD: Tensor,
    noise_TMD: Tensor | None = None,
    *,
    protocol: Literal["query_conditioned", "published_code"] = "query_conditioned",
    pooled_by: Literal["text", "sample"] = "text",
    caption_owner_T: Tensor | None = None,
    pair_noise_VMTD: Tensor | None = None,
    tile_texts: int = 64,
    tile_videos: int = 32,
) -> Tensor:
    """Similarity ``(T, V)``: the cosine of each text, or of the best of its M samples, with each pooled video.

    Args:
        head: in evaluation mode.
        text_TD, frames_VFD: raw embeddings.
        noise_TMD: ``eps`` of each text, or ``(1, M, D)`` shared by all; None scores the mean text.
        protocol: ``published_code`` pools every video with its own caption, whatever the query: a leak, for parity
            only. A caption slot that a video lacks gives NaN.
        pooled_by: what asks the frames; ``sample`` pools every video anew for every sample of every pair.
        caption_owner_T: video of each text; ``published_code`` needs it, and all texts in one call.
        pair_noise_VMTD: fresh ``eps`` of every pair (the authors' law), in place of ``noise_TMD``.
        tile_texts, tile_videos: pairs in hand at a time; they bound the memory and change no score beyond rounding.

    Raises:
        ValueError: not-a-number features (rows named), no trials, an empty gallery.
    """
    for name, features in (("texts", text_TD), ("videos", frames_VFD)):
        if len(features) == 0:
            raise ValueError(f"there are no {name} to score")
        bad = torch.isnan(features).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{len(bad)} {name} have features that are not numbers; the first are {bad[:5]}")
    noise = noise_TMD if pair_noise_VMTD is None else pair_noise_VMTD
    if noise is not None and noise.shape[1] == 0:
        raise ValueError("stochastic.num_trials is 0; a pair needs at least one sample")
    with torch.no_grad():
        similarity_TV = text_TD.new_empty(len(text_TD), len(frames_VFD))
        own = None
        if protocol == "published_code":
            if caption_owner_T is None:
                raise ValueError("the published_code protocol needs the video of every caption")
            own = _own_captions(caption_owner_T, len(frames_VFD))
        for v in range(0, len(frames_VFD), tile_videos):
            videos = slice(v, v + tile_videos)
            folded = _Folded(head, frames_VFD[videos])
            own_pooled = None if own is None else folded.pooled_by_own(text_TD, own[0][videos])
            for t in range(0, len(text_TD), tile_texts):
                texts = slice(t, t + tile_texts)
                noise_tile = None
                if pair_noise_VMTD is not None:
                    noise_tile = pair_noise_VMTD[videos, :, texts].permute(2, 0, 1, 3)
                elif noise_TMD is not None:
                    noise_tile = (noise_TMD if len(noise_TMD) == 1 else noise_TMD[texts])[:, None]
                target = None if own is None or own_pooled is None else own_pooled[:, own[1][texts]].transpose(0, 1)
                if pooled_by == "sample" and noise_tile is not None:
                    similarity_TV[texts, videos] = folded.tile_by_sample(text_TD[texts], noise_tile)
                else:
                    similarity_TV[texts, videos] = folded.tile(text_TD[texts], noise_tile, target)
        return similarity_TV


def _own_captions(owner_T: Tensor, num_videos: int) -> tuple[Tensor, Tensor]:
    """``(V, slots)`` text number of each video's captions, -1 for none, and the slot of each text."""
    counts = [0] * num_videos
    slots = []
    for owner in owner_T.tolist():
        slots.append(counts[owner])
        counts[owner] += 1
    table = torch.full((num_videos, max(counts)), -1)
    slot_T = torch.tensor(slots)
    table[owner_T, slot_T] = torch.arange(len(owner_T))
    return table, slot_T


class _Folded:
    """What a tile of videos contributes to any text."""

    def __init__(self, head: RetrievalHead, frames_VFD: Tensor) -> None:
        self.head, self.frames_VFD = head, frames_VFD
        pool = head.pooling
        if not isinstance(pool, XPool):
            return
        width = frames_VFD.shape[-1]
        values_VKD = pool.values(frames_VFD).flatten(1, 2)
        values_VKD = values_VKD - values_VKD.mean(-1, keepdim=True)
        self.gram_in = values_VKD @ values_VKD.transpose(1, 2) / width
        first, last = pool.norm_attended, pool.norm_out
        scaled = values_VKD * first.weight
        constant_D = first.bias + pool.linear(first.bias)
        basis = torch.cat(
            [scaled + F.linear(scaled, pool.linear.weight), constant_D.expand(len(frames_VFD), 1, width)], dim=1
        )
        basis = basis - basis.mean(-1, keepdim=True)
        self.gram_out = basis @ basis.transpose(1, 2) / width
        self.basis = torch.cat([basis * last.weight, last.bias.expand(len(frames_VFD), 1, width)], dim=1)

    def pooled(self, text_TD: Tensor) -> Tensor:
        """``(V, T, D)`` for the texts of one tile."""
        pool = self.head.pooling
        if not isinstance(pool, XPool):
            return pool(text_TD, self.frames_VFD)
        weights = pool.attention(text_TD, self.frames_VFD).transpose(1, 2).flatten(2)
        variance = ((weights @ self.gram_in) * weights).sum(-1, keepdim=True)
        weights = weights * (variance + pool.norm_attended.eps).rsqrt()
        weights = torch.cat([weights, torch.ones_like(weights[..., :1])], dim=-1)
        variance = ((weights @ self.gram_out) * weights).sum(-1, keepdim=True)
        weights = weights * (variance + pool.norm_out.eps).rsqrt()
        return torch.cat([weights, torch.ones_like(weights[..., :1])], dim=-1) @ self.basis

    def pooled_by_own(self, text_TD: Tensor, own_VS: Tensor) -> Tensor:
        """``(V, slots, D)`` each video pooled by its own captions; NaN where it has fewer."""
        rows = []
        for number, captions in enumerate(own_VS.tolist()):
            alone = _Folded(self.head, self.frames_VFD[number : number + 1])
            pooled_SD = alone.pooled(text_TD[[max(c, 0) for c in captions]])[0].clone()
            pooled_SD[[c < 0 for c in captions]] = torch.nan
            rows.append(pooled_SD)
        return torch.stack(rows)

    def tile(self, text_TD: Tensor, noise: Tensor | None, target_TVD: Tensor | None) -> Tensor:
        """Similarity ``(T, V)`` of one tile.

        Args:
            text_TD: the tile's texts.
            noise: ``(T or 1, V or 1, M, D)``.
            target_TVD: what the chosen sample is compared with, where that is not what chose it.
        """
        pooled_TVD = self.pooled(text_TD).transpose(0, 1)
        direction = F.normalize(pooled_TVD, dim=-1)
        other = None if target_TVD is None else F.normalize(target_TVD, dim=-1)
        mass = self.head.mass
        if mass is None or noise is None:
            chosen = direction if other is None else other
            return torch.einsum("td,tvd->tv", F.normalize(text_TD, dim=-1), chosen)
        cosine_TVF = torch.einsum("td,vfd->tvf", F.normalize(text_TD, dim=-1), F.normalize(self.frames_VFD, dim=-1))
        radius = mass.radius_of(cosine_TVF, text_TD[:, None]).expand_as(pooled_TVD)

        def along(vector_TVD: Tensor, noise: Tensor) -> Tensor:
            """Sums over D of vector * eps, ``(T, V, M)``: one GEMM a text where its noise serves every video."""
            if noise.shape[1] == 1:
                return vector_TVD @ noise[:, 0].transpose(-1, -2)
            return torch.einsum("tvd,tvmd->tvm", vector_TVD, noise)

        text_T1D = text_TD[:, None]
        square = (text_T1D**2).sum(-1, keepdim=True) + 2 * along(text_T1D * radius, noise) + along(radius**2, noise**2)
        length = square.clamp_min(1e-24).sqrt()
        cosine_TVM = ((text_T1D * direction).sum(-1, keepdim=True) + along(radius * direction, noise)) / length
        best, trial = cosine_TVM.max(dim=-1)
        if other is None:
            return best
        leaked = ((text_T1D * other).sum(-1, keepdim=True) + along(radius * other, noise)) / length
        return leaked.gather(-1, trial[..., None]).squeeze(-1)

    def tile_by_sample(self, text_TD: Tensor, noise: Tensor) -> Tensor:
        """Similarity ``(T, V)`` where each sample asks the frames itself; noise ``(T or 1, V or 1, M, D)``."""
        assert self.head.mass is not None
        columns = []
        for number in range(len(self.frames_VFD)):
            frames_1FD = self.frames_VFD[number : number + 1]
            noise_TMD = noise[:, number if noise.shape[1] > 1 else 0]
            cosine_TF = F.normalize(text_TD, dim=-1) @ F.normalize(frames_1FD[0], dim=-1).T
            radius_TD = self.head.mass.radius_of(cosine_TF, text_TD).expand_as(text_TD)
            sampled_TMD = text_TD[:, None] + radius_TD[:, None] * noise_TMD
            pooled = (
                _Folded(self.head, frames_1FD).pooled(sampled_TMD.flatten(0, 1))[0].unflatten(0, sampled_TMD.shape[:2])
            )
            columns.append(F.cosine_similarity(sampled_TMD, pooled, dim=-1).amax(dim=-1))
        return torch.stack(columns, dim=1)
