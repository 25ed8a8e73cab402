"""Frames of videos to be encoded, with the time of each: from files, or from packed shards."""

# Shapes: V videos, F frames, H W pixels, C colours.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmass_dist.cli import is_utf8
from tmass_dist.data.index import Index, load_index
from tmass_dist.data.samples import DamagedError, read_into
from tmass_dist.data.video import BadVideoError, Timeline, read_video, uniform
from tmass_dist.errors import UserError

SUFFIXES = {".mp4", ".m4v", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv"}


@dataclass(frozen=True)
class Source:
    """One video: a file, its content, or sample ``number`` of a packed split."""

    id: str
    path: str
    """Of the file; "" where only frames were packed."""
    index: Index | None = None
    number: int = 0
    content: bytes | None = None
    """Of the file, in place of reading ``path``."""

    def state(self) -> list[Any]:
        """What tells whether the video changed since it was encoded."""
        if self.index is not None:
            return [self.id, self.path, int(self.index.columns["crc32"][self.number])]
        stat = Path(self.path).stat()
        return [self.id, self.path, stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class Batch:
    """Videos that were read; row ``i`` of each array belongs to ``sources[i]``."""

    sources: list[Source]
    pixels_VFHWC: np.ndarray
    """uint8 RGB."""
    times_VF: np.ndarray
    """Seconds from the beginning of the file, float32."""
    seconds_V: np.ndarray
    """Duration, float32."""
    indices: list[list[int]]
    """Numbers of the frames of each file; empty for packed samples."""
    failed: list[tuple[str, str]]
    """Id and reason of each video that could not be read."""


def files_of(directory: Path) -> list[Source]:
    """The video files below ``directory``, by their relative path, which is their id.

    Raises:
        UserError: there is no such directory, it has no video file, or the name of one is not UTF-8.
    """
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}")
    # A link may lead out of the directory; what it names is not part of it.
    files = sorted(
        p for p in directory.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not p.is_symlink()
    )
    if not files:
        raise UserError(f"{directory} has no video file; the endings known are {', '.join(sorted(SUFFIXES))}")
    sources = [Source(path.relative_to(directory).as_posix(), str(path.resolve())) for path in files]
    if wrong := [source.path for source in sources if not is_utf8(source.path)]:
        raise UserError(f"the names of {len(wrong)} files are not UTF-8, as {wrong[0]!r}; rename them")
    return sources


def samples_of(directory: str | Path, cache: str | None = None) -> list[Source]:
    """The samples of a packed split."""
    index = load_index(directory, cache)
    return [Source(index.id_of(number), "", index, number) for number in range(len(index))]


def sources_of(videos: Sequence[str | Path] | str | Path) -> list[Source]:
    """Files, one file, or the samples of a directory of shards.

    Raises:
        UserError: a file that does not exist, or a directory without shards.
    """
    if isinstance(videos, str | Path):
        if Path(videos).is_dir():
            return samples_of(videos)
        videos = [videos]
    missing = [str(path) for path in videos if not Path(path).is_file()]
    if missing:
        raise UserError(f"{len(missing)} videos do not exist: {', '.join(missing[:3])}")
    return [Source(str(path), str(Path(path).resolve())) for path in videos]


def read_batches(sources: Sequence[Source], num_frames: int, side: int, batch_size: int) -> Iterator[Batch]:
    """Read videos, ``batch_size`` at a time.

    Args:
        sources: the videos.
        num_frames: F, from the middle of equal segments.
        side: of the frames of files, pixels; packed frames keep their size.
        batch_size: V of a batch, less where a video cannot be read.
    """
    for start in range(0, len(sources), batch_size):
        rows, failed = [], []
        for source in sources[start : start + batch_size]:
            try:
                rows.append((source, *_read(source, num_frames, side)))
            except (BadVideoError, DamagedError) as error:
                failed.append((source.id, " ".join(str(error).split())))
        side_here = rows[0][1].shape[1] if rows else side
        pixels = np.empty((len(rows), num_frames, side_here, side_here, 3), np.uint8)
        for row, (_, frames, *_) in enumerate(rows):
            pixels[row] = frames
        yield Batch(
            [row[0] for row in rows],
            pixels,
            np.array([row[2] for row in rows], np.float32).reshape(len(rows), num_frames),
            np.array([row[3] for row in rows], np.float32),
            [row[4] for row in rows],
            failed,
        )


def _read(source: Source, num_frames: int, side: int) -> tuple[np.ndarray, np.ndarray, float, list[int]]:
    """Frames ``(F, S, S, 3)``, their times, the duration and the frames' numbers of one video."""
    if source.index is not None:
        side = source.index.image_size
        frames = np.empty((num_frames, side, side, 3), np.uint8)
        meta = read_into(frames, source.index, source.number)
        return frames, _packed_times(meta, num_frames), float(meta.get("seconds", 0.0)), []
    seen: list[Timeline] = []
    choose = uniform(num_frames)

    def remember(timeline: Timeline) -> list[int]:
        seen.append(timeline)
        return choose(timeline)

    pictures, facts = read_video(source.content or Path(source.path), remember, side)
    # The last timeline is that of the frames that were decoded; the first may be the header's.
    times = seen[-1].times_s[facts["frame_indices"]]
    return np.stack(pictures)[..., :3], times, float(facts["seconds"]), facts["frame_indices"]


def _packed_times(meta: dict[str, Any], num_frames: int) -> np.ndarray:
    """Times of a packed sample's frames, by its average frame rate."""
    from tmass_dist.data.frames import uniform_frame_indices

    fps = float(meta.get("fps") or 1.0)
    if "frame_window" in meta:
        start, end = (int(edge) for edge in meta["frame_window"])
        return np.array([start + i for i in uniform_frame_indices(end - start, num_frames)]) / fps
    indices = np.array(meta.get("frame_indices") or [0.0])
    if len(indices) != num_frames:
        indices = indices[uniform_frame_indices(len(indices), num_frames)]
    return indices / fps
