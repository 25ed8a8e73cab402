"""Thumbnails of a split's videos and files to play, for the list of all queries in the report."""

# Shapes: V videos, F frames, S side in pixels.

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from tmass_dist.cli import read_json, replacing, write_json
from tmass_dist.data.index import Index
from tmass_dist.data.remote import DownloadError, cached_path, is_remote
from tmass_dist.data.samples import DamagedError, read_into, read_sample
from tmass_dist.evaluation.features import fingerprint
from tmass_dist.pages import PLAYABLE

SIDE, PER_SHEET = 96, 50
"""Side of a thumbnail in pixels; videos of one file of thumbnails."""
MANY, TOO_MANY = 2_000, 20_000
"""More videos than ``MANY`` get one thumbnail each, more than ``TOO_MANY`` none."""
CLIP_BYTES = 100_000_000
"""Clips that are stored in the shards are copied beside the report up to this size of all of them."""


@dataclass(frozen=True)
class Media:
    """What a page shows of the videos; file names are relative to ``folder``."""

    folder: Path
    num_frames: int = 0
    """Thumbnails of each video: columns of a sheet. A sheet has a row for each of ``PER_SHEET`` videos."""
    sheets: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    """Numbers of the videos without thumbnails."""
    urls: dict[int, str] = field(default_factory=dict)
    """Relative URL of the file of each video that a browser may play."""
    starts_s: dict[int, float] = field(default_factory=dict)
    """Where a video begins in its file, if not at 0."""
    notes: list[str] = field(default_factory=list)
    """What is not shown, and how to get it."""


def make_media(
    index: Index | None, video_ids: list[str], folder: Path, *, thumbnails: int, videos: str | None
) -> Media:
    """Write what is missing below ``folder``, and say what is there. Thumbnails of the same samples are kept.

    Args:
        index: the split; None where its shards are not on this machine.
        video_ids: V ids, in the order of the report.
        folder: of the thumbnails and clips.
        thumbnails: of each video; 0 for none.
        videos: directory of the original files, as it was given to ``tmass pack``.
    """
    if index is None:
        return Media(folder, notes=["No thumbnails: the shards of this split are not on this machine."])
    number_of = {video_id: number for number, video_id in enumerate(index.ids)}
    if not all(video_id in number_of for video_id in video_ids):
        return Media(folder, notes=["No thumbnails: the shards hold other videos than the stored features."])
    numbers = [number_of[video_id] for video_id in video_ids]
    index = _without_downloads(index)
    media, about = _thumbnails(index, numbers, folder, thumbnails)
    urls: dict[int, str] = {}
    notes = list(media.notes)
    if videos is not None:
        urls = _original_files(Path(videos), [source for source, _ in about], folder)
        if not urls:
            notes.append(f"Nothing to play: {videos} (evaluation.videos) has no file of these videos for a browser.")
    elif index.store == "clip":
        size = int(index.columns["size"][numbers].sum())
        if size <= CLIP_BYTES:
            urls = _clips(index, numbers, [source for source, _ in about], folder)
        else:
            notes.append(f"Nothing to play: the clips take {size / 1e9:.1f} GB. evaluation.videos=DIR names the files.")
    else:
        notes.append("Nothing to play: the shards hold frames. evaluation.videos=DIR names the original files.")
    starts = {video: start for video, (_, start) in enumerate(about) if start > 0}
    return replace(media, urls=urls, starts_s=starts, notes=notes)


def _without_downloads(index: Index) -> Index:
    """The same split; shards behind a URL are read from their local copies only."""
    if not index.is_remote:
        return index

    def local_copy(number: int) -> Path:
        shard = index.shards[number]
        directory = shard.directory or index.directory
        path = cached_path(f"{directory}/{shard.name}", index.cache) if is_remote(directory) else Path(shard.name)
        if not path.is_file():
            raise DownloadError(f"{shard.name} is not on this machine")
        return path

    return replace(index, wait_for_shard=local_copy)


def _thumbnails(index: Index, numbers: list[int], folder: Path, wanted: int) -> tuple[Media, list[tuple[str, float]]]:
    """The sheets of thumbnails, and name of the source and beginning in it (seconds) of each video."""
    count = min(wanted, index.num_frames or wanted, 1 if len(numbers) > MANY else wanted)
    notes = []
    if len(numbers) > TOO_MANY and wanted:
        count = 0
        notes.append(f"No thumbnails: there are more than {TOO_MANY:,} videos.")
    # The thumbnails depend on these alone; the ones of an earlier report of the same split are used again.
    crcs = index.columns["crc32"][numbers].tolist()
    key = fingerprint("thumbnails 1", [index.id_of(number) for number in numbers], crcs, count, SIDE, PER_SHEET)[:8]
    about_path = folder / f"videos-{key}.json"
    sheets = [f"frames-{key}-{start // PER_SHEET:04d}.jpg" for start in range(0, len(numbers), PER_SHEET)]
    sheets = sheets if count else []
    folder.mkdir(parents=True, exist_ok=True)
    known = read_json(about_path, list)
    if known is None or len(known) != len(numbers) or not all((folder / sheet).is_file() for sheet in sheets):
        known = []
        for start, rows in zip(range(0, len(numbers), PER_SHEET), _read(index, numbers, count)):
            known += [[source, begin, pixels is not None] for source, begin, pixels in rows]
            if count:
                _write_sheet(folder / sheets[start // PER_SHEET], [pixels for *_, pixels in rows], count, _side(index))
        if all(is_there for *_, is_there in known):  # others may be readable the next time
            write_json(about_path, known)
    missing = [video for video, (*_, is_there) in enumerate(known) if not is_there]
    if missing and len(missing) == len(numbers):
        notes.append("No thumbnails: the shards of this split cannot be read on this machine.")
        sheets, count = [], 0
    for old in [*folder.glob("frames-*.jpg"), *folder.glob("videos-*.json")]:
        if old.name not in sheets and old != about_path:
            old.unlink(missing_ok=True)
    return Media(folder, count, sheets, missing, notes=notes), [
        (str(source), float(begin)) for source, begin, _ in known
    ]


def _side(index: Index) -> int:
    return min(SIDE, index.image_size)


def _read(index: Index, numbers: list[int], count: int) -> Iterator[list[tuple[str, float, Any]]]:
    """For each sheet: source, beginning in it, and pixels ``(F, S, S, 3)`` of its videos; None if unreadable."""
    from PIL import Image

    side = _side(index)

    def read(number: int) -> tuple[str, float, Any]:
        try:
            if not count:
                meta, _ = read_sample(index, number)
                return str(meta.get("source", "")), _begin(meta), np.empty(0)
            frames_FHWC = np.empty((count, index.image_size, index.image_size, 3), np.uint8)
            meta = read_into(frames_FHWC, index, number)
            small = [np.asarray(Image.fromarray(frame).resize((side, side))) for frame in frames_FHWC]
            return str(meta.get("source", "")), _begin(meta), np.stack(small)
        except (DamagedError, OSError):
            return "", 0.0, None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(numbers), PER_SHEET):
            yield list(pool.map(read, numbers[start : start + PER_SHEET]))


def _begin(meta: dict[str, Any]) -> float:
    """Seconds from the start of its file to the part that was packed."""
    try:
        fps = float(meta.get("fps") or 1)
        if "frame_window" in meta:
            return round(float(meta["frame_window"][0]) / fps, 2)
        first, second = (float(index) for index in meta["frame_indices"][:2])
        begin = first - (second - first) / 2  # frames are the middles of equal segments
        return round(begin / fps, 2) if begin > 1 else 0.0
    except (TypeError, ValueError, LookupError, ZeroDivisionError):
        return 0.0


def _write_sheet(path: Path, rows: list[Any], count: int, side: int) -> None:
    import simplejpeg

    sheet_HWC = np.full((len(rows) * side, count * side, 3), 128, np.uint8)
    for row, pixels_FHWC in enumerate(rows):
        if pixels_FHWC is not None:
            sheet_HWC[row * side : (row + 1) * side] = np.concatenate(list(pixels_FHWC), axis=1)
    with replacing(path) as temporary:
        temporary.write_bytes(simplejpeg.encode_jpeg(sheet_HWC, quality=75, colorsubsampling="420"))


def _original_files(videos: Path, sources: list[str], folder: Path) -> dict[int, str]:
    """Relative URL of each source that is a playable file below ``videos``; the names come from the shards."""
    root, urls = videos.resolve(), {}
    for video, source in enumerate(sources):
        if not source.lower().endswith(PLAYABLE):
            continue
        try:
            path = (root / source).resolve()
            is_there = path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError):  # no name of a file
            continue
        if is_there:
            urls[video] = quote(os.path.relpath(path, folder.resolve()))
    return urls


def _clips(index: Index, numbers: list[int], sources: list[str], folder: Path) -> dict[int, str]:
    """Copies of the stored clips that a browser may play."""
    key = fingerprint(index.columns["crc32"][numbers].tolist())[:8]
    directory, urls = folder / f"clips-{key}", {}
    for old in folder.glob("clips-*"):
        if old != directory:
            shutil.rmtree(old, ignore_errors=True)
    for video, (number, source) in enumerate(zip(numbers, sources)):
        suffix = Path(source).suffix.lower()
        if suffix not in PLAYABLE:
            continue
        path = directory / f"{video:06d}{suffix}"
        if not path.is_file():
            try:
                _, payload = read_sample(index, number)
            except (DamagedError, OSError):
                continue
            directory.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(payload[0])
        urls[video] = f"{directory.name}/{path.name}"
    return urls
