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
    # The dtype is named because an audited module may have changed the default.
    text_TD = torch.randn(len(owner_T), width, generator=generator, dtype=torch.float32)
    video_V1D = torch.randn(videos, 1, width, generator=generator, dtype=torch.float32)
    frames_VFD = video_V1D + torch.randn(videos, frames, width, generator=generator, dtype=torch.float32)
    if seed % 2:
        shared_D = torch.randn(width, generator=generator, dtype=torch.float32)
        text_TD, frames_VFD = text_TD + shared_D, frames_VFD + shared_D
    return Inputs(text_TD, frames_VFD, owner_T)


class CallError(Exception):
    """The audited function raised, or returned what is no matrix of scores."""


def describe(error: BaseException) -> str:
    """Type and first line of an exception, which may have many."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


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
            CallError: the function raised, or the result is no matrix of real numbers of shape ``(T, V)``.
        """
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        originals = (inputs.text_TD, inputs.frames_VFD, inputs.owner_T)
        copies: list[Any] = [tensor.clone() for tensor in originals]
        arguments = [tensor.numpy() for tensor in copies] if self.numpy else copies
        try:
            with torch.no_grad():
                result = self.similarity(*arguments)
        except (Exception, SystemExit) as error:
            # SystemExit too: a function that ends the program must not end the audit with its exit code.
            raise CallError(describe(error)) from error
        self.changes_inputs |= not all(map(torch.equal, originals, copies))
        scores_TV = _matrix(result, (len(inputs.text_TD), len(inputs.frames_VFD)))
        bad = scores_TV.isnan()
        self.num_nan += int(bad.sum())
        return scores_TV.masked_fill(bad, -torch.inf).clamp(-_LIMIT, _LIMIT)


def _matrix(result: Any, shape: tuple[int, int]) -> Tensor:
    """What a function returned, as float64."""
    wanted = f"wanted a matrix of numbers (texts, videos) = {shape}"
    try:
        scores = torch.as_tensor(result).detach()
    except Exception as error:
        raise CallError(f"returned {type(result).__name__}, {wanted}") from error
    if scores.is_complex():
        raise CallError(f"returned complex numbers, {wanted}")
    if tuple(scores.shape) != shape:
        raise CallError(f"returned shape {tuple(scores.shape)}, {wanted}")
    return scores.to("cpu", torch.float64)


_LIMIT = 1e100
"""In place of infinity, so that differences and squares stay numbers; above all numbers of float32."""


def is_number(scores: Tensor) -> Tensor:
    """Which of a :class:`Caller`'s scores were finite numbers."""
    return scores.abs() < _LIMIT
