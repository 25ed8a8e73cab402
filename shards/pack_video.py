"""One video, packed: the members of its sample, and what was learnt when it was decoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.own_videos import Row
from tmass_dist.data.index_checks import MAX_FRAMES, MAX_IMAGE_SIZE
from tmass_dist.data.video import BadVideoError, Choose, Timeline, at_rate, read_video, uniform
from tmass_dist.errors import UserError


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


def pack_video(path: Path, row: Row, recipe: Recipe) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The members of a sample by suffix (frames sort in time order), and facts about the video for its JSON.

    Args:
        path: of the video.
        row: its annotations; ``start`` and ``end`` choose a part of the video.
        recipe: how it is packed.

    Raises:
        BadVideoError: it cannot be packed; the message is the reason.
    """
    if recipe.store == "clip":
        return _keep_clip(path, row, recipe)
    import simplejpeg

    frames, facts = read_video(path, recipe.frames_of(row), recipe.image_size, row.get("end"))
    digits = max(3, len(str(len(frames) - 1)))
    jpegs = (simplejpeg.encode_jpeg(frame, quality=recipe.quality, colorspace="RGBX") for frame in frames)
    return {f"{number:0{digits}d}.jpg": jpeg for number, jpeg in enumerate(jpegs)}, facts


def _keep_clip(path: Path, row: Row, recipe: Recipe) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The file as it is, decoded once to check it and to learn which frames training may choose."""
    window: list[int] = []

    def first_frame(timeline: Timeline) -> list[int]:
        start, end = (int(edge) for edge in timeline.window(row.get("start"), row.get("end")))
        if end <= start:
            raise UserError("the video has no frame there")
        window[:] = start, end
        return [start]

    _, facts = read_video(path, first_frame, recipe.image_size, row.get("end"))
    suffix = re.sub(r"[^a-z0-9]", "", path.suffix.lower()) or "mp4"
    del facts["frame_indices"]
    return {suffix: path.read_bytes()}, facts | {"frame_window": window}


__all__ = ["BadVideoError", "Recipe", "pack_video"]
