"""Which frames of a video are taken."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def _segments(length: int, num_frames: int) -> list[tuple[int, int]]:
    """First frame and the one after the last of each equal segment; a short video has one segment a frame."""
    if length < 1:
        raise ValueError("the video has no frame")
    number = min(num_frames, length)
    # numpy.linspace(0, length, number + 1) truncated: the step is rounded before it is multiplied.
    step = length / number
    return list(pairwise([*(int(k * step) for k in range(number)), length]))


def uniform_frame_indices(length: int, num_frames: int) -> list[int]:
    """The middle of each of ``num_frames`` equal segments; a short video repeats its last frame.

    Args:
        length: decoded frames of the video, at least 1.
        num_frames: frames wanted.

    Source: the authors' ``uniform`` sampling.
    """
    indices = [(start + end - 1) // 2 for start, end in _segments(length, num_frames)]
    return indices + [indices[-1]] * (num_frames - len(indices))


def random_frame_indices(length: int, num_frames: int, rng: np.random.Generator) -> list[int]:
    """Any frame of each of ``num_frames`` equal segments; a short video repeats its last frame.

    The published ``rand`` sampling never takes a segment's last frame and fails where a segment has one frame only;
    here every frame of a segment is as likely as the others.
    """
    indices = [int(rng.integers(start, end)) for start, end in _segments(length, num_frames)]
    return indices + [indices[-1]] * (num_frames - len(indices))


def window_frames(num_frames_in_video: int, fps: float, start_s: float, end_s: float) -> tuple[int, int]:
    """First frame and the one after the last of a time window, cut to the video.

    Args:
        num_frames_in_video: decoded frames.
        fps: frames a second.
        start_s, end_s: seconds; DiDeMo describes the first 30 s, asked for as [0, 31).

    Raises:
        ValueError: the video ends before the window starts.

    Source: the authors' windowed sampling, which fails on a video shorter than a few frames too; here it does not.
    """
    start, end = int(start_s * fps), min(num_frames_in_video, int(end_s * fps))
    if end <= start:
        raise ValueError(f"the video ends before {start_s:g} s")
    return start, end
