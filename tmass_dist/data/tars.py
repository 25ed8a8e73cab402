"""Samples inside a tar file: which bytes hold each one, and the members that such a range of bytes holds."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tmass_dist.errors import UserError

BLOCK = 512
"""Tar files consist of blocks of so many bytes."""
MAX_HEADER = 2**14
"""Most bytes of an extended header (a long name, pax records); writers use a few thousand. The time in which
``tarfile`` reads one grows with the square of its size."""
MAX_SAMPLE = 2**30
"""Most bytes of a sample; it is read whole."""


@dataclass(frozen=True)
class TarSample:
    """Consecutive members that share a WebDataset key; ``size`` includes the members' headers and padding."""

    key: str
    suffixes: tuple[str, ...]
    """The members' names after the key, in the order of the file."""
    offset: int
    size: int
    crc32: int
    """Of the ``size`` bytes from ``offset``."""


@dataclass(frozen=True)
class TarContent:
    """A whole tar file."""

    bytes: int
    sha256: str
    samples: list[TarSample]


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's key and suffix of a member: its name up to the first dot of its last part, and the rest in lower
    case. Both are empty if the name has no suffix, or is reserved (``__...__``)."""
    directory, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    if not stem or not dot or (name.startswith("__") and name.endswith("__")):
        return "", ""
    return f"{directory}{slash}{stem}", suffix.lower()


def scan_tar(path: Path, visit: Callable[[TarSample, bytes], None] | None = None) -> TarContent:
    """Read a tar file once and say where each of its samples lies.

    Keys are WebDataset's, see :func:`split_name`. Directories and names without a key belong to no sample.

    Args:
        path: of the file.
        visit: called with each sample and its bytes, in the order of the file.

    Raises:
        UserError: it is no tar file, is compressed, is cut off, has a header that is not valid, or a sample has
            the same suffix twice or more than ``MAX_SAMPLE`` bytes.
    """
    with path.open("rb") as file:
        ranges = _sample_ranges(path, file)
        digest, samples, position = hashlib.sha256(), [], 0
        for key, suffixes, start, end in ranges:
            raw = os.pread(file.fileno(), end - start, start)
            if len(raw) < end - start:
                raise UserError(f"{path} is not a whole, uncompressed tar file: its end is missing")
            samples.append(TarSample(key, tuple(suffixes), start, end - start, zlib.crc32(raw)))
            _update(digest, file, position, start)
            digest.update(raw)
            position = end
            if visit is not None:
                visit(samples[-1], raw)
        size = os.fstat(file.fileno()).st_size
        _update(digest, file, position, size)
        return TarContent(size, digest.hexdigest(), samples)


def _sample_ranges(path: Path, file: BinaryIO) -> list[tuple[str, list[str], int, int]]:
    """Key, suffixes, first byte and the byte behind the last one of each sample; only headers are read."""
    ranges: list[tuple[str, list[str], int, int]] = []
    end_of_members = 0
    try:
        for tar, member in _members(file):
            end_of_members = tar.offset
            key, suffix = split_name(member.name) if member.isfile() else ("", "")
            if not key:
                continue
            start, end, suffixes = member.offset, member.offset_data + -(-member.size // BLOCK) * BLOCK, [suffix]
            if ranges and ranges[-1][0] == key:
                _, others, start, _ = ranges.pop()
                if suffix in others:
                    raise UserError(f"{path}: the member {member.name!r} occurs twice")
                suffixes = [*others, suffix]
            if end - start > MAX_SAMPLE:
                raise UserError(f"{path}: the sample {key!r} has more than {MAX_SAMPLE // 2**20} MiB")
            ranges.append((key, suffixes, start, end))
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole, uncompressed tar file: {error}") from error
    file.seek(end_of_members)
    if file.read(BLOCK) != bytes(BLOCK):
        raise UserError(f"{path} is not a whole, uncompressed tar file: its end is missing")
    return ranges


class _Bounded:
    """A file for ``tarfile``, which trusts the numbers in headers: it would allocate or seek as far as they say."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, file.seek(0, os.SEEK_END)
        self.tell = file.tell
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if not 0 <= position <= self._size:
            raise tarfile.ReadError("unexpected end of data")
        return self._file.seek(position)


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Each member of a tar file, with the ``tarfile`` that reads it.

    Raises:
        tarfile.TarError: the bytes are no tar file, whatever they are.
    """
    try:
        bounded: Any = _Bounded(file)
        with tarfile.open(fileobj=bounded, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.issparse():
                    raise tarfile.ReadError(f"the member {member.name!r} is sparse or has a negative size")
                yield tar, member
    except (ValueError, EOFError, OverflowError, RecursionError, LookupError) as error:
        raise tarfile.ReadError(str(error)) from error


def _update(digest: Any, file: BinaryIO, start: int, end: int) -> None:
    """Add the bytes from ``start`` to ``end`` to a checksum."""
    while start < end:
        raw = os.pread(file.fileno(), min(end - start, 2**20), start)
        if not raw:
            return
        digest.update(raw)
        start += len(raw)


def plain_members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of regular files with plain USTAR headers, as our packing writes them.

    ``tarfile`` takes longer to read these headers than simplejpeg takes to decode the frames.

    Raises:
        UserError: another kind of header, or less than a whole member.
    """
    at = 0
    while at < len(raw):
        header = raw[at : at + BLOCK]
        size = int(header[124:135], 8)
        if header[156:157] not in (b"0", b"\0") or at + BLOCK + size > len(raw):
            raise UserError(f"no whole file at byte {at}")
        yield header[:100].rstrip(b"\0").decode(), raw[at + BLOCK : at + BLOCK + size]
        at += BLOCK + -(-size // BLOCK) * BLOCK


def any_members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files in a range of any tar file (GNU and pax headers included).

    Raises:
        UserError: the bytes are no tar members.
    """
    try:
        for _, member in _members(io.BytesIO(raw)):
            end = member.offset_data + member.size
            if end > len(raw):
                raise tarfile.ReadError("unexpected end of data")
            if member.isfile():
                yield member.name, raw[member.offset_data : end]
    except tarfile.TarError as error:
        raise UserError(f"its bytes are no tar members: {error}") from error
