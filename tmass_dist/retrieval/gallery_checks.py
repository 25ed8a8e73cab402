"""Checks of the JSON files of a gallery, which others may have written: types, ranges, and names of plain files."""

from __future__ import annotations

import math
import re
from typing import Any

from tmass_dist.cli import is_utf8
from tmass_dist.errors import UserError

_INDEX = re.compile(r"frames-\d{6,}\.usearch")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def check_gallery(about: Any) -> None:
    """Check the content of ``gallery.json``.

    Raises:
        UserError: the first field that is wrong; files that it names must lie in the gallery itself.
    """
    _require(isinstance(about, dict), "it holds no object")
    for key in ("num_frames", "width"):
        _require(_is_whole(about.get(key), 1, 2**20), f"{key} is {about.get(key)!r}")
    for key in ("fingerprint", "model"):
        _require(_is_text(about.get(key)), f"{key} is {about.get(key)!r}")
    parts, removed, index = about.get("parts"), about.get("removed"), about.get("index")
    _require(isinstance(parts, list) and all(map(_is_file_name, parts)), "its parts are not a list of names of files")
    _require(len(set(parts)) == len(parts), "it names a part twice")
    _require(isinstance(removed, list) and all(_is_whole(row, 0) for row in removed), "removed is not a list of rows")
    _require(isinstance(index, dict), "it names no index")
    file = index.get("file")
    _require(isinstance(file, str) and bool(_INDEX.fullmatch(file)), f"the name of its index is {file!r}")
    _check_file(index, "its index")


def check_part(about: Any) -> None:
    """Check the content of the ``.json`` of a part.

    Raises:
        UserError: the first field that is wrong.
    """
    _require(isinstance(about, dict), "it holds no object")
    videos, failed, files = (about.get(key) for key in ("videos", "failed", "files"))
    _require(isinstance(videos, list) and isinstance(failed, list), "it has no list of videos, or none of failed ones")
    for video in videos:
        _require(isinstance(video, dict) and "state" in video, "a video has no state")
        _require(_is_text(video.get("id")), f"the id of a video is {video.get('id')!r}")
        path, seconds = video.get("path"), video.get("seconds")
        _require(
            isinstance(path, str) and is_utf8(path) and "\0" not in path, f"the path of {video['id']!r} is {path!r}"
        )
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < math.inf
        _require(is_number, f"the seconds of {video['id']!r} are {seconds!r}")
    for entry in failed:
        fits = isinstance(entry, dict) and "state" in entry and all(_is_text(entry.get(k)) for k in ("id", "reason"))
        _require(fits, "a failed video has no id, reason or state")
    _require(isinstance(files, dict), "its files are not an object")
    for name, file in files.items():
        _require(_is_file_name(name), f"it names the file {name!r}")
        _check_file(file, name)


def check_shapes(
    shapes: dict[str, tuple[tuple[int, ...], Any]], num_videos: int, num_frames: int, width: int, name: str
) -> None:
    """Check that the arrays of a part fit its videos.

    Args:
        shapes: shape and type of each array, by what it holds.
        num_videos: V, by the ``.json`` of the part.
        num_frames: F, by ``gallery.json``.
        width: D.
        name: of the part.

    Raises:
        UserError: an array has another shape or type.
    """
    wanted = {
        "frames": ((num_videos, num_frames, width), "float16"),
        "times": ((num_videos, num_frames), "float32"),
        "thumbnail_ends": ((num_videos * num_frames,), "int64"),
    }
    for what, (shape, kind) in wanted.items():
        found, dtype = shapes[what]
        fits = found == shape and str(dtype) == kind
        _require(fits, f"{name}.{what}.npy holds {dtype} of shape {found}, and its gallery needs {kind} of {shape}")


def _check_file(about: Any, name: str) -> None:
    _require(isinstance(about, dict) and _is_whole(about.get("bytes"), 0), f"the size of {name} is not a number")
    _require(isinstance(about.get("sha256"), str), f"the checksum of {name} is not a text")


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_FILE.fullmatch(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_utf8(value)


def _is_whole(value: Any, least: int, below: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
