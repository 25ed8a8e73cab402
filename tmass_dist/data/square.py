"""From a decoded frame to the square picture that is packed: upright, resized, cropped."""

# Shapes: H W pixels of a frame, S side of a square picture in pixels.

from __future__ import annotations

import threading
from typing import Any

import numpy as np

MAX_ASPECT = 64
"""Longer pictures (64:1) are refused: resizing them would take gigabytes."""

MAX_PIXELS = 2**27
"""Of a JPEG; larger ones are refused."""


def square_picture(frame: Any, side: int) -> np.ndarray:
    """uint8 ``(S, S, 4)`` RGBX of an ``av.VideoFrame``: its short side resized (bicubic), the centre, upright.

    Raises:
        ValueError: the frame is more than 64 times as long as it is wide.
    """
    short, long = sorted((frame.width, frame.height))
    if long > MAX_ASPECT * short:
        raise ValueError(f"a frame has {frame.width}x{frame.height} pixels")
    # The long side to an even number: swscale takes three times as long for an odd one.
    width, height = (max(side, 2 * round(length * side / short / 2)) for length in (frame.width, frame.height))
    # swscale converts colours and resizes in one step; its bicubic filter widens with the ratio, which antialiases.
    # To RGBA it takes a third of the time that it takes to RGB. Threads do not help: packing has many processes.
    converted = _reformatter().reformat(frame, width, height, format="rgba", interpolation="BICUBIC", threads=1)
    left, top = (width - side) // 2, (height - side) // 2
    return np.ascontiguousarray(_upright(converted.to_ndarray()[top : top + side, left : left + side], frame))


def square_jpeg(jpeg: bytes, side: int) -> np.ndarray:
    """The same of a JPEG of any size.

    Raises:
        ValueError: it does not decode, or has more than ``MAX_PIXELS``.
    """
    import av
    import simplejpeg

    height, width = (int(length) for length in simplejpeg.decode_jpeg_header(jpeg)[:2])
    if height * width > MAX_PIXELS:
        raise ValueError(f"a JPEG has {width}x{height} pixels")
    return square_picture(av.VideoFrame.from_ndarray(simplejpeg.decode_jpeg(jpeg), format="rgb24"), side)


_of_thread = threading.local()


def _reformatter() -> Any:
    """One for all frames, because setting up the filter takes longer than applying it; and one for each thread,
    because two threads that use the same one crash the process."""
    if not hasattr(_of_thread, "reformatter"):
        from av.video.reformatter import VideoReformatter

        _of_thread.reformatter = VideoReformatter()
    return _of_thread.reformatter


def _upright(square_SSC: np.ndarray, frame: Any) -> np.ndarray:
    """Apply the frame's display matrix, if it has one.

    The matrix maps ``(x, y)`` to ``(a x + c y, b x + d y)``. Of a right-angled turn with or without mirroring, either
    ``a, d`` or ``b, c`` are zero. Other angles are rounded to the nearest right angle; a matrix without an inverse,
    such as zeros, changes nothing (ffmpeg ignores it too).
    """
    data = next((entry for entry in frame.side_data if entry.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return square_SSC
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].astype(float)
    if a * d == b * c:
        return square_SSC
    if abs(a * d) >= abs(b * c):
        flip_x, flip_y = a < 0, d < 0
    else:
        square_SSC = square_SSC.swapaxes(0, 1)
        flip_x, flip_y = c < 0, b < 0
    return square_SSC[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
