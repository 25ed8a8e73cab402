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

    unit_VFD: Tensor

    def cosines(self, anchor_ATW: Tensor) -> Tensor:
        """``(V, A, T)``: mean over the tokens of each text of the cosine with the token's closest frame."""
        num_videos, num_frames, width = self.unit_VFD.shape
        unit_ATLD, is_token_ATL = _unit_tokens(anchor_ATW, width)
        cosine_ATLN = unit_ATLD @ self.unit_VFD.flatten(0, 1).T
        closest_ATLV = cosine_ATLN.unflatten(-1, (num_videos, num_frames)).amax(dim=-1)
        # Without a token, the cosines are zero.
        return (closest_ATLV.sum(dim=2) / is_token_ATL.sum(dim=2).clamp_min(1)[..., None]).permute(2, 0, 1)


class LateInteraction(nn.Module):
    """Mean over the tokens of a text of each token's cosine with its closest frame; it has no parameters.

    Text rows have L vectors (:meth:`tmass_dist.models.backbone.Towers.encode_text`); zeros are no token.

    Source: the sum of maxima of Reddy et al., "Video-ColBERT", CVPR 2025, arXiv:2503.19009, on frames; here it is
    divided by the number of tokens, so that captions of any length have scores between -1 and 1.
    """

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
        return TokenPairs(videos.unit_VFD)

    def weights(self, text_TW: Tensor, unit_VFD: Tensor) -> Tensor:
        """Share ``(V, T, F)`` of each text's tokens whose closest frame is this one."""
        unit_TLD, is_token_TL = _unit_tokens(text_TW, unit_VFD.shape[-1])
        closest_VTL = (unit_TLD @ unit_VFD[:, None].transpose(2, 3)).argmax(dim=-1)
        chosen_VTLF = F.one_hot(closest_VTL, unit_VFD.shape[1]) * is_token_TL[..., None]
        return chosen_VTLF.sum(dim=2) / is_token_TL.sum(dim=1).clamp_min(1)[:, None]


def _unit_tokens(text_XW: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The vectors of texts with norm 1, ``(..., L, D)``, and which of them are tokens, ``(..., L)``."""
    tokens_XLD = text_XW.unflatten(-1, (-1, width))
    norm_XL = torch.linalg.vector_norm(tokens_XLD, dim=-1)
    is_token_XL = norm_XL > 0
    return tokens_XLD / torch.where(is_token_XL, norm_XL, 1)[..., None], is_token_XL
