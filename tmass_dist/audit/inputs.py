"""Inputs of the audit, and the calls of the audited function.

Texts and videos are drawn independently, so nothing but the owners tells which video belongs to a text.
"""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Similarity = Callable[[Any, Any, Any], Any]
"""``similarity(text_TD, frames_VFD, owner_T) -> (T, V)``, higher is closer."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call."""

    text_TD: Tensor
    frames_VFD: Tensor
    owner_T: Tensor
    """int64: number of each text's video."""

    def of_texts(self, rows_T: Tensor) -> Inputs:
        """The same gallery, asked by some texts in the order of ``rows_T``."""
        return replace(self, text_TD=self.text_TD[rows_T], owner_T=self.owner_T[rows_T])

    def of_videos(self, videos_V: Tensor) -> tuple[Inputs, Tensor]:
        """Some videos in the order of ``videos_V`` with the texts that they own, and the rows of those texts."""
        place = torch.full((len(self.frames_VFD),), -1)
        place[videos_V] = torch.arange(len(videos_V))
        rows_T = (place[self.owner_T] >= 0).nonzero().flatten()
        return Inputs(self.text_TD[rows_T], self.frames_VFD[videos_V], place[self.owner_T[rows_T]]), rows_T


SHAPES: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "square": lambda _, videos: torch.ones(videos, dtype=torch.int64),
    "texts != videos": lambda _, videos: torch.full((videos,), 3),
    "ragged": lambda generator, videos: torch.randint(1, 6, (videos,), generator=generator),
}
"""How many captions each video has, for a generator and a number of videos."""


def draw(shape: str, seed: int, videos: int, frames: int, width: int) -> Inputs:
    """Independent random texts and frames; the captions of a video follow each other.

    With an odd ``seed`` all embeddings share a direction, as those of CLIP do, so that most cosines are positive.
    """
    generator = torch.Generator().manual_seed(seed)
    counts_V = SHAPES[shape](generator, videos)
    owner_T = torch.arange(videos).repeat_interleave(counts_V)
    text_TD = torch.randn(len(owner_T), width, generator=generator)
    frames_VFD = torch.randn(videos, 1, width, generator=generator) + torch.randn(
        videos, frames, width, generator=generator
    )
    if seed % 2:
        shared_D = torch.randn(width, generator=generator)
        text_TD, frames_VFD = text_TD + shared_D, frames_VFD + shared_D
    return Inputs(text_TD, frames_VFD, owner_T)


class Caller:
    """The audited function: seeds torch, numpy and random before each call, and checks what comes back.

    Args:
        similarity: see :data:`Similarity`; gets CPU float32 tensors and int64 owners, its own copies.
        numpy: give numpy arrays in place of tensors.
    """

    def __init__(self, similarity: Similarity, numpy: bool = False) -> None:
        self.similarity, self.numpy = similarity, numpy
        self.num_nan = 0
        """Scores so far that were no numbers."""
        self.changes_inputs = False

    def __call__(self, inputs: Inputs, seed: int = 0) -> Tensor:
        """Scores ``(T, V)``, float64; NaN becomes the lowest.

        Raises:
            ValueError: the result is no matrix of numbers of shape ``(T, V)``.
        """
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        originals = (inputs.text_TD, inputs.frames_VFD, inputs.owner_T)
        copies: list[Any] = [tensor.clone() for tensor in originals]
        arguments = [tensor.numpy() for tensor in copies] if self.numpy else copies
        with torch.no_grad():
            result = self.similarity(*arguments)
        self.changes_inputs |= not all(map(torch.equal, originals, copies))
        scores_TV = torch.as_tensor(result).detach().to("cpu", torch.float64)
        shape = (len(inputs.text_TD), len(inputs.frames_VFD))
        if tuple(scores_TV.shape) != shape:
            raise ValueError(f"returned shape {tuple(scores_TV.shape)}, wanted (texts, videos) = {shape}")
        bad = scores_TV.isnan()
        self.num_nan += int(bad.sum())
        return scores_TV.masked_fill(bad, -torch.inf).clamp(-_LIMIT, _LIMIT)


_LIMIT = 1e30
"""In place of infinity, so that differences stay numbers."""


def is_number(scores: Tensor) -> Tensor:
    """Which of a :class:`Caller`'s scores were finite numbers."""
    return scores.abs() < _LIMIT
