"""A gallery: encoded videos on disk, memory-mapped, with thumbnails and an index of their frames.

A gallery is a directory. ``gallery.json`` lists everything that belongs to it and is replaced last, by a rename, so a
process that is killed leaves the gallery as it was. The videos lie in parts, which are never changed: adding videos
adds parts, and removing a video only lists its row as removed.
"""

# Shapes: V videos, F frames, D embedding width.

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmass_dist.cli import write_json
from tmass_dist.data.remote import sha256_of
from tmass_dist.errors import UserError
from tmass_dist.evaluation.arrays import map_array
from tmass_dist.evaluation.search import FrameIndex
from tmass_dist.retrieval.gallery_checks import check_gallery, check_part, check_shapes

VERSION, NAME = 1, "gallery.json"
ARRAYS = ("frames", "times", "thumbnail_ends")
REMEDY = "remove the gallery and make it again with tmass index"


@dataclass(frozen=True)
class Video:
    """One video of a gallery."""

    row: int
    id: str
    path: str
    """Of its file; "" where only frames were packed."""
    seconds: float


class Part:
    """Some videos of a gallery: their arrays, memory-mapped, and their thumbnails.

    Args:
        directory: of the gallery.
        name: of the part.
        first: row of its first video.
    """

    def __init__(self, directory: Path, name: str, first: int) -> None:
        self.directory, self.name, self.first = directory, name, first
        path = directory / f"{name}.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            check_part(about)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); {REMEDY}") from error
        self.videos: list[dict[str, Any]] = about["videos"]
        self.failed: list[dict[str, Any]] = about["failed"]
        self.files: dict[str, dict[str, Any]] = about["files"]
        for file, expected in self.files.items():
            path = directory / file
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise UserError(f"{path} is missing or damaged; {REMEDY}")

    def __len__(self) -> int:
        return len(self.videos)

    def check_arrays(self, num_frames: int, width: int) -> None:
        """Check that the arrays fit the videos; see :func:`check_shapes`."""
        arrays = {"frames": self.frames, "times": self.times, "thumbnail_ends": self._ends}
        shapes = {what: (array.shape, array.dtype) for what, array in arrays.items()}
        try:
            check_shapes(shapes, len(self), num_frames, width, self.name)
        except UserError as error:
            raise UserError(f"{self.directory} is damaged: {error}; {REMEDY}") from error

    def _map(self, what: str) -> np.ndarray:
        return map_array(self.directory / f"{self.name}.{what}.npy")

    @cached_property
    def frames(self) -> np.ndarray:
        """Embeddings ``(V, F, D)``, float16, memory-mapped."""
        return np.asarray(
            self._map("frames")
        )  # a plain array: numpy.memmap takes several times as long for each access

    def read_frames(self, numbers: Sequence[int], out_VFD: np.ndarray) -> None:
        """Read the frames of some videos into ``out_VFD``.

        By calls of the system, and not through the memory map: that takes half the time, since no pages are mapped, and
        a server that has answered many queries does not count all frames as its own memory.

        Raises:
            UserError: the file has gone since the gallery was opened.
        """
        path, bytes_of_file = self._frames_file
        size = out_VFD[0].nbytes
        start = bytes_of_file - len(self) * size  # after the header
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            for number, out_FD in zip(numbers, out_VFD):
                if os.preadv(file, [out_FD], start + number * size) != size:
                    raise UserError(f"{path} is missing or damaged; {REMEDY}")
        finally:
            os.close(file)

    @cached_property
    def _frames_file(self) -> tuple[str, int]:
        """Path and size of the file of the frames, kept since a search reads from many parts."""
        name = f"{self.name}.frames.npy"
        return str(self.directory / name), self.files[name]["bytes"]

    @cached_property
    def times(self) -> np.ndarray:
        """Seconds of each frame ``(V, F)``, memory-mapped."""
        return self._map("times")

    @cached_property
    def _thumbnails(self) -> np.ndarray:
        path = self.directory / f"{self.name}.jpegs"
        try:
            return np.memmap(path, np.uint8, mode="r")
        except OSError as error:
            raise _unreadable(path, error) from error

    @cached_property
    def _ends(self) -> np.ndarray:
        return self._map("thumbnail_ends")

    def thumbnail(self, number: int, frame: int) -> bytes:
        """JPEG of a frame of the part's video ``number``.

        Raises:
            UserError: the file has gone since the gallery was opened.
        """
        at = number * self.times.shape[1] + frame
        return self._thumbnails[int(self._ends[at - 1]) if at else 0 : int(self._ends[at])].tobytes()

    def damaged(self) -> list[str]:
        """Names of files whose checksum is wrong."""
        return [name for name, expected in self.files.items() if sha256_of(self.directory / name) != expected["sha256"]]


class VideoGallery:
    """A gallery that is searched.

    Args:
        directory: as ``tmass index`` wrote it.

    Raises:
        UserError: there is no gallery, it is damaged, or a newer version wrote it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.about = read_gallery(self.directory)
        self.num_frames, self.width = int(self.about["num_frames"]), int(self.about["width"])
        self.fingerprint, self.model = str(self.about["fingerprint"]), str(self.about["model"])
        self.removed = set(self.about["removed"])
        self.parts: list[Part] = []
        rows = 0
        for name in self.about["parts"]:
            self.parts.append(Part(self.directory, name, rows))
            self.parts[-1].check_arrays(self.num_frames, self.width)
            rows += len(self.parts[-1])
        self.num_rows = rows
        self._starts = np.array([part.first for part in self.parts], np.int64)
        self._removed_rows = np.array(sorted(self.removed), np.int64)
        self.rows: dict[str, int] = {
            video["id"]: part.first + number
            for part in self.parts
            for number, video in enumerate(part.videos)
            if part.first + number not in self.removed
        }
        """Row of each video, by id; removed ones are not there."""
        if len(self.rows) + len(self.removed) != rows or any(row >= rows for row in self.removed):
            path = self.directory / NAME
            raise UserError(f"{path} is damaged (a video is there twice, or a removed one was not there); {REMEDY}")

    def __len__(self) -> int:
        return len(self.rows)

    def _part(self, row: int) -> tuple[Part, int]:
        if not 0 <= row < self.num_rows or row in self.removed:
            raise UserError(f"there is no video {row} in {self.directory}")
        part = self.parts[int(np.searchsorted(self._starts, row, side="right")) - 1]
        return part, row - part.first

    def video(self, row: int) -> Video:
        """What is known of a video.

        Raises:
            UserError: no such row, or it was removed.
        """
        part, number = self._part(row)
        about = part.videos[number]
        return Video(row, about["id"], about["path"], float(about["seconds"]))

    def half_frames(self, rows: Sequence[int]) -> Tensor:
        """Embeddings ``(V, F, D)`` of videos, float16, as they are stored.

        Raises:
            UserError: no such row, or it was removed.
        """
        row_V = np.asarray(rows, np.int64)
        wrong_V = (row_V < 0) | (row_V >= self.num_rows) | np.isin(row_V, self._removed_rows)
        if wrong_V.any():
            raise UserError(f"there is no video {row_V[wrong_V][0]} in {self.directory}")
        part_V = np.searchsorted(self._starts, row_V, side="right") - 1
        frames_VFD = np.empty((len(row_V), self.num_frames, self.width), np.float16)
        # One file after the other, each for all neighbouring rows that are in it.
        ends = [*(np.flatnonzero(np.diff(part_V)) + 1).tolist(), len(row_V)] if len(row_V) else []
        for start, end in zip([0, *ends], ends):
            part = self.parts[int(part_V[start])]
            part.read_frames((row_V[start:end] - part.first).tolist(), frames_VFD[start:end])
        return torch.from_numpy(frames_VFD)

    def frames(self, rows: Sequence[int]) -> Tensor:
        """Embeddings ``(V, F, D)`` of videos, float32; see :meth:`half_frames`."""
        return self.half_frames(rows).float()

    def times(self, row: int) -> np.ndarray:
        """Seconds of a video's frames."""
        part, number = self._part(row)
        return np.asarray(part.times[number])

    def thumbnail(self, row: int, frame: int) -> bytes:
        """JPEG of a frame.

        Raises:
            UserError: no such video or frame, or the file has gone.
        """
        part, number = self._part(row)
        if not 0 <= frame < self.num_frames:
            raise UserError(f"there is no frame {frame}; the videos have {self.num_frames}")
        return part.thumbnail(number, frame)

    @cached_property
    def index(self) -> FrameIndex:
        """The index of the frames, memory-mapped."""
        path = self.directory / self.about["index"]["file"]
        if not path.is_file() or path.stat().st_size != self.about["index"]["bytes"]:
            raise UserError(f"{path} is missing or damaged; {REMEDY}")
        return FrameIndex(self.num_frames, self.width, path, writable=False)

    def damaged(self) -> list[str]:
        """Names of files whose checksum is wrong; it reads them all."""
        names = [name for part in self.parts for name in part.damaged()]
        index = self.about["index"]
        return names + ([index["file"]] if sha256_of(self.directory / index["file"]) != index["sha256"] else [])


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error}); was the gallery changed? Open it again")


def read_gallery(directory: Path) -> dict[str, Any]:
    """The content of ``gallery.json``.

    Raises:
        UserError: there is none, it is damaged, or a newer version wrote it.
    """
    path = directory / NAME
    if not path.is_file():
        raise UserError(f"there is no gallery in {directory}; make one with tmass index")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        newer = about["version"] > VERSION
        if not newer:
            check_gallery(about)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from error
    if newer:
        raise UserError(f"{path} was written by a newer version ({about['version']}); this one reads {VERSION}")
    return about


def write_gallery(directory: Path, about: dict[str, Any]) -> None:
    """Replace ``gallery.json``; what it names must be complete."""
    write_json(directory / NAME, {"version": VERSION, **about})
