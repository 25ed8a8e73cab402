"""Search in a gallery: candidates by frames, the model's exact score, and the moment that matches best."""

# Shapes: T texts, V videos, F frames, K candidates, S of the shortlist, D embedding width.

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.cli import is_utf8
from tmass_dist.errors import UserError
from tmass_dist.evaluation.shortlist import TILE_VIDEOS, Shortlist, search_label, shortlist_size
from tmass_dist.retrieval.gallery import VideoGallery
from tmass_dist.retrieval.model import TMass
from tmass_dist.retrieval.text_scorer import TextScorer

CANDIDATES = 2000
"""Videos with the best frames, unless a call says otherwise; ``benchmarks/search.py`` measures what fewer lose."""
MAX_QUERY = 1000
"""Characters of a query. CLIP reads 77 tokens; a text far beyond that is a mistake."""


@dataclass(frozen=True)
class Result:
    """One video found."""

    row: int
    id: str
    score: float
    path: str
    """Of its file; "" where only frames were packed."""
    absent: bool
    """Whether the file no longer exists."""
    seconds: float
    time_s: float
    """Time of the frame with the largest attention."""
    frame: int
    """Number of that frame."""
    times_s: list[float]
    """Time of each frame."""
    attention: list[float]
    """Attention of each frame: how the pooling weighs it, not a trained localiser."""

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints of it."""
        return {"id": self.id, "score": round(self.score, 6), "time_s": round(self.time_s, 3), "path": self.path}


class Searcher:
    """A model and a gallery that it encoded.

    Args:
        model: the model.
        gallery: the gallery.
        candidates: videos with the best frames that are considered, unless a call says otherwise. In a large gallery
            they are at most so many: those with the nearest 1.5 times as many frames.

    Raises:
        UserError: another model made the gallery, or ``candidates`` is below 1.
    """

    def __init__(self, model: TMass, gallery: VideoGallery, candidates: int = CANDIDATES) -> None:
        if candidates < 1:
            raise UserError(f"--candidates is {candidates}; at least 1")
        if model.fingerprint() != gallery.fingerprint:
            raise UserError(
                f"{gallery.directory} was made by another model (fingerprint {gallery.fingerprint}, this model has "
                f"{model.fingerprint()}); give the model that made it, or make the gallery again"
            )
        self.model, self.gallery, self.num_candidates = model, gallery, candidates
        _ = gallery.index  # a damaged one is named now, and not by the first search that needs it
        self._scorer = TextScorer(model)
        self._has_shortlist = Shortlist.applies(model.head, model.config.model.pooled_by)
        # Queries are texts: the image tower, the larger half of the model, is not needed again.
        model.towers.clip.visual = torch.nn.Identity()

    def search(
        self, texts: Sequence[str], k: int = 10, candidates: int | None = None, name: str | None = None
    ) -> list[list[Result]]:
        """The best ``k`` videos for each text, best first.

        Where every video is a candidate, each gets the exact score. Otherwise those on the shortlist of the candidates
        get it (:mod:`tmass_dist.evaluation.shortlist`).

        Args:
            texts: the queries.
            k: number of results.
            candidates: videos with the best frames; never fewer than ``k``.
            name: only videos whose id contains this, in any case.

        Raises:
            UserError: a query that :func:`check_query` refuses, or ``k`` below 1.
        """
        texts = [check_query(text) for text in texts]
        return self.search_encoded(texts, self.model.encode_text(texts), k, candidates, name)

    def search_encoded(
        self,
        texts: Sequence[str],
        text_TD: Tensor,
        k: int = 10,
        candidates: int | None = None,
        name: str | None = None,
    ) -> list[list[Result]]:
        """As :meth:`search`, of texts that are checked and encoded already.

        Raises:
            UserError: ``k`` is below 1.
        """
        if k < 1:
            raise UserError(f"the number of results is {k}; at least 1")
        number = max(k, candidates or self.num_candidates)
        among = self._named(name)
        if len(among) <= number:
            return [self.best(text, text_D, list(among), k) for text, text_D in zip(texts, text_TD)]
        rows_T = self.candidates(text_TD, number, None if name is None else sorted(among), shortlist_size(k))
        return [
            self.best(text, text_D, rows, k, shortlist_size(k)) for text, text_D, rows in zip(texts, text_TD, rows_T)
        ]

    def candidates(
        self, text_TD: Tensor, number: int, among: list[int] | None = None, fewest: int | None = None
    ) -> list[list[int]]:
        """Rows of the videos with the best single frame for each text, best first; ``among`` some, or all.

        ``fewest`` is as in :meth:`FrameIndex.candidates`.
        """
        sentence_TD = text_TD[:, : self.model.embed_dim]  # of late interaction, the embedding of the whole text
        if among is None:
            found = self.gallery.index.candidates(sentence_TD.cpu().numpy(), number, fewest)
            return [rows.tolist() for rows in found]
        best_VT = torch.cat([best_frames(sentence_TD.cpu(), tile.float()) for tile in self._tiles(among)])
        return [[among[place] for place in best_V.topk(number).indices.tolist()] for best_V in best_VT.T]

    def _named(self, name: str | None) -> Collection[int]:
        """Rows of the videos whose id contains ``name``, in any case; of all videos without it."""
        if name is None:
            return self.gallery.rows.values()
        wanted = name.casefold()
        return [row for video_id, row in self.gallery.rows.items() if wanted in video_id.casefold()]

    def _tiles(self, rows: list[int]) -> Iterator[Tensor]:
        """The frames of videos, some videos at a time."""
        for start in range(0, len(rows), TILE_VIDEOS):
            yield self.gallery.half_frames(rows[start : start + TILE_VIDEOS])

    def best(self, text: str, text_D: Tensor, rows: list[int], k: int, shortlist: int | None = None) -> list[Result]:
        """The ``k`` of these videos with the highest exact scores, best first.

        Args:
            text: the query.
            text_D: its embedding.
            rows: the videos.
            k: number of results.
            shortlist: how many get the exact score, where the head has an approximate one; None: all.
        """
        rows = sorted(rows)  # as they lie in the files
        if not rows:
            return []
        if shortlist is not None and len(rows) > shortlist and self._has_shortlist:
            place_S, score_S, attention_SF = self._scorer.score_shortlist(text, text_D, self._tiles(rows), shortlist)
            rows = [rows[place] for place in place_S.tolist()]
        else:
            score_S, attention_SF = self._scorer.score(text, text_D, self.gallery.half_frames(rows))
        self._check_scores(rows, score_S)
        order = score_S.topk(min(k, len(rows))).indices.tolist()
        return [self._result(rows[place], float(score_S[place]), attention_SF[place].numpy()) for place in order]

    def labels(self, k: int = 10, name: str | None = None) -> dict[str, Any]:
        """What the scores of :meth:`search` state; a gallery holds its frames in half precision."""
        total, number = len(self._named(name)), max(k, self.num_candidates)
        by_graph = name is None and not self.gallery.index.is_exhaustive
        search = search_label(total, number, shortlist_size(k) if self._has_shortlist else number, at_most=by_graph)
        return self.model.labels() | {"search": search, "feature_precision": "float16"}

    def similar(self, row: int, k: int = 10) -> list[Result]:
        """Videos like one of the gallery, best first, without itself.

        The score is the mean, over its frames, of the cosine with the best frame of the other video. It uses no text,
        so it is not comparable with scores of queries.

        Raises:
            UserError: no such video, or frames that are not numbers.
        """
        own_FD = F.normalize(self.gallery.frames([row])[0], dim=-1)
        self._check_scores([row], own_FD.sum()[None])
        found = self.gallery.index.candidates(own_FD.numpy(), max(2 * k, 20))
        rows = sorted({int(other) for line in found for other in line} - {row} - self.gallery.removed)
        if not rows:
            return []
        cosine_KFF = F.normalize(self.gallery.frames(rows), dim=-1) @ own_FD.T
        score_K = cosine_KFF.amax(dim=1).mean(dim=-1)
        best_KF = cosine_KFF.amax(dim=2)
        self._check_scores(rows, score_K)
        return [
            self._result(rows[place], float(score_K[place]), best_KF[place].softmax(dim=0).numpy())
            for place in score_K.topk(min(k, len(rows))).indices.tolist()
        ]

    def _check_scores(self, rows: list[int], score_V: Tensor) -> None:
        """Refuse scores that are no numbers: the largest of some numbers and NaN is NaN.

        Raises:
            UserError: one is none; the message names its video.
        """
        if not torch.isfinite(score_V).all():
            video = self.gallery.video(rows[int(torch.isfinite(score_V).logical_not().nonzero()[0])])
            raise UserError(
                f"the score of {video.id!r} is not a number; check the files of {self.gallery.directory} with "
                "tmass index --check"
            )

    def _result(self, row: int, score: float, weights_F: np.ndarray) -> Result:
        video, times_F = self.gallery.video(row), self.gallery.times(row)
        frame = int(weights_F.argmax())
        return Result(
            row,
            video.id,
            score,
            video.path,
            bool(video.path) and not Path(video.path).is_file(),
            video.seconds,
            float(times_F[frame]),
            frame,
            [round(float(time), 3) for time in times_F],
            [round(float(weight), 4) for weight in weights_F],
        )


def best_frames(text_TD: Tensor, frames_VFD: Tensor) -> Tensor:
    """Cosine ``(V, T)`` of each text with the best single frame of each video."""
    norm_VF1 = torch.linalg.vector_norm(frames_VFD, dim=-1, keepdim=True).clamp_min(1e-12)
    return (F.linear(frames_VFD, F.normalize(text_TD, dim=-1)) / norm_VF1).amax(dim=1)


def check_query(text: str) -> str:
    """The query without surrounding white space.

    Raises:
        UserError: it is empty, too long, or not UTF-8.
    """
    text = text.strip()
    if not text:
        raise UserError("the query is empty")
    if not is_utf8(text):
        raise UserError(f"the query {text!r} is not UTF-8")
    if len(text) > MAX_QUERY:
        raise UserError(f"the query has {len(text)} characters; at most {MAX_QUERY}")
    return text


def open_searcher(gallery: str | Path, model: str | None = None, candidates: int = CANDIDATES) -> Searcher:
    """Load a gallery and the model that made it.

    Args:
        gallery: a gallery; or a run directory: its test split becomes the gallery ``RUN/gallery``.
        model: where to load the model from; by default where it was when the gallery was made.
        candidates: videos with the best frames that are considered.

    Raises:
        UserError: there is no gallery or no model, or they do not belong together.
    """
    directory = Path(gallery)
    if (directory / "config.yaml").is_file():
        directory = _gallery_of_run(directory)
    opened = VideoGallery(directory)
    return Searcher(TMass.from_pretrained(model or opened.model), opened, candidates)


def _gallery_of_run(run: Path) -> Path:
    from tmass_dist.retrieval.build import update
    from tmass_dist.retrieval.videos import samples_of

    model = TMass.of_run(run)
    update(model, str(run.resolve()), run / "gallery", samples_of(model.config.data.test, model.config.data.cache))
    return run / "gallery"
