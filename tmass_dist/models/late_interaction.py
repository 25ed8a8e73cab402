"""Late interaction: each token of a text looks for its own frame, and the score is the mean over the tokens."""

# Shapes: T texts, V videos, F frames, A anchors, L vectors of a text, D embedding width, W = L D.

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmass_dist.models.frame_pooling import PreparedFrames
from tmass_dist.models.pair_products import DropoutKeys


class TokenPairs(NamedTuple):
    """Some videos, to be compared with the tokens of any texts; it takes the place of ``PooledPairs``."""

    interaction: LateInteraction
    unit_VFD: Tensor

    def cosines(self, anchor_ATW: Tensor) -> Tensor:
        """``(V, A, T)``: mean over the tokens of each text of the cosine with the token's closest frame."""
        num_videos, num_frames, width = self.unit_VFD.shape
        unit_ATLD, weight_ATL = self.interaction.tokens(anchor_ATW, width)
        cosine_ATLN = unit_ATLD @ self.unit_VFD.flatten(0, 1).T
        closest_ATLV = cosine_ATLN.unflatten(-1, (num_videos, num_frames)).amax(dim=-1)
        return (closest_ATLV * weight_ATL[..., None]).sum(dim=2).permute(2, 0, 1)


class LateInteraction(nn.Module):
    """Mean over the tokens of a text of each token's cosine with its closest frame.

    Text rows have L vectors (:meth:`tmass_dist.models.backbone.Towers.encode_text`); zeros are no token.

    Source: the sum of maxima of Reddy et al., "Video-ColBERT", CVPR 2025, arXiv:2503.19009, on frames; here it is
    divided by the number of tokens, so that captions of any length have scores between -1 and 1. The weights are those
    of the tokens in Wang et al., "Disentangled Representation Learning for Text-Video Retrieval", arXiv:2203.07111.

    Args:
        embed_dim: D.
        weighted: a weighted mean; the weights are a softmax over the tokens of a linear function of each.
    """

    def __init__(self, embed_dim: int, *, weighted: bool = False) -> None:
        super().__init__()
        self.token_weight = nn.Linear(embed_dim, 1, bias=False) if weighted else None
        if self.token_weight is not None:
            nn.init.zeros_(self.token_weight.weight)

    def tokens(self, text_XW: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The vectors of texts with norm 1, ``(..., L, D)``, and their weights in the mean, ``(..., L)``."""
        tokens_XLD = text_XW.unflatten(-1, (-1, width))
        norm_XL = torch.linalg.vector_norm(tokens_XLD, dim=-1)
        is_token_XL = norm_XL > 0
        unit_XLD = tokens_XLD / torch.where(is_token_XL, norm_XL, 1)[..., None]
        if self.token_weight is None:
            return unit_XLD, is_token_XL / is_token_XL.sum(dim=-1, keepdim=True).clamp_min(1)
        logit_XL = self.token_weight(unit_XLD).squeeze(-1)
        return unit_XLD, logit_XL.masked_fill(~is_token_XL, -1e4).softmax(dim=-1)

    def prepare(self, frames_VFD: Tensor, num_texts: int | None = None) -> PreparedFrames:
        """The normalised frames; ``num_texts`` makes no difference."""
        return PreparedFrames(F.normalize(frames_VFD, dim=-1))

    def pool(
        self,
        text_TW: Tensor,
        videos: PreparedFrames,
        dropout_keys: DropoutKeys | None = None,
        first_text: int = 0,
    ) -> TokenPairs:
        """The videos as they are: only the cosines depend on the text. There is no dropout."""
        return TokenPairs(self, videos.unit_VFD)

    def weights(self, text_TW: Tensor, unit_VFD: Tensor) -> Tensor:
        """Share ``(V, T, F)`` of each text's tokens whose closest frame is this one, by their weights in the mean."""
        unit_TLD, weight_TL = self.tokens(text_TW, unit_VFD.shape[-1])
        closest_VTL = (unit_TLD @ unit_VFD[:, None].transpose(2, 3)).argmax(dim=-1)
        return (F.one_hot(closest_VTL, unit_VFD.shape[1]) * weight_TL[..., None]).sum(dim=2)
