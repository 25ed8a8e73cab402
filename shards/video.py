"""From a video file to JPEG frames: PyAV, sequential, no seeks; only the frames that are kept are converted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tmass_dist.data.frames import window_frame_indices


class BadVideoError(ValueError):
    """A video that cannot be packed; the message is the reason written to the quarantine."""


class _Video:
    """One pass over a file: how many frames decode, and the pictures asked for."""

    def __init__(self, path: Path, end_s: float | None) -> None:
        self.path, self.end_s = path, end_s
        self.fps, self.claimed = 25.0, 0
        self.num_decoded, self.damaged = 0, None

    def frames(self) -> Iterator[tuple[int, Any]]:
        """Every frame that decodes, numbered; what the header claims is known from the first one on."""
        import av

        self.num_decoded, self.damaged = 0, None
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise BadVideoError("no video stream")
                stream = container.streams.video[0]
                stream.thread_type = "NONE"
                self.fps = float(stream.average_rate or stream.base_rate or 25)
                seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
                self.claimed = stream.frames or round(seconds * self.fps)
                for frame in container.decode(stream):
                    if self.end_s is not None and (frame.time or 0.0) > self.end_s:
                        return
                    yield self.num_decoded, frame
                    self.num_decoded += 1
        except av.FFmpegError as error:
            self.damaged = str(error)

    def indices(self, length: int, num_frames: int, start_s: float | None) -> list[int]:
        end_s = length / self.fps if self.end_s is None else self.end_s
        return window_frame_indices(length, self.fps, start_s or 0.0, end_s, num_frames)


def _jpeg(frame: Any, image_size: int, quality: int) -> bytes:
    """Upright, the short side resized (bicubic), the centre square."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    rotation = int(getattr(frame, "rotation", 0) or 0)
    if rotation:
        picture = picture.rotate(rotation, expand=True)
    scale = image_size / min(picture.size)
    width, height = (max(image_size, round(side * scale)) for side in picture.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    square = picture.crop((left, top, left + image_size, top + image_size))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(square), quality=quality)


def pack_video(
    path: Path, num_frames: int, image_size: int, quality: int, start_s: float | None = None, end_s: float | None = None
) -> tuple[list[bytes], dict[str, Any]]:
    """``num_frames`` JPEGs of ``image_size`` square, and what was decoded.

    Frames are counted by decoding, since headers lie: the first pass keeps the frames that the header's count asks
    for, and where another count decodes, a second pass takes the right ones. Memory holds ``num_frames`` pictures.

    Raises:
        BadVideoError: nothing decodes, no video stream, the file is missing, or it ends before ``start_s``.
    """
    if not path.is_file():
        raise BadVideoError("the file is missing")
    if path.stat().st_size == 0:
        raise BadVideoError("the file is empty")
    video, kept, guessed = _Video(path, end_s), {}, None
    for number, frame in video.frames():
        if guessed is None:
            guessed = _wanted(video, num_frames, start_s, max(video.claimed, 1))
        if number in guessed:
            kept[number] = _jpeg(frame, image_size, quality)
    if not video.num_decoded:
        raise BadVideoError(video.damaged or "no frame decodes")
    damaged, num_decoded = video.damaged, video.num_decoded
    try:
        indices = video.indices(num_decoded, num_frames, start_s)
    except ValueError as error:
        raise BadVideoError(f"{error}: it ends after {num_decoded / video.fps:.1f} s") from error
    if not set(indices) <= kept.keys():
        kept = {number: _jpeg(frame, image_size, quality) for number, frame in video.frames() if number in indices}
    facts = {"num_decoded_frames": num_decoded, "frame_indices": indices, "damaged_end": damaged}
    return [kept[i] for i in indices], facts


def _wanted(video: _Video, num_frames: int, start_s: float | None, length: int) -> set[int]:
    try:
        return set(video.indices(length, num_frames, start_s))
    except ValueError:  # the header claims less than the window asks for; the count will tell
        return set()
