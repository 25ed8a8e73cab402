"""The radius of a text with every video, and the supplementary's pictures of it (Figures 2 to 10)."""

# Shapes: V videos, D embedding width, H W pixels.

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.evaluation.features import Features
from tmass_dist.models.stochastic import TextMass, frame_cosines
from tmass_dist.pictures import figure, png


def radii_of(mass: TextMass, features: Features, text: int) -> Tensor:
    """R ``(V, D)``, on the CPU, of one text with every video."""
    with torch.no_grad():
        text_D = features.text_TD[text]
        cosine_VF = frame_cosines(text_D[None], F.normalize(features.frames_VFD, dim=-1))[:, 0]
        text_VD = text_D.expand(len(cosine_VF), -1)
        device = next(mass.parameters(), text_D).device  # the head's, after scoring
        return mass.radius_of(cosine_VF.to(device), text_VD.to(device)).expand_as(text_VD).cpu()


def vectors(radius_VD: Tensor, truth: int, others: list[int]) -> bytes:
    """Figure 2, as PNG: R of the correct video in red, of ``others`` in blue."""
    drawn, (axes,) = figure()
    for other in others:
        axes.plot(radius_VD[other].numpy(), color="tab:blue", alpha=0.5, linewidth=0.8)
    axes.plot(radius_VD[truth].numpy(), color="tab:red", linewidth=1.2)
    axes.set(xlabel="dimension", ylabel="radius R", title=f"correct video (red), {len(others)} others (blue)")
    return png(drawn)


def norms(norm_V: Tensor, truth: int, title: str, frames_HWC: np.ndarray | None = None) -> bytes:
    """Figures 3 to 10, as PNG: ``|R|_1`` of one text with every video, the correct one marked, its frames beside."""
    drawn, (axes, *shown) = figure(1 if frames_HWC is None else 2)
    axes.scatter(range(len(norm_V)), norm_V.numpy(), s=5, color="tab:blue")
    axes.scatter([truth], [float(norm_V[truth])], s=60, color="tab:red", marker="*", zorder=3)
    axes.set(xlabel="video", ylabel="|R|_1", title=title)
    if frames_HWC is not None:
        shown[0].imshow(frames_HWC)
        shown[0].set_axis_off()
    return png(drawn)
