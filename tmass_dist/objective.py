"""Model and loss in one forward: gather the texts, pool your own videos, gather the scalars.

Traffic a step is 3 N D + 2 N^2 numbers; frame features, F times larger, never move.
"""

# Shapes: B pairs of this rank, N of the world, F frames, H W pixels, L tokens, D embedding width.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmass_dist.distributed import gather_rows
from tmass_dist.losses import symmetric_info_nce
from tmass_dist.models.backbone import Towers
from tmass_dist.models.head import RetrievalHead


@dataclass(frozen=True)
class Losses:
    """What one step yields; ``total`` is the one to differentiate, the rest is detached."""

    total: Tensor
    stochastic: Tensor
    support: Tensor
    divergence: Tensor
    mean_radius: Tensor


def global_losses(
    head: RetrievalHead,
    text_BD: Tensor,
    frames_BFD: Tensor,
    noise_BD: Tensor | None,
    logit_scale: Tensor,
    support_weight: float,
    *,
    kl_weight: float = 0.0,
    pooled_by: Literal["text", "sample"] = "text",
) -> Losses:
    """The loss of the whole global batch, from this rank's rows; every rank returns the same number.

    Args:
        head: pooling and mass.
        text_BD, frames_BFD: this rank's raw embeddings; row ``i`` of one belongs to row ``i`` of the other.
        noise_BD: ``eps`` of the own texts; None trains on the texts themselves.
        logit_scale: log of the temperature, shape [1]; limited to ln 100 in the forward.
        support_weight: weight of the support-text loss.
        kl_weight: weight of the mass's divergence from N(0, I).
        pooled_by: what asks the frames, the text or its sample.

    Source: Wang et al., CVPR 2024, arXiv:2403.17998.
    """
    sampled_BD = radius_BD = None
    if head.mass is not None and noise_BD is not None:
        radius_BD = head.mass.radius(text_BD, frames_BFD)
        sampled_BD = head.mass.sample(text_BD, radius_BD, noise_BD)
    asking_BD = sampled_BD if pooled_by == "sample" and sampled_BD is not None else text_BD
    pooled_BND = head.pooling(gather_rows(asking_BD), frames_BFD)
    direction_BND = F.normalize(pooled_BND, dim=-1)

    def loss_of(anchor_BD: Tensor) -> Tensor:
        anchor_ND = F.normalize(gather_rows(anchor_BD), dim=-1)
        own_columns_BN = torch.einsum("nd,bnd->bn", anchor_ND, direction_BND)
        similarity_NN = gather_rows(own_columns_BN).T
        return symmetric_info_nce(similarity_NN, logit_scale)

    zero = torch.zeros_like(text_BD.detach().sum())
    if head.mass is None or sampled_BD is None or radius_BD is None:
        total = loss_of(text_BD)
        return Losses(total, total.detach(), zero, zero, zero)
    total = stochastic = loss_of(sampled_BD)
    support, divergence = zero, zero
    if support_weight:
        support = loss_of(head.mass.support(text_BD, radius_BD, pooled_BND.mean(dim=1)))
        total = total + support_weight * support
    if kl_weight:
        divergence = gather_rows(head.mass.divergence(text_BD, radius_BD)).mean()
        total = total + kl_weight * divergence
    return Losses(total, stochastic.detach(), support.detach(), divergence.detach(), radius_BD.detach().mean())


class Objective(nn.Module):
    """Towers and head with their loss, in one forward, as ZeRO wants it."""

    def __init__(
        self,
        towers: Towers,
        head: RetrievalHead,
        support_weight: float,
        *,
        kl_weight: float = 0.0,
        pooled_by: Literal["text", "sample"] = "text",
    ) -> None:
        super().__init__()
        self.towers, self.head = towers, head
        self.support_weight, self.kl_weight = support_weight, kl_weight
        self.pooled_by: Literal["text", "sample"] = pooled_by

    def forward(self, pixels_BFHWC: Tensor, tokens_BL: Tensor, noise_BD: Tensor | None) -> Losses:
        text_BD = self.towers.encode_text(tokens_BL)
        frames_BFD = self.towers.encode_frames(pixels_BFHWC)
        # The loss is float32 whatever the towers run in: a softmax over many negatives loses digits in bf16.
        with torch.autocast(text_BD.device.type, enabled=False):
            return global_losses(
                self.head,
                text_BD.float(),
                frames_BFD.float(),
                noise_BD,
                self.towers.logit_scale.float(),
                self.support_weight,
                kl_weight=self.kl_weight,
                pooled_by=self.pooled_by,
            )
