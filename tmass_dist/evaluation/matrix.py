"""Rank a similarity matrix that some other program computed."""

# Shapes: T texts, V videos.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmass_dist.errors import UserError
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.arrays import map_array
from tmass_dist.evaluation.report import Report, summary


def rank_matrix(path: Path, truth: Path | None, post: Any, out: Path | None) -> Report:
    """Rank the similarity matrix of any program, print both tables, write the report and return it.

    Args:
        path: ``.npy``, floats ``(T, V)``.
        truth: JSON list with the column of each row's video; None: the diagonal.
        post: post-processing; without features there is no qbnorm.
        out: directory of the report; None writes none.

    Raises:
        UserError: no matrix of numbers, or a truth that does not fit it.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    if post == "qbnorm":
        raise UserError("qbnorm needs features of training queries; a matrix of the test alone does not hold them")
    matrix = map_array(path)
    kind = matrix.dtype.newbyteorder("=")  # torch reads arrays in this machine's byte order only
    if matrix.ndim != 2 or kind not in (np.float16, np.float32, np.float64) or 0 in matrix.shape:
        raise UserError(f"{path} holds {matrix.dtype} of shape {matrix.shape}; wanted: floats, texts x videos")
    num_texts, num_videos = matrix.shape
    if truth is None:
        if num_texts != num_videos:
            raise UserError(f"{path} is {num_texts} x {num_videos}: its rows have no diagonal; give --truth IDS.json")
        owners = list(range(num_texts))
    else:
        try:
            owners = json.loads(truth.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{truth} cannot be read: {error}") from error
        fits = isinstance(owners, list) and len(owners) == num_texts
        if not fits or not all(isinstance(o, int) and 0 <= o < num_videos for o in owners):
            raise UserError(f"{truth} must be a list of {num_texts} column numbers from 0 to {num_videos - 1}")
    order = np.argsort(owners, kind="stable")
    owner_T = torch.tensor(owners)[torch.from_numpy(order)]

    def blocks() -> Any:
        for start in range(0, num_texts, 256):
            yield torch.from_numpy(np.array(matrix[order[start : start + 256]], dtype=kind))

    try:
        ranks = ranking.rank(blocks, owner_T, num_videos, post)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    result: dict[str, Any] = {
        "protocol": "of the given similarities",
        "num_trials": None,
        "num_texts": num_texts,
        "num_videos": num_videos,
        "selected_on": "unknown",
        "checkpoint": str(path),
        "post_processing": post,
        **summary(ranks),
    }
    ids = [(str(owner), int(row)) for owner, row in zip(owner_T.tolist(), order)]
    report = Report(result, ranks, [""] * num_texts, ids)
    if out is not None:
        report.write(out)
    report.show()
    return report
