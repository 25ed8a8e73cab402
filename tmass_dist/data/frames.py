"""Which frames of a video are taken."""

from __future__ import annotations

from itertools import pairwise


def uniform_frame_indices(length: int, num_frames: int) -> list[int]:
    """The middle of each of ``num_frames`` equal segments; a short video repeats its last frame.

    Args:
        length: decoded frames of the video, at least 1.
        num_frames: frames wanted.

    Source: the authors' ``uniform`` sampling.
    """
    if length < 1:
        raise ValueError("the video has no frame")
    segments = min(num_frames, length)
    # numpy.linspace(0, length, segments + 1) truncated: the step is rounded before it is multiplied.
    step = length / segments
    cuts = [*(int(number * step) for number in range(segments)), length]
    indices = [(start + end - 1) // 2 for start, end in pairwise(cuts)]
    return indices + [indices[-1]] * (num_frames - segments)
