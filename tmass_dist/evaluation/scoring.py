"""Exact scores of every text against every video, tile by tile; pure functions of features and noise.

The pooling is folded (:mod:`tmass_dist.models.folding`): nothing of size D x D is done for a pair.
"""

# Shapes: T texts, V videos, F frames, M trials, L vectors of a video's basis, D embedding width.

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.errors import UserError
from tmass_dist.models.folding import FoldedVideos
from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.stochastic import frame_cosines


class Gallery:
    """Videos prepared once, to be scored by any texts."""

    def __init__(self, head: RetrievalHead, frames_VFD: Tensor, *, tile_videos: int = 128) -> None:
        """Fold every video.

        Args:
            head: in evaluation mode.
            frames_VFD: raw embeddings, in time order.
            tile_videos: videos per tile; it bounds the memory and changes no score beyond rounding.

        Raises:
            UserError: no videos, or features that are not numbers (rows named).
        """
        _check("videos", frames_VFD)
        self.head, self.num_videos, self.tile_videos = head, len(frames_VFD), tile_videos
        with torch.no_grad():
            self.tiles = [
                (slice(v, v + tile_videos), _Tile(head, frames_VFD[v : v + tile_videos]))
                for v in range(0, len(frames_VFD), tile_videos)
            ]

    def score(
        self,
        text_TD: Tensor,
        noise_TMD: Tensor | None = None,
        *,
        protocol: Literal["query_conditioned", "published_code"] = "query_conditioned",
        pooled_by: Literal["text", "sample"] = "text",
        caption_owner_T: Tensor | None = None,
        pair_noise_VMTD: Tensor | None = None,
        precision: torch.dtype = torch.float32,
        tile_texts: int = 16,
    ) -> Tensor:
        """Similarity ``(T, V)``: the cosine of each text, or of the best of its M samples, with each pooled video.

        Args:
            text_TD: raw embeddings.
            noise_TMD: ``eps`` of each text, or ``(1, M, D)`` shared by all; None scores the text itself. A head that
                draws no samples ignores it.
            protocol: ``published_code`` pools each video with its own caption for all queries: a leak, for
                parity only. A caption slot that a video lacks gives NaN.
            pooled_by: the attention query; ``sample`` pools each video once for each sample of each pair.
            caption_owner_T: video of each text; ``published_code`` needs it, and all texts in one call.
            pair_noise_VMTD: fresh ``eps`` of every pair (the authors' law), in place of ``noise_TMD``.
            precision: of the products of ``noise_TMD`` with what the text itself pooled; all else is float32.
            tile_texts: texts per tile.

        Raises:
            UserError: no texts, features that are not numbers (rows named), or no trials.
        """
        _check("texts", text_TD)
        noise = noise_TMD if pair_noise_VMTD is None else pair_noise_VMTD
        if noise is not None and noise.shape[1] == 0:
            raise UserError("stochastic.num_trials is 0; a pair needs at least one sample")
        own = None
        if protocol == "published_code":
            if caption_owner_T is None:
                raise UserError("the published_code protocol needs the video of every caption")
            own = _own_captions(caption_owner_T, self.num_videos, text_TD.device)
        sampled = noise is not None and self.head.draws_samples
        similarity_TV = text_TD.new_empty(len(text_TD), self.num_videos)
        with torch.no_grad():
            if sampled and noise_TMD is not None and noise is noise_TMD and own is None and pooled_by == "text":
                self._noise_of_text(text_TD, _Samples.of(text_TD, noise_TMD, precision), tile_texts, similarity_TV)
                return similarity_TV
            for videos, folded in self.tiles:
                own_pooled = None if own is None else folded.pooled_by_own(text_TD, own[0][videos])
                for t in range(0, len(text_TD), tile_texts):
                    texts = slice(t, t + tile_texts)
                    tile_TD = text_TD[texts]
                    target = None if own is None or own_pooled is None else own_pooled[:, own[1][texts]].transpose(0, 1)
                    if not sampled:
                        found = folded.mean_text(tile_TD, target)
                    elif pair_noise_VMTD is not None:
                        pairs = pair_noise_VMTD[videos, :, texts].permute(2, 0, 1, 3)
                        found = folded.fresh_noise(tile_TD, pairs, target)
                    else:
                        assert noise_TMD is not None
                        rows = slice(None) if len(noise_TMD) == 1 else texts
                        if pooled_by == "sample":
                            found = folded.by_sample(tile_TD, noise_TMD[rows])
                        else:
                            found = folded.fresh_noise(tile_TD, noise_TMD[rows, None], target)
                    similarity_TV[texts, videos] = found
        return similarity_TV

    def _noise_of_text(self, text_TD: Tensor, samples: _Samples, tile_texts: int, out_TV: Tensor) -> None:
        """Write the similarity of each text's best sample, its noise the same for every video."""
        room = min(tile_texts, len(text_TD)) * min(self.tile_videos, self.num_videos) * text_TD.shape[1]
        scratch = tuple(text_TD.new_empty(room) for _ in range(2))
        query_HTE = self.tiles[0][1].videos.queries(text_TD)
        for videos, folded in self.tiles:
            # Products with frames take all texts at once, the samples' so few that what they read stays in the caches.
            weights_VTL = folded.videos.coefficients(text_TD, query_HTE)
            cosine_VTF = frame_cosines(text_TD, folded.unit_VFD)
            for t in range(0, len(text_TD), tile_texts):
                texts = slice(t, t + tile_texts)
                out_TV[texts, videos] = folded.noise_of_text(
                    text_TD[texts], weights_VTL[:, texts], cosine_VTF[:, texts], samples.rows(texts), scratch
                )


def score(
    head: RetrievalHead,
    text_TD: Tensor,
    frames_VFD: Tensor,
    noise_TMD: Tensor | None = None,
    *,
    tile_videos: int = 128,
    **options: Any,
) -> Tensor:
    """Similarity ``(T, V)`` in one call; see :class:`Gallery`."""
    return Gallery(head, frames_VFD, tile_videos=tile_videos).score(text_TD, noise_TMD, **options)


def _check(name: str, features: Tensor) -> None:
    if len(features) == 0:
        raise UserError(f"there are no {name} to score")
    bad = torch.isnan(features).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{len(bad)} {name} have features that are not numbers; the first are {bad[:5]}")


def _own_captions(owner_T: Tensor, num_videos: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(V, slots)`` text number of each video's captions, -1 for none, and the slot of each text; on ``device``."""
    owners, counts, slots = owner_T.tolist(), [0] * num_videos, []
    for owner in owners:
        slots.append(counts[owner])
        counts[owner] += 1
    table_VS, slot_T = torch.full((num_videos, max(counts)), -1), torch.tensor(slots)
    table_VS[torch.tensor(owners), slot_T] = torch.arange(len(owners))
    return table_VS.to(device), slot_T.to(device)


class _Samples(NamedTuple):
    """What the samples of some texts are multiplied by, for any video: ``(T, M, D)`` each."""

    noise_TMD: Tensor
    facing_TMD: Tensor
    """Noise times text, doubled."""
    square_TMD: Tensor

    @classmethod
    def of(cls, text_TD: Tensor, noise_TMD: Tensor, precision: torch.dtype) -> _Samples:
        noise_TMD = noise_TMD.expand(len(text_TD), -1, -1)  # it may be shared by all texts
        facing_TMD = noise_TMD * (2 * text_TD[:, None])
        return cls(noise_TMD.to(precision), facing_TMD.to(precision), (noise_TMD**2).to(precision))

    def rows(self, texts: slice) -> _Samples:
        return _Samples(*(values_TMD[texts] for values_TMD in self))


def _add_products(sum_TMV: Tensor, values_TMD: Tensor, vector_VTD: Tensor) -> Tensor:
    """Add each text's values times the vectors of its pairs, in place."""
    if values_TMD.dtype == torch.float32:
        return sum_TMV.baddbmm_(values_TMD, vector_VTD.permute(1, 2, 0))
    vector_TVD = vector_VTD.transpose(0, 1).to(values_TMD.dtype, memory_format=torch.contiguous_format)
    return sum_TMV.add_(torch.bmm(values_TMD, vector_TVD.transpose(1, 2)))


class _Tile:
    """Some videos, folded, and the similarities of any texts with them."""

    def __init__(self, head: RetrievalHead, frames_VFD: Tensor) -> None:
        self.head, self.frames_VFD = head, frames_VFD
        self.unit_VFD = F.normalize(frames_VFD, dim=-1)
        self.videos = FoldedVideos(head.pooling, frames_VFD)

    def pooled_by_own(self, text_TD: Tensor, own_VS: Tensor) -> Tensor:
        """``(V, slots, D)`` each video pooled by its own captions; NaN where it has fewer."""
        rows = []
        for number, captions_S in enumerate(own_VS):
            alone = _Tile(self.head, self.frames_VFD[number : number + 1])
            pooled_SD = alone.videos.pooled(text_TD[captions_S.clamp_min(0)])[0]
            rows.append(pooled_SD.masked_fill((captions_S < 0)[:, None], torch.nan))
        return torch.stack(rows)

    def radius(self, text_TD: Tensor) -> Tensor:
        """``(V, T, D)``, or 1 in place of D, of every pair."""
        assert self.head.mass is not None
        cosine_VTF = frame_cosines(text_TD, self.unit_VFD)
        return self.head.mass.radius_of(cosine_VTF, text_TD.expand(len(self.unit_VFD), *text_TD.shape))

    def mean_text(self, text_TD: Tensor, target_TVD: Tensor | None) -> Tensor:
        """Similarity ``(T, V)`` without samples; ``target_TVD`` replaces the video as pooled by the text."""
        if target_TVD is None:
            cosine_TV = self.videos.cosines(text_TD)
        else:
            cosine_TV = torch.einsum("td,tvd->tv", F.normalize(text_TD, dim=-1), F.normalize(target_TVD, dim=-1))
        if self.head.mass is None or self.head.draws_samples:
            return cosine_TV
        return cosine_TV * self.head.mass.cosine_factor(text_TD[:, None], self.radius(text_TD).transpose(0, 1))

    def noise_of_text(
        self,
        text_TD: Tensor,
        weights_VTL: Tensor,
        cosine_VTF: Tensor,
        samples: _Samples,
        scratch: tuple[Tensor, ...],
    ) -> Tensor:
        """Similarity ``(T, V)`` of each text's best sample, its noise the same for every video.

        With ``t_s = t + R eps`` and pooled ``v``: ``t_s.v = t.v + (R v).eps`` and
        ``|t_s|^2 = |t|^2 + R.(2 t eps) + R^2.eps^2``: for one text, products of matrices over videos and samples.
        ``scratch`` is twice room for the tile's pooled vectors.
        """
        assert self.head.mass is not None
        shape = (len(self.unit_VFD), *text_TD.shape)
        pooled, radius = (space[: math.prod(shape)].view(shape) for space in scratch)
        torch.bmm(weights_VTL, self.videos.basis_VLD, out=pooled)
        self.head.mass.radius_into(cosine_VTF, text_TD.expand(shape), radius)
        length_T1V = torch.linalg.vector_norm(pooled, dim=-1).T[:, None].clamp_min(1e-12)
        dot_T1V = text_TD[:, None] @ pooled.permute(1, 2, 0)
        all_TMV = (len(text_TD), samples.noise_TMD.shape[1], len(pooled))
        upper_TMV = dot_T1V.expand(all_TMV).contiguous()
        _add_products(upper_TMV, samples.noise_TMD, pooled.mul_(radius))
        square_TMV = text_TD.square().sum(-1)[:, None, None].expand(all_TMV).contiguous()
        _add_products(square_TMV, samples.facing_TMD, radius)
        _add_products(square_TMV, samples.square_TMD, radius.square_())
        cosine_TMV = upper_TMV.div_(square_TMV.clamp_min_(1e-24).sqrt_())
        return cosine_TMV.amax(1, keepdim=True).div_(length_T1V).squeeze(1)

    def fresh_noise(self, text_TD: Tensor, noise: Tensor, target_TVD: Tensor | None) -> Tensor:
        """The same with noise ``(T or 1, V or 1, M, D)``; ``target_TVD`` is what the best sample is scored by."""
        direction = F.normalize(self.videos.pooled(text_TD).transpose(0, 1), dim=-1)
        radius = self.radius(text_TD).transpose(0, 1).expand_as(direction)
        text_T1D = text_TD[:, None]

        def along(vector_TVD: Tensor, values: Tensor) -> Tensor:
            return torch.einsum("tvd,tvmd->tvm", vector_TVD, values.expand(*vector_TVD.shape[:2], -1, -1))

        square = (text_T1D**2).sum(-1, keepdim=True) + 2 * along(text_T1D * radius, noise) + along(radius**2, noise**2)
        length = square.clamp_min(1e-24).sqrt()

        def cosine(seen_TVD: Tensor) -> Tensor:
            return ((text_T1D * seen_TVD).sum(-1, keepdim=True) + along(radius * seen_TVD, noise)) / length

        best, trial = cosine(direction).max(dim=-1)
        if target_TVD is None:
            return best
        return cosine(F.normalize(target_TVD, dim=-1)).gather(-1, trial[..., None]).squeeze(-1)

    def by_sample(self, text_TD: Tensor, noise_TMD: Tensor) -> Tensor:
        """Similarity ``(T, V)`` where each sample asks the frames itself."""
        assert self.head.mass is not None
        columns = []
        for number in range(len(self.frames_VFD)):
            alone = _Tile(self.head, self.frames_VFD[number : number + 1])
            radius_TD = alone.radius(text_TD)[0].expand_as(text_TD)
            sampled_TMD = text_TD[:, None] + radius_TD[:, None] * noise_TMD
            pooled_TMD = alone.videos.pooled(sampled_TMD.flatten(0, 1))[0].unflatten(0, sampled_TMD.shape[:2])
            columns.append(F.cosine_similarity(sampled_TMD, pooled_TMD, dim=-1).amax(dim=-1))
        return torch.stack(columns, dim=1)
