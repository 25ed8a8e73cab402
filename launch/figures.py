"""The supplementary's figures from finished runs, as PNG."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.evaluation.rescore import Stored


def training_curves(tmass: list[Path], kl: list[Path]) -> bytes:
    """Figure 1: validation R@1 and the KL term over training, the KL variant next to T-MASS, a line a seed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure, (left, right) = _figure(2)
    for runs, colour, name in ((tmass, "tab:red", "T-MASS"), (kl, "tab:blue", "KL variant")):
        for number, run in enumerate(runs):
            events = EventAccumulator(str(run / "tensorboard")).Reload()
            points = events.Scalars("val/query_conditioned/t2v_R@1")
            label = name if number == 0 else None
            left.plot([p.step for p in points], [p.value for p in points], color=colour, marker=".", label=label)
            if name == "KL variant":
                points = events.Scalars("loss/kl")
                right.plot([p.step for p in points], [p.value for p in points], color=colour, label=label)
    left.set(xlabel="step", ylabel="R@1 on val, query_conditioned")
    right.set(xlabel="step", ylabel="KL(N(t, R²) ‖ N(0, I)), mean over D", yscale="log")
    left.legend()
    return _png(figure)


class Radii:
    """``|R|_1`` and R of every text with every video of a run's test split."""

    def __init__(self, run: Path) -> None:
        self.stored = Stored(run / "evaluation" / "features", [])
        self.features, mass = self.stored.features, self.stored.scorer.head.mass
        assert mass is not None
        self.mass = mass
        with torch.inference_mode():
            self.unit_VFD = F.normalize(self.features.frames_VFD, dim=-1)
            score_TV = torch.cat([self.stored.scorer.score(start) for start in self.stored.scorer.starts])
            norm_TV = torch.stack([self.of(text).abs().sum(dim=1) for text in range(len(score_TV))])
        owner_T = self.features.owner_T
        self.norm_TV, self.score_TV = norm_TV, score_TV
        true_T = score_TV[torch.arange(len(owner_T)), owner_T]
        self.rank_T = (score_TV >= true_T[:, None]).sum(dim=1)
        own_T = norm_TV[torch.arange(len(owner_T)), owner_T]
        self.place_T = (norm_TV <= own_T[:, None]).sum(dim=1)
        """1 where the right video has the smallest ``|R|_1`` of all."""

    @torch.no_grad()
    def of(self, text: int) -> Tensor:
        """R ``(V, D)`` of one text with every video."""
        text_D = self.features.text_TD[text]
        cosine_VF = self.unit_VFD @ F.normalize(text_D, dim=-1)
        text_VD = text_D.expand(len(cosine_VF), -1)
        return self.mass.radius_of(cosine_VF, text_VD).expand_as(text_VD)

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
        radius_VD, truth = self.of(text), int(self.features.owner_T[text])
        others = [v for v in self.score_TV[text].argsort(descending=True).tolist() if v != truth][:5]
        figure, (axes,) = _figure(1, width=9)
        for other in others:
            axes.plot(radius_VD[other].numpy(), color="tab:blue", alpha=0.5, linewidth=0.8)
        axes.plot(radius_VD[truth].numpy(), color="tab:red", linewidth=1.2)
        axes.set(xlabel="dimension", ylabel="radius R", title="right video (red), the five next best (blue)")
        return _png(figure)

    def dynamics(self, text: int) -> bytes:
        """Figures 3 to 10: ``|R|_1`` of a query with every video, the right one marked, its frames beside."""
        norm_V, truth = self.norm_TV[text], int(self.features.owner_T[text])
        frames = self._frames(truth)
        figure, (axes, *shown) = _figure(2 if frames is not None else 1, width=8)
        axes.scatter(range(len(norm_V)), norm_V.numpy(), s=5, color="tab:blue")
        axes.scatter([truth], [float(norm_V[truth])], s=60, color="tab:red", marker="*", zorder=3)
        place = f"place {int(self.place_T[text])} of {len(norm_V)} in |R|_1, rank {int(self.rank_T[text])}"
        axes.set(xlabel="video", ylabel="|R|_1", title=place)
        if frames is not None:
            shown[0].imshow(frames)
            shown[0].set_axis_off()
        return _png(figure)

    def _frames(self, video: int) -> np.ndarray | None:
        index = self.stored._shards()
        if index is None:
            return None
        from tmass_dist.data.loader import read_into

        pictures = np.empty((12, index.image_size, index.image_size, 3), np.uint8)
        read_into(pictures, index, index.ids.index(self.features.video_ids[video]))
        return np.concatenate(
            [np.concatenate(list(row), axis=1) for row in pictures.reshape(3, 4, *pictures.shape[1:])]
        )


def scores_against_trials(points: list[tuple[int, str, str]]) -> bytes:
    """Section 2: ``(M, R@1, seconds)``."""
    figure, (left, right) = _figure(2)
    trials = [m for m, _, _ in points]
    left.plot(trials, [float(r1.split()[0]) for _, r1, _ in points], marker="o")
    left.set(xlabel="M", ylabel="R@1, query_conditioned", xscale="log")
    right.plot(trials, [float(s.split()[0]) for _, _, s in points], marker="o")
    right.set(xlabel="M", ylabel="seconds of scoring", ylim=(0, None), xlim=(0, None))
    return _png(figure)


def _figure(panels: int, width: float = 9) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
