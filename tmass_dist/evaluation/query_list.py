"""All queries of an evaluation in a compact form, for the list in the report that a reader searches and sorts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tmass_dist.cli import write_text
from tmass_dist.evaluation.media import PER_SHEET, Media
from tmass_dist.evaluation.ranking import Ranks
from tmass_dist.evaluation.retrieved import Retrieved


def write_queries(ranks: Ranks, captions: list[str], video_ids: list[str], retrieved: Retrieved, media: Media) -> str:
    """Write ``queries-HASH.js`` to the folder of ``media`` and return its name.

    It is a script, since a page that was opened from a disk may load scripts and pictures beside it, but not JSON. It
    calls ``showQueries`` with one object of columns: a text or video is its number.
    """
    columns: dict[str, Any] = {
        "texts": captions,
        "videos": video_ids,
        "owner": ranks.owner_T.tolist(),
        "t2v": _direction(ranks.t2v_T, retrieved.own_score_T, retrieved.video_TK, retrieved.video_score_TK),
        "v2t": _direction(ranks.v2t_V, retrieved.own_score_V, retrieved.text_VK, retrieved.text_score_VK),
        "frames": media.num_frames,
        "perSheet": PER_SHEET,
        "sheets": media.sheets,
        "missing": media.missing,
        "urls": media.urls,
        "starts": media.starts_s,
        "notes": media.notes,
    }
    text = f"showQueries({json.dumps(columns, separators=(',', ':'))});\n"
    name = f"queries-{hashlib.sha256(text.encode()).hexdigest()[:8]}.js"
    media.folder.mkdir(parents=True, exist_ok=True)
    write_text(media.folder / name, text)
    return name


def remove_others(folder: Path, name: str) -> None:
    """Remove the files of :func:`write_queries` of earlier reports."""
    for old in folder.glob("queries-*.js"):
        if old.name != name:
            old.unlink(missing_ok=True)


def _direction(rank_Q: Tensor, own_Q: Tensor, answer_QK: Tensor, score_QK: Tensor) -> dict[str, Any]:
    """Rank, own score, and the best answers with their scores, of every query."""
    return {
        "rank": rank_Q.tolist(),
        "own": [_rounded(score) for score in own_Q.tolist()],
        "answers": answer_QK.tolist(),
        "scores": [[_rounded(score) for score in scores] for scores in score_QK.tolist()],
    }


def _rounded(score: float) -> float:
    return float(f"{score:.4g}")  # scores after post-processing may be very small
