"""One video, packed: the members of its sample, and what was learnt when it was decoded."""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shards.own_videos import Row
from tmass_dist.data.foreign import kind_of, read_foreign_sample
from tmass_dist.data.frames import uniform_frame_indices
from tmass_dist.data.index_checks import MAX_FRAMES, MAX_IMAGE_SIZE
from tmass_dist.data.square import square_jpeg
from tmass_dist.data.tars import split_name
from tmass_dist.data.video import BadVideoError, Choose, Timeline, at_rate, read_video, uniform
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Recipe:
    """How every video of a split is packed; the bytes of the shards depend on nothing else but the videos."""

    num_frames: int = 12
    """Frames of a video, uniform over it."""
    rate: float | None = None
    """Frames a second, in place of a number of frames."""
    image_size: int = 224
    """Side of the square frames, pixels."""
    quality: int = 90
    """JPEG quality, 1 to 100."""
    store: Literal["jpeg", "clip"] = "jpeg"
    """JPEG frames, or the video file itself."""

    def __post_init__(self) -> None:
        for name, largest in (("num_frames", MAX_FRAMES), ("image_size", MAX_IMAGE_SIZE)):
            if not 1 <= getattr(self, name) <= largest:
                raise UserError(f"--{name.replace('_', '-')} must be from 1 to {largest}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise UserError("--rate must be above 0 frames a second, and finite")
        if not 1 <= self.quality <= 100:
            raise UserError("--quality must be from 1 to 100")

    def frames_of(self, row: Row) -> Choose:
        """Which frames of a row's video are packed."""
        window = (row.get("start"), row.get("end"))
        return uniform(self.num_frames, *window) if self.rate is None else at_rate(self.rate, *window)


def pack_row(videos: Path, row: Row, recipe: Recipe) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The members of a row's sample, from a video file or from a tar file of another program; see :func:`pack_video`.

    Raises:
        BadVideoError: it cannot be packed; the message is the reason.
    """
    if "unusable" in row:
        raise BadVideoError(row["unusable"])
    if "tar_range" not in row:
        return pack_video(videos / row["path"], row, recipe)
    offset, size, crc32 = row["tar_range"]
    with open(row["path"], "rb") as file:
        raw = os.pread(file.fileno(), size, offset)
    if zlib.crc32(raw) != crc32:
        raise BadVideoError("the tar file has changed since it was read")
    try:
        meta, payload = read_foreign_sample(raw, row["id"], ())
        kind = kind_of([split_name(meta["source"])[1]])
    except ValueError as error:
        raise BadVideoError(str(error)) from error
    if kind == "clip":
        return pack_video(payload[0], row, recipe, suffix=Path(meta["source"]).suffix)
    return _pack_numbered_frames(payload, recipe)


def _pack_numbered_frames(jpegs: list[bytes], recipe: Recipe) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Frames of a tar file, resized and encoded anew."""
    if recipe.store == "clip" or recipe.rate is not None:
        raise BadVideoError("it is stored as frames, which have no clip and no frame rate")
    indices = uniform_frame_indices(len(jpegs), recipe.num_frames)
    try:
        frames = [square_jpeg(jpegs[index], recipe.image_size) for index in indices]
    except ValueError as error:
        raise BadVideoError(str(error)) from error
    return _encode(frames, recipe), {"num_decoded_frames": len(jpegs), "frame_indices": indices}


def _encode(frames: list[np.ndarray], recipe: Recipe) -> dict[str, bytes]:
    """JPEGs by suffix; the suffixes sort in time order."""
    import simplejpeg

    digits = max(3, len(str(len(frames) - 1)))
    jpegs = (simplejpeg.encode_jpeg(frame, quality=recipe.quality, colorspace="RGBX") for frame in frames)
    return {f"{number:0{digits}d}.jpg": jpeg for number, jpeg in enumerate(jpegs)}


def pack_video(
    source: Path | bytes, row: Row, recipe: Recipe, suffix: str = ""
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The members of a sample by suffix (frames sort in time order), and facts about the video for its JSON.

    Args:
        source: a file, or its bytes.
        row: its annotations; ``start`` and ``end`` choose a part of the video.
        recipe: how it is packed.
        suffix: of the file, if ``source`` is its bytes.

    Raises:
        BadVideoError: it cannot be packed; the message is the reason.
    """
    if recipe.store == "clip":
        return _keep_clip(source, row, recipe, suffix)
    frames, facts = read_video(source, recipe.frames_of(row), recipe.image_size, row.get("end"))
    return _encode(frames, recipe), facts


def _keep_clip(source: Path | bytes, row: Row, recipe: Recipe, suffix: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The file as it is, decoded once to check it and to learn which frames training may choose."""
    window: list[int] = []

    def first_frame(timeline: Timeline) -> list[int]:
        start, end = (int(edge) for edge in timeline.window(row.get("start"), row.get("end")))
        if end <= start:
            raise UserError("the video has no frame there")
        window[:] = start, end
        return [start]

    _, facts = read_video(source, first_frame, recipe.image_size, row.get("end"))
    content = source if isinstance(source, bytes) else source.read_bytes()
    suffix = source.suffix if isinstance(source, Path) else suffix
    suffix = re.sub(r"[^a-z0-9]", "", suffix.lower()) or "mp4"
    del facts["frame_indices"]
    return {suffix: content}, facts | {"frame_window": window}


__all__ = ["BadVideoError", "Recipe", "pack_row", "pack_video"]
