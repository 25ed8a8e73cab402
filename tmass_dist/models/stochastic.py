"""The text mass: a text is a region around its embedding, with a radius that depends on the video's frames."""

# Shapes: B matching pairs, T texts, V videos, P any leading shape of pairs, F frames, D embedding width.

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmass_dist.errors import UserError

RadiusKind = Literal["exp_linear", "exp_mean", "linear", "scaled_exp_mean", "variational"]
MassScore = Literal["samples", "expected", "temperature"]


def frame_cosines(text_TD: Tensor, unit_VFD: Tensor) -> Tensor:
    """Cosine ``(V, T, F)`` of every text with every frame of every video.

    Its twin for matching pairs is :func:`matching_frame_cosines`; ``tests/test_scoring.py`` holds the two equal.

    Args:
        text_TD: text embeddings of any norm.
        unit_VFD: frame embeddings of norm 1; the caller normalises them once for many texts.
    """
    cosine_TN = F.normalize(text_TD, dim=-1) @ unit_VFD.flatten(0, 1).T
    return cosine_TN.unflatten(-1, unit_VFD.shape[:2]).transpose(0, 1).contiguous()


def matching_frame_cosines(text_BD: Tensor, frames_BFD: Tensor) -> Tensor:
    """Cosine ``(B, F)`` of text ``i`` with the frames of video ``i``; the diagonal of :func:`frame_cosines`.

    Embeddings may have any norm. The norms divide the products, so that no normalised copy of the frames is kept for
    the backward pass.
    """
    norm_BF, norm_B1 = (torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-12) for x in (frames_BFD, text_BD[:, None]))
    return (frames_BFD @ text_BD[:, :, None]).squeeze(-1) / norm_BF / norm_B1


class TextMass(nn.Module):
    """Radius, sample and support of each text's mass.

    Source: Wang et al., "Text Is MASS", CVPR 2024, arXiv:2403.17998. The authors' code names the radius
    ``text_std`` and its logarithm ``log_var``; both are the paper's R.
    """

    def __init__(
        self,
        num_frames: int,
        embed_dim: int,
        radius: RadiusKind = "exp_linear",
        start: Literal["rising", "falling"] = "rising",
        scoring: MassScore = "samples",
    ) -> None:
        super().__init__()
        self.kind, self.num_frames, self.scoring = radius, num_frames, scoring
        if radius in ("exp_linear", "linear"):
            self.linear = nn.Linear(num_frames, embed_dim)
            nn.init.eye_(self.linear.weight)  # as the authors initialise it: one frame's cosine per dimension
            if start == "falling":  # ours: the better the match, the smaller the radius, as the paper describes it
                with torch.no_grad():
                    self.linear.weight.neg_()
            nn.init.zeros_(self.linear.bias)
        elif radius == "scaled_exp_mean":
            self.scale = nn.Parameter(torch.ones(1))
        elif radius == "variational":
            self.linear = nn.Linear(embed_dim, embed_dim)
            nn.init.zeros_(self.linear.weight)  # R = 1 everywhere: the prior itself
            nn.init.zeros_(self.linear.bias)

    def radius_of(self, cosine_PF: Tensor, text_PD: Tensor) -> Tensor:
        """Radius ``(..., D)`` of each pair, or ``(..., 1)`` for the kinds without a linear layer.

        Args:
            cosine_PF: cosines of the pair's text with the frames of its video.
            text_PD: the pair's text embedding; only the ``variational`` kind uses it.

        Raises:
            UserError: another number of frames than this radius was built for.
        """
        if cosine_PF.shape[-1] != self.num_frames:
            raise UserError(
                f"videos have {cosine_PF.shape[-1]} frames and the radius was built for {self.num_frames}; "
                "set model.num_frames, or pack the shards again"
            )
        if self.kind == "variational":  # half of a log variance
            return (0.5 * self.linear(text_PD)).exp()
        if self.kind == "exp_linear":
            return self.linear(cosine_PF).exp()
        if self.kind == "linear":
            return self.linear(cosine_PF)
        mean = cosine_PF.mean(dim=-1, keepdim=True).exp()
        return mean if self.kind == "exp_mean" else self.scale * mean

    def radius_into(self, cosine_PF: Tensor, text_PD: Tensor, out_PD: Tensor) -> None:
        """Write :meth:`radius_of` into ``out_PD``, without gradients.

        The twin of :meth:`radius_of` for scoring, where allocating fresh memory would take longer than the
        computation; ``tests/test_scoring.py`` holds the two equal.
        """
        if self.kind not in ("exp_linear", "linear") or cosine_PF.shape[-1] != self.num_frames:
            out_PD.copy_(self.radius_of(cosine_PF, text_PD))
            return
        # exp(x) = 2^(x / ln 2), and torch's 2^x takes a quarter of the time of its exp on AMD processors.
        scale = 1 / math.log(2) if self.kind == "exp_linear" else 1.0
        weight_FD, bias_D = scale * self.linear.weight.T, scale * self.linear.bias
        torch.addmm(bias_D, cosine_PF.flatten(0, -2), weight_FD, out=out_PD.flatten(0, -2))
        if self.kind == "exp_linear":
            out_PD.exp2_()

    def radius(self, text_BD: Tensor, frames_BFD: Tensor) -> Tensor:
        """Radius ``(B, D)`` of text ``i`` with video ``i``, in units of the text embedding."""
        return self.radius_of(matching_frame_cosines(text_BD, frames_BFD), text_BD).expand_as(text_BD)

    def sample(self, text_BD: Tensor, radius_BD: Tensor, noise_BD: Tensor) -> Tensor:
        """One point of each mass, ``t_s = t + R * eps``; ``noise_BD`` is ``eps``."""
        return text_BD + radius_BD * noise_BD

    def cosine_factor(self, text_PD: Tensor, radius_PD: Tensor) -> Tensor:
        """What the cosine of a text and a pooled vector is multiplied by, ``(...)``, where nothing is sampled.

        ``expected``: the mean dot product of samples of ``t + R eps`` with a direction, divided by the root of their
        mean squared norm, is the cosine times ``1 / sqrt(1 + |R|^2 / |t|^2)``, for noise with mean 0 and variance 1.
        ``temperature``: 1 / mean(R).

        Args:
            text_PD: text embedding of each pair.
            radius_PD: radius of each pair, or 1 in place of D.
        """
        if self.scoring == "temperature":
            return radius_PD.mean(dim=-1).reciprocal()
        square_P = radius_PD.square().mean(dim=-1) * text_PD.shape[-1]
        return (1 + square_P / text_PD.square().sum(dim=-1).clamp_min(1e-24)).rsqrt()

    def divergence(self, text_BD: Tensor, radius_BD: Tensor) -> Tensor:
        """KL(N(t, R^2) || N(0, I)) of each text, ``(B,)``, mean over the dimensions.

        Source: the supplementary, section 4; it does not say whether to sum or to average over the dimensions.
        Kingma and Welling, 2014.
        """
        variance_BD = radius_BD**2
        return 0.5 * (variance_BD + text_BD**2 - 1 - variance_BD.log()).mean(dim=-1)

    def support(self, text_BD: Tensor, radius_BD: Tensor, pooled_mean_BD: Tensor) -> Tensor:
        """The edge of the mass in the direction of its video, ``t + R * p/|p|``.

        ``p = pooled_mean - t``, where ``pooled_mean_BD`` is the video's pooled vector, averaged over all texts.
        """
        return text_BD + radius_BD * F.normalize(pooled_mean_BD - text_BD, dim=-1)
