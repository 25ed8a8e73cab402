"""The supplementary's figures from finished runs, as PNG."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tmass_dist.evaluation import radii
from tmass_dist.evaluation.stored import Stored
from tmass_dist.pictures import figure, png


def training_curves(tmass: list[Path], kl: list[Path]) -> bytes:
    """Figure 1: validation R@1 and the KL term over training, the KL variant next to T-MASS, a line a seed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn, (left, right) = figure(2)
    for runs, colour, name in ((tmass, "tab:red", "T-MASS"), (kl, "tab:blue", "KL variant")):
        for number, run in enumerate(runs):
            events = EventAccumulator(str(run / "tensorboard")).Reload()
            points = events.Scalars("val/query_conditioned/t2v_R@1")
            label = name if number == 0 else None
            left.plot([p.step for p in points], [p.value for p in points], color=colour, marker=".", label=label)
            if name == "KL variant":
                points = events.Scalars("loss/kl")
                right.plot([p.step for p in points], [p.value for p in points], color=colour, label=label)
    left.set(xlabel="step", ylabel="R@1 on val")
    right.set(xlabel="step", ylabel="KL term of the loss")
    left.legend()
    return png(drawn)


class Radii:
    """``|R|_1`` and R of every text with every video of a run's test split."""

    def __init__(self, run: Path) -> None:
        self.stored = Stored(run / "evaluation" / "features", [])
        self.features, mass = self.stored.features, self.stored.scorer.head.mass
        assert mass is not None
        self.mass = mass
        with torch.inference_mode():
            score_TV = torch.cat([self.stored.scorer.score(start) for start in self.stored.scorer.starts])
            norm_TV = torch.stack([self.of(text).abs().sum(dim=1) for text in range(len(score_TV))])
        owner_T = self.features.owner_T
        self.norm_TV, self.score_TV = norm_TV, score_TV
        true_T = score_TV[torch.arange(len(owner_T)), owner_T]
        self.rank_T = (score_TV >= true_T[:, None]).sum(dim=1)
        own_T = norm_TV[torch.arange(len(owner_T)), owner_T]
        self.place_T = (norm_TV <= own_T[:, None]).sum(dim=1)
        """1 where the right video has the smallest ``|R|_1`` of all."""

    def of(self, text: int) -> Tensor:
        """R ``(V, D)`` of one text with every video."""
        return radii.radii_of(self.mass, self.features, text)

    def chosen(self) -> list[tuple[str, int]]:
        """The queries of Figures 3 to 10, by rule: seven evenly spaced among those found at rank 1, in the order of
        the split; then the failing one whose right video has the largest place in ``|R|_1``."""
        found = (self.rank_T == 1).nonzero().flatten().tolist()
        spaced = [found[i] for i in np.linspace(0, len(found) - 1, min(7, len(found))).astype(int)] if found else []
        failed = (self.rank_T > 1).nonzero().flatten()
        picked = [("found", int(text)) for text in spaced]
        if len(failed):
            picked.append(("failing", int(failed[self.place_T[failed].argmax()])))
        return picked

    def vectors(self, text: int) -> bytes:
        """Figure 2: R of the right video in red, of the five next best in blue."""
        truth = int(self.features.owner_T[text])
        others = [v for v in self.score_TV[text].argsort(descending=True).tolist() if v != truth][:5]
        return radii.vectors(self.of(text), truth, others)

    def dynamics(self, text: int) -> bytes:
        """Figures 3 to 10: ``|R|_1`` of a query with every video, the right one marked, its frames beside."""
        norm_V, truth = self.norm_TV[text], int(self.features.owner_T[text])
        place = f"place {int(self.place_T[text])} of {len(norm_V)} in |R|_1, rank {int(self.rank_T[text])}"
        return radii.norms(norm_V, truth, place, self._frames(truth))

    def _frames(self, video: int) -> np.ndarray | None:
        index = self.stored.shards()
        if index is None:
            return None
        from tmass_dist.data.loader import read_into

        pictures = np.empty((12, index.image_size, index.image_size, 3), np.uint8)
        read_into(pictures, index, index.ids.index(self.features.video_ids[video]))
        return np.concatenate(
            [np.concatenate(list(row), axis=1) for row in pictures.reshape(3, 4, *pictures.shape[1:])]
        )


def scores_against_trials(points: list[tuple[int, list[float], float]]) -> bytes:
    """Section 2: ``(M, R@1 of each seed, seconds)``."""
    drawn, (left, right) = figure(2)
    trials = [m for m, _, _ in points]
    for values in zip(*(r1 for _, r1, _ in points)):
        left.plot(trials, values, marker="o")
    left.set(xlabel="M (0: the text itself)", ylabel="R@1, a line a seed")
    right.plot(trials, [seconds for _, _, seconds in points], marker="o")
    right.set(xlabel="M", ylabel="seconds of scoring", ylim=(0, None), xlim=(0, None))
    return png(drawn)
