"""From a video file to JPEG frames: PyAV, one sequential pass, no seeks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tmass_dist.data.frames import window_frame_indices


class BadVideoError(ValueError):
    """A video that cannot be packed; the message is the reason written to the quarantine."""


def _decode(path: Path, end_s: float | None) -> Any:
    """Yield the frames up to a time, each with the stream's frame rate; whatever decodes, decodes."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise BadVideoError("no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            if end_s is not None and (frame.time or 0.0) > end_s:
                return
            yield frame, float(stream.average_rate or stream.base_rate or 25)


def pack_video(
    path: Path, num_frames: int, image_size: int, quality: int, start_s: float | None = None, end_s: float | None = None
) -> tuple[list[bytes], dict[str, Any]]:
    """``num_frames`` JPEGs of ``image_size`` square, and what was decoded.

    Frames are counted by decoding, since headers lie; the short side is resized (bicubic) and the centre cropped.

    Raises:
        BadVideoError: nothing decodes, no video stream, or the file is missing.
    """
    import av
    import numpy as np
    import simplejpeg
    from PIL import Image

    if not path.is_file():
        raise BadVideoError("the file is missing")
    if path.stat().st_size == 0:
        raise BadVideoError("the file is empty")
    frames, fps, damaged = [], 25.0, None
    try:
        for frame, rate in _decode(path, end_s):
            fps = rate
            # Kept at final size: a pass over the file, and 4K videos do not fill the memory.
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            rotation = int(getattr(frame, "rotation", 0) or 0)
            if rotation:
                picture = picture.rotate(rotation, expand=True)
            scale = image_size / min(picture.size)
            width, height = (max(image_size, round(side * scale)) for side in picture.size)
            left, top = (width - image_size) // 2, (height - image_size) // 2
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            frames.append(np.asarray(picture.crop((left, top, left + image_size, top + image_size))))
    except av.FFmpegError as error:
        damaged = str(error)
    if not frames:
        raise BadVideoError(damaged or "no frame decodes")
    window = (start_s or 0.0, len(frames) / fps if end_s is None else end_s)
    try:
        indices = window_frame_indices(len(frames), fps, *window, num_frames)
    except ValueError as error:
        raise BadVideoError(f"{error}: it ends after {len(frames) / fps:.1f} s") from error
    jpegs = {i: simplejpeg.encode_jpeg(np.ascontiguousarray(frames[i]), quality=quality) for i in set(indices)}
    facts = {"num_decoded_frames": len(frames), "frame_indices": indices, "damaged_end": damaged}
    return [jpegs[i] for i in indices], facts
