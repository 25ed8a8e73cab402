"""Small videos with known frames, for tests of decoding and packing."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path

import av
import numpy as np

CODECS = {  # container, codec, pixels
    "cinepak": ("avi", "cinepak", "rgb24"),
    "msvideo1": ("avi", "msvideo1", "rgb555le"),
    "mpeg1": ("avi", "mpeg1video", "yuv420p"),
    "mpg": ("mpeg", "mpeg2video", "yuv420p"),
    "ts": ("mpegts", "mpeg2video", "yuv420p"),
    "h264": ("matroska", "libx264", "yuv420p"),
    "hevc": ("matroska", "libx265", "yuv420p"),
    "mkv": ("matroska", "mpeg4", "yuv420p"),
    "avi": ("avi", "mpeg4", "yuv420p"),
    "mjpeg": ("avi", "mjpeg", "yuvj420p"),
    "mjpeg in mov": ("mov", "mjpeg", "yuvj420p"),
    "mp4": ("mp4", "mpeg4", "yuv420p"),
    "vp9": ("webm", "libvpx-vp9", "yuv420p"),
    "wmv2": ("asf", "wmv2", "yuv420p"),
    "flv": ("flv", "flv", "yuv420p"),
}


def encode(
    path: Path, pictures: list[np.ndarray], name: str, *, rate: int = 25, times: list[int] | None = None
) -> None:
    """Write RGB pictures, at ``rate`` frames a second or shown at ``times`` (in units of 1 / ``rate``)."""
    kind, codec, pixels = CODECS[name]
    # With its index first, as files for the web have it: a torn one can then be decoded up to its end.
    options = {"movflags": "faststart"} if kind in ("mov", "mp4") else {}
    with av.open(str(path), "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1", "x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = pictures[0].shape[1], pictures[0].shape[0], pixels
        stream.codec_context.bit_rate = 4_000_000
        stream.codec_context.gop_size = 12
        if codec in ("mpeg2video", "libx264"):
            stream.codec_context.max_b_frames = 2
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts = times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_greys(
    path: Path, greys: list[int], *, times: list[int] | None = None, size: tuple[int, int] = (64, 48)
) -> None:
    """Frame ``i`` is plain grey; 10 frames a second, or shown at ``times`` in tenths of a second."""
    width, height = size
    pictures = [np.full((height, width, 3), grey, np.uint8) for grey in greys]
    encode(path, pictures, "mjpeg" if path.suffix == ".avi" else "mp4", rate=10, times=times)


@cache
def moving_pictures(number: int) -> list[np.ndarray]:
    """RGB pictures of a moving disc on a moving ground, each different from all others."""
    y, x = np.mgrid[0:96, 0:128]
    pictures = []
    for k in range(number):
        ground = np.stack([(x * 2 + 5 * k) % 256, (y * 2 + 3 * k) % 256, (x + y + 7 * k) % 256], axis=-1)
        disc = (x - 20 - 1.5 * k) ** 2 + (y - 48) ** 2 < 300
        pictures.append(np.where(disc[..., None], [255, 255, 0], ground * 0.6 + k).clip(0, 255).astype(np.uint8))
    return pictures


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write ``a, b, c, d`` into the track header of an mp4 file."""
    content = bytearray(path.read_bytes())
    position = content.index(b"tkhd") - 4 + 8 + 4 + 20 + 16  # header, version, times and ids, then layer and volume
    assert content[position : position + 4] == b"\x00\x01\x00\x00"  # the identity begins with one
    a, b, c, d = (value << 16 for value in matrix)
    content[position : position + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(content)
