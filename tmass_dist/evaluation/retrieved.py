"""The best answers to every query of a split, for ``ranks.csv`` and the report."""

# Shapes: T texts, V videos, K best answers.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tmass_dist.evaluation.ranking import Bank, Blocks, PostProcessing, processed_blocks

NUM_ANSWERS = 5


@dataclass(frozen=True)
class Retrieved:
    """The ``NUM_ANSWERS`` answers with the highest scores (fewer where there are fewer), best first, by query.

    Scores are those by which the answers are ranked, after post-processing.
    """

    video_TK: Tensor
    """Numbers of the videos retrieved by each text."""
    video_score_TK: Tensor
    own_score_T: Tensor
    """Score of each text's own video."""
    text_VK: Tensor
    """Numbers of the texts retrieved by each video."""
    text_score_VK: Tensor
    own_score_V: Tensor
    """Score of each video's best own text."""

    def margins(self, owner_T: Tensor) -> tuple[Tensor, Tensor]:
        """``(T,)`` and ``(V,)``: score of each query's correct answer minus that of the best wrong one.

        Infinite where all answers that are kept are correct.
        """
        is_own_TK = self.video_TK == owner_T[:, None]
        is_own_VK = owner_T[self.text_VK] == torch.arange(len(self.text_VK))[:, None]
        return (
            self.own_score_T - self.video_score_TK.masked_fill(is_own_TK, -torch.inf).amax(dim=1),
            self.own_score_V - self.text_score_VK.masked_fill(is_own_VK, -torch.inf).amax(dim=1),
        )


def best_answers(
    blocks: Blocks, owner_T: Tensor, num_videos: int, post: PostProcessing = "none", bank: Bank | None = None
) -> Retrieved:
    """Read the scores once and keep the best answers; arguments as for :func:`tmass_dist.evaluation.ranking.rank`."""
    videos, video_scores, own_scores = [], [], []
    text_KV = torch.empty(0, num_videos, dtype=torch.long)
    text_score_KV = torch.empty(0, num_videos)
    own_score_V = torch.full((num_videos,), -torch.inf)
    for start, t2v_TV, v2t_TV in processed_blocks(blocks, num_videos, post, bank):
        best = t2v_TV.float().topk(min(NUM_ANSWERS, num_videos), dim=1)
        videos.append(best.indices)
        video_scores.append(best.values)
        owner = owner_T[start : start + len(t2v_TV)]
        own_scores.append(t2v_TV.gather(1, owner[:, None])[:, 0].float())
        own_score_V.scatter_reduce_(0, owner, v2t_TV.gather(1, owner[:, None])[:, 0].float(), "amax")
        numbers = torch.arange(start, start + len(v2t_TV))[:, None].expand(-1, num_videos)
        candidates_KV = torch.cat([text_score_KV, v2t_TV.float()])
        best = candidates_KV.topk(min(NUM_ANSWERS, len(candidates_KV)), dim=0)
        text_KV, text_score_KV = torch.cat([text_KV, numbers]).gather(0, best.indices), best.values
    return Retrieved(
        torch.cat(videos), torch.cat(video_scores), torch.cat(own_scores), text_KV.T, text_score_KV.T, own_score_V
    )
