"""Radii of every text with every video of a run's test split, for Figures 2 to 10."""

# Shapes: T texts, V videos, D embedding width, H W pixels, C colours.

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tmass_dist.evaluation import radii
from tmass_dist.evaluation.stored import StoredSplit


class Radii:
    """Norms of the radii, ranks of the texts, and pictures of single queries.

    Attributes:
        norm_TV: ``|R|_1`` of each text with each video.
        score_TV: similarities.
        rank_T: rank of the right video; 1 is best, ties count against it.
        norm_rank_T: place of the right video among all videos by ``|R|_1``; 1 where it has the smallest.
    """

    def __init__(self, run: Path) -> None:
        self.stored = StoredSplit(run / "evaluation" / "features", [])
        self.features, mass = self.stored.features, self.stored.scorer.head.mass
        assert mass is not None
        self.mass = mass
        with torch.inference_mode():
            self.score_TV = torch.cat(list(self.stored.scorer.scores()))
            self.norm_TV = torch.stack([self.radius_VD(t).abs().sum(dim=1) for t in range(len(self.score_TV))])
        owner_T = self.features.owner_T
        texts_T = torch.arange(len(owner_T))
        self.rank_T = (self.score_TV >= self.score_TV[texts_T, owner_T][:, None]).sum(dim=1)
        self.norm_rank_T = (self.norm_TV <= self.norm_TV[texts_T, owner_T][:, None]).sum(dim=1)

    def radius_VD(self, text: int) -> Tensor:  # noqa: N802
        """R of one text with every video."""
        return radii.radii_of(self.mass, self.features, text)

    def example_queries(self) -> list[tuple[str, int]]:
        """The queries of Figures 3 to 10, chosen by rule.

        Returns:
            Seven evenly spaced ones among those whose right video is at rank 1, in the order of the split
            (``"correct"``); then the failing one whose right video has the largest ``norm_rank_T`` (``"failing"``).
        """
        correct = (self.rank_T == 1).nonzero().flatten().tolist()
        places = np.linspace(0, len(correct) - 1, min(7, len(correct))).astype(int) if correct else []
        queries = [("correct", int(correct[place])) for place in places]
        failing = (self.rank_T > 1).nonzero().flatten()
        if len(failing):
            queries.append(("failing", int(failing[self.norm_rank_T[failing].argmax()])))
        return queries

    def vectors_picture(self, text: int) -> bytes:
        """Figure 2: R of the right video in red, of the five next best in blue."""
        truth = int(self.features.owner_T[text])
        others = [v for v in self.score_TV[text].argsort(descending=True).tolist() if v != truth][:5]
        return radii.vectors(self.radius_VD(text), truth, others)

    def norms_picture(self, text: int) -> bytes:
        """Figures 3 to 10: ``|R|_1`` of a query with every video, the right one marked, its frames beside."""
        norm_V, truth = self.norm_TV[text], int(self.features.owner_T[text])
        title = f"place {int(self.norm_rank_T[text])} of {len(norm_V)} in |R|_1, rank {int(self.rank_T[text])}"
        return radii.norms(norm_V, truth, title, self._frames_HWC(truth))

    def _frames_HWC(self, video: int) -> np.ndarray | None:  # noqa: N802
        """Twelve frames as one picture of 3 x 4; None where the shards are gone."""
        index = self.stored.shards()
        if index is None:
            return None
        from tmass_dist.data.samples import read_into

        frames = np.empty((12, index.image_size, index.image_size, 3), np.uint8)
        read_into(frames, index, index.ids.index(self.features.video_ids[video]))
        return np.concatenate([np.concatenate(list(row), axis=1) for row in frames.reshape(3, 4, *frames.shape[1:])])
