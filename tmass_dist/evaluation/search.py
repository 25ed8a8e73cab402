"""Two-stage search for galleries beyond the exact range: candidates by an index, then T-MASS itself on the best K.

The first stage asks usearch for the videos whose mean-pooled frames lie nearest to the text; the second scores those as
the exact evaluation would. What the first stage loses is measured against the exact ranks and printed.
"""

# Shapes: T texts, V videos, K candidates.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.errors import UserError

if TYPE_CHECKING:
    from tmass_dist.evaluation.blocks import Scorer


def candidates(text_TD: Tensor, frames_VFD: Tensor, num_candidates: int) -> Tensor:
    """Numbers ``(T, K)`` of the videos nearest by the mean of their normalised frames, nearest first.

    Raises:
        UserError: more candidates than videos, or usearch is not installed.
    """
    if not 1 <= num_candidates <= len(frames_VFD):
        raise UserError(f"--search is {num_candidates}; the gallery has {len(frames_VFD)} videos")
    try:
        from usearch.index import Index
    except ModuleNotFoundError as error:
        raise UserError("the search needs usearch: pip install -e '.[search]'") from error
    import numpy as np

    mean_VD = F.normalize(F.normalize(frames_VFD, dim=-1).mean(dim=1), dim=-1)
    index = Index(ndim=mean_VD.shape[1], metric="ip", dtype="f32")
    index.add(np.arange(len(mean_VD)), mean_VD.numpy())
    # A graph built by several threads can leave a video that no walk reaches; where every distance is cheap, take all.
    exact = len(mean_VD) <= 10_000 or num_candidates == len(mean_VD)
    found = index.search(F.normalize(text_TD, dim=-1).numpy(), num_candidates, exact=exact)
    return torch.from_numpy(found.keys.reshape(len(text_TD), -1).astype("int64"))


def search_ranks(scorer: Scorer, num_candidates: int) -> Tensor:
    """Text-to-video ranks ``(T,)`` of the two stages; V, the last one, where the right video is no candidate."""
    features = scorer.features
    found_TK = candidates(features.text_TD, features.frames_VFD, num_candidates)
    ranks = torch.full((len(found_TK),), len(features.video_ids))
    for start in scorer.starts:
        # The videos that any text of the block asks for, prepared once.
        rows = slice(start, start + scorer.block)
        wanted, place_TK = found_TK[rows].unique(return_inverse=True)
        gallery = scorer.gallery(features.frames_VFD[wanted])
        similarity_TK = scorer.score(start, gallery).gather(1, place_TK)
        hit_TK = found_TK[rows] == features.owner_T[rows, None]
        own_T1 = similarity_TK.masked_fill(~hit_TK, -torch.inf).amax(dim=1, keepdim=True)
        position_T = (similarity_TK >= own_T1).sum(dim=1)
        ranks[rows] = torch.where(hit_TK.any(dim=1), position_T, ranks[rows])
    return ranks
