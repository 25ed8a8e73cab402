"""Search of a stored split, as a gallery is searched: K candidates by an index, a shortlist, and exact scores of it."""

# Shapes: T texts, V videos, K candidates.

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tmass_dist.cli import write_json
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.evaluation import check_request, evaluate_store
from tmass_dist.evaluation.report import label, labels, table
from tmass_dist.evaluation.search import candidates
from tmass_dist.evaluation.shortlist import TILE_VIDEOS, Shortlist, search_label, shortlist_size

if TYPE_CHECKING:
    from tmass_dist.evaluation.blocks import BlockScorer
    from tmass_dist.evaluation.stored import StoredSplit

NUM_RESULTS = 10
"""Results of the search that is evaluated; they set the length of the shortlist."""


def search_ranks(scorer: BlockScorer, num_candidates: int) -> Tensor:
    """Text-to-video ranks ``(T,)`` of a search; V, the last one, where the correct video is not on the shortlist."""
    features = scorer.features
    candidate_TK = candidates(features.sentences, features.frames_VFD, num_candidates)
    if num_exact(scorer, num_candidates) < num_candidates:
        candidate_TK = _shortlisted(scorer, candidate_TK)
    ranks = torch.full((len(candidate_TK),), len(features.video_ids))
    for texts in scorer.blocks:
        # The candidates of any text of the block, prepared a tile at a time.
        videos, column_TK = candidate_TK[texts].unique(return_inverse=True)
        tiles = [
            scorer.score(texts, scorer.gallery(features.frames_VFD[tile])) for tile in videos.split(scorer.tile_videos)
        ]
        similarity_TK = torch.cat(tiles, dim=1).gather(1, column_TK)
        ranking.check_numbers(similarity_TK, texts.start)
        is_own_TK = candidate_TK[texts] == features.owner_T[texts, None]
        own_T1 = similarity_TK.masked_fill(~is_own_TK, -torch.inf).amax(dim=1, keepdim=True)
        position_T = (similarity_TK >= own_T1).sum(dim=1)
        ranks[texts] = torch.where(is_own_TK.any(dim=1), position_T, ranks[texts])
    return ranks


def num_exact(scorer: BlockScorer, num_candidates: int) -> int:
    """How many candidates get the exact score: all where there is no shortlist, or where every video is a candidate."""
    has_shortlist = Shortlist.applies(scorer.head, scorer.config.model.pooled_by)
    if not has_shortlist or num_candidates >= len(scorer.features.video_ids):
        return num_candidates
    return min(num_candidates, shortlist_size(NUM_RESULTS))


def _shortlisted(scorer: BlockScorer, candidate_TK: Tensor) -> Tensor:
    shortlist, frames_VFD, kept = Shortlist(scorer.head), scorer.features.frames_VFD, []
    device = next(scorer.head.parameters()).device
    for text_D, rows_K in zip(scorer.features.text_TD, candidate_TK):
        tiles = (frames_VFD[tile] for tile in rows_K.split(TILE_VIDEOS))
        scores_K = shortlist.scores(text_D.to(device), tiles)
        kept.append(rows_K[scores_K.topk(num_exact(scorer, len(rows_K))).indices])
    return torch.stack(kept)


def search_store(stored: StoredSplit, out: Path, num_candidates: int, *, compare_exact: bool) -> None:
    """Search a stored split, print text-to-video metrics and write ``out/search.json``.

    Args:
        stored: the split.
        out: directory of the results.
        num_candidates: K.
        compare_exact: also compute and report the exact scores, and what the search loses against them.

    Raises:
        UserError: settings that the search does not have, or more candidates than videos.
    """
    check_request(stored.config, stored.num_videos, bank=None, num_candidates=num_candidates)
    result = labels(stored.config, stored.features, stored.index, stored.scorer.head.tau)
    few = num_exact(stored.scorer, num_candidates)
    result |= {"num_candidates": num_candidates, "num_exact": few}
    result["search"] = search_label(stored.num_videos, num_candidates, few)
    exact = ranking.metrics(evaluate_store(stored, out).t2v_T) if compare_exact else None
    with torch.inference_mode(), stored.naming():
        found = ranking.metrics(search_ranks(stored.scorer, num_candidates))
    result["t2v"] = found
    rows = {f"search with {num_candidates} candidates": found}
    if exact is not None:
        result["lost"] = {name: exact[name] - value for name, value in found.items()}
        rows = {"exact": exact, **rows, "lost": result["lost"]}
    print(table(rows, f"\ntext to video, search ({label(result)})"))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "search.json", result)
    print(f"search: {out / 'search.json'}")
