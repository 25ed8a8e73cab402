"""The example queries of a report: the best, typical and worst ones of both directions, with what they retrieved."""

# Shapes: T texts, V videos, Q queries, D embedding width.

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tmass_dist.evaluation import radii
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.ranking import Ranks
from tmass_dist.evaluation.retrieved import Retrieved
from tmass_dist.evaluation.stored import StoredSplit

SHOWN_ANSWERS, SHOWN_CAPTIONS = 3, 3
"""Answers of an example query; captions of an example video."""


@dataclass(frozen=True)
class Scored:
    """A split that was scored and ranked."""

    stored: StoredSplit
    ranks: Ranks
    retrieved: Retrieved
    scores_of: Callable[[int], Tensor]
    """Similarity ``(V,)`` of one text with every video."""


def text_examples(scored: Scored) -> list[dict[str, Any]]:
    """Texts with the videos that they retrieved and their radii."""
    frames = _Frames(scored.stored)
    captions, first_caption = scored.stored.features.captions, dict[int, str]()
    for text, video in enumerate(scored.ranks.owner_T.tolist()):
        first_caption.setdefault(video, captions[text])
    examples = []
    for kind, text in choose(scored.ranks.t2v_T, scored.retrieved.margins(scored.ranks.owner_T)[0]):
        score_V = scored.scores_of(text)
        truth = int(scored.ranks.owner_T[text])
        best = score_V.argsort(descending=True)[:SHOWN_ANSWERS].tolist()
        videos = [
            {
                "id": scored.stored.features.video_ids[video],
                "score": float(score_V[video]),
                "role": role,
                "is_correct": video == truth,
                "caption": first_caption[video],
                "frames": frames.urls_of(video),
            }
            for role, video in [("correct", truth), *((f"retrieved {n}", video) for n, video in enumerate(best, 1))]
        ]
        pictures = [as_url(picture, "png") for picture in _radii(scored.stored, text, truth)]
        rank = int(scored.ranks.t2v_T[text])
        examples.append(
            {
                "kind": kind,
                "caption": captions[text],
                "rank": rank,
                "videos": videos,
                "pictures": pictures,
            }
        )
    return examples


def video_examples(scored: Scored) -> list[dict[str, Any]]:
    """Videos with the texts that they retrieved."""
    frames, owner_T, found = _Frames(scored.stored), scored.ranks.owner_T, scored.retrieved
    captions = scored.stored.features.captions
    examples = []
    for kind, video in choose(scored.ranks.v2t_V, found.margins(owner_T)[1]):
        own = (owner_T == video).nonzero().flatten().tolist()
        best = list(zip(found.text_VK[video].tolist(), found.text_score_VK[video].tolist()))[:SHOWN_ANSWERS]
        texts = [
            {"text": captions[text], "score": score, "is_correct": int(owner_T[text]) == video} for text, score in best
        ]
        examples.append(
            {
                "kind": kind,
                "id": scored.stored.features.video_ids[video],
                "rank": int(scored.ranks.v2t_V[video]),
                "score": float(found.own_score_V[video]),
                "captions": [captions[text] for text in own[:SHOWN_CAPTIONS]],
                "more_captions": max(0, len(own) - SHOWN_CAPTIONS),
                "frames": frames.urls_of(video),
                "texts": texts,
            }
        )
    return examples


def choose(rank_Q: Tensor, margin_Q: Tensor) -> list[tuple[str, int]]:
    """Two best, two typical and two worst queries, each once: by rank, then by the margin to the best wrong answer."""
    keys = list(zip(rank_Q.tolist(), (-margin_Q).tolist()))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    middle = len(order) // 2
    chosen = [("best", query) for query in order[:2]] + [("typical", query) for query in order[middle : middle + 2]]
    chosen += [("worst", query) for query in order[-2:]]
    return list({query: (kind, query) for kind, query in chosen}.values())


def _radii(stored: StoredSplit, text: int, truth: int) -> list[bytes]:
    """The supplementary's pictures: the radius vector of the pair beside five others; |R|_1 with every video."""
    mass = stored.scorer.head.mass
    if mass is None:
        return []
    radius_VD = torch.cat([radii.radii_of(mass, part, text) for part in _video_tiles(stored.features)])
    others = [v for v in range(len(radius_VD)) if v != truth][:5]
    title = "this text with every video; the correct one in red"
    return [radii.vectors(radius_VD, truth, others), radii.norms(radius_VD.abs().sum(dim=1), truth, title)]


def _video_tiles(features: Features, size: int = 4096) -> Iterator[Features]:
    """The same texts with some videos at a time, in float32."""
    texts = replace(features, text_TD=features.text_TD.float())
    for start in range(0, len(features.frames_VFD), size):
        yield replace(texts, frames_VFD=features.frames_VFD[start : start + size].float())


class _Frames:
    """Small pictures of a split's videos, where its shards are still there."""

    def __init__(self, stored: StoredSplit) -> None:
        self.index, self.video_ids = stored.shards(), stored.features.video_ids

    def urls_of(self, video: int) -> list[str]:
        """Up to four frames as JPEG data URLs; none where the video cannot be read."""
        if self.index is None:
            return []
        import numpy as np
        import simplejpeg

        from tmass_dist.data.samples import DamagedError, read_into

        side = self.index.image_size
        frames_FHWC = np.empty((min(4, self.index.num_frames or 4), side, side, 3), np.uint8)
        try:
            read_into(frames_FHWC, self.index, self.index.ids.index(self.video_ids[video]))
        except (DamagedError, ValueError, OSError):
            return []
        return [as_url(simplejpeg.encode_jpeg(frame, quality=85), "jpeg") for frame in frames_FHWC]


def as_url(content: bytes, kind: str) -> str:
    """A picture as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
