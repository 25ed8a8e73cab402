"""Which frames of a video are taken, by number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tmass_dist.errors import UserError


def _segments(start: float, end: float, num_frames: int) -> list[tuple[int, int]]:
    """First frame, and the frame after the last, of each equal segment; a short video has a segment for each frame."""
    number = min(num_frames, int(end - start))
    if number < 1:
        raise UserError("the video has no frame there")
    # As numpy.linspace(start, end, number + 1) with truncation: the step is rounded before it is multiplied.
    step = (end - start) / number
    return list(pairwise([*(int(start + k * step) for k in range(number)), int(end)]))


def uniform_frame_indices(length: int, num_frames: int) -> list[int]:
    """The middle of each of ``num_frames`` equal segments; a short video repeats its last frame.

    Args:
        length: decoded frames of the video, at least 1.
        num_frames: frames wanted.

    Source: the authors' ``uniform`` sampling.
    """
    return window_frame_indices(length, 1.0, 0.0, float(length), num_frames)


def random_frame_indices(length: int, num_frames: int, rng: np.random.Generator) -> list[int]:
    """A random frame of each of ``num_frames`` equal segments; a short video repeats its last frame.

    All frames of a segment are equally likely. The published ``rand`` sampling never takes a segment's last frame, and
    fails if a segment has only one.
    """
    indices = [int(rng.integers(start, end)) for start, end in _segments(0, length, num_frames)]
    return indices + [indices[-1]] * (num_frames - len(indices))


def window_frame_indices(length: int, fps: float, start_s: float, end_s: float, num_frames: int) -> list[int]:
    """The middle of each of ``num_frames`` equal segments of a time window, cut to the video.

    Args:
        length: decoded frames of the video.
        fps: frames a second.
        start_s, end_s: the window, seconds. DiDeMo's captions describe the first 30 s; its window is 0 to 31.
        num_frames: frames wanted. A short window repeats its last frame; the published code fails there.

    Raises:
        UserError: the video ends before the window starts.

    Source: the authors' windowed sampling.
    """
    start, end = start_s * fps, min(float(length), end_s * fps)
    indices = [(first + last - 1) // 2 for first, last in _segments(start, end, num_frames)]
    return indices + [indices[-1]] * (num_frames - len(indices))
