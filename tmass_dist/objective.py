"""Model and loss in one forward: gather the texts, pool your own videos, gather the scalars.

Traffic a step is 3 N D + 2 N^2 numbers; frame features, F times larger, never move.
"""

# Shapes: B pairs of this rank, N of the world, F frames, H W pixels, L tokens, D embedding width.

from __future__ import annotations

from dataclasses import dataclass

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
    mean_radius: Tensor


def global_losses(
    head: RetrievalHead,
    text_BD: Tensor,
    frames_BFD: Tensor,
    noise_BD: Tensor | None,
    logit_scale: Tensor,
    support_weight: float,
) -> Losses:
    """The loss of the whole global batch, from this rank's rows; every rank returns the same number.

    Args:
        head: pooling and mass.
        text_BD, frames_BFD: this rank's raw embeddings; row ``i`` of one belongs to row ``i`` of the other.
        noise_BD: ``eps`` of the own texts, or None for a head without a mass.
        logit_scale: log of the temperature, shape [1]; limited to ln 100 in the forward.
        support_weight: weight of the support-text loss.

    Source: Wang et al., CVPR 2024, arXiv:2403.17998.
    """
    text_ND = gather_rows(text_BD)
    pooled_BND = head.pooling(text_ND, frames_BFD)
    direction_BND = F.normalize(pooled_BND, dim=-1)

    def loss_of(anchor_BD: Tensor) -> Tensor:
        anchor_ND = F.normalize(gather_rows(anchor_BD), dim=-1)
        own_columns_BN = torch.einsum("nd,bnd->bn", anchor_ND, direction_BND)
        similarity_NN = gather_rows(own_columns_BN).T
        return symmetric_info_nce(similarity_NN, logit_scale)

    if head.mass is None or noise_BD is None:
        total = loss_of(text_BD)
        zero = torch.zeros_like(total.detach())
        return Losses(total, total.detach(), zero, zero)
    radius_BD = head.mass.radius(text_BD, frames_BFD)
    stochastic = loss_of(head.mass.sample(text_BD, radius_BD, noise_BD))
    if support_weight == 0:
        return Losses(stochastic, stochastic.detach(), torch.zeros_like(stochastic.detach()), radius_BD.detach().mean())
    support = loss_of(head.mass.support(text_BD, radius_BD, pooled_BND.mean(dim=1)))
    total = stochastic + support_weight * support
    return Losses(total, stochastic.detach(), support.detach(), radius_BD.detach().mean())


class Objective(nn.Module):
    """Towers and head with their loss, in one forward, as ZeRO wants it."""

    def __init__(self, towers: Towers, head: RetrievalHead, support_weight: float) -> None:
        super().__init__()
        self.towers, self.head, self.support_weight = towers, head, support_weight

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
            )
