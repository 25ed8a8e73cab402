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
        UserError: it is no tar file, is compressed, is cut off, or a sample has the same suffix twice.
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
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, suffix = split_name(member.name) if member.isfile() else ("", "")
                if not key:
                    continue
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if not ranges or ranges[-1][0] != key:
                    ranges.append((key, [suffix], member.offset, end))
                    continue
                _, suffixes, start, _ = ranges[-1]
                if suffix in suffixes:
                    raise UserError(f"{path}: the member {member.name!r} occurs twice")
                ranges[-1] = (key, [*suffixes, suffix], start, end)
            end_of_members = tar.offset
    except (tarfile.TarError, EOFError, UnicodeError, OverflowError) as error:
        raise UserError(f"{path} is not a whole, uncompressed tar file: {error}") from error
    file.seek(end_of_members)
    if file.read(BLOCK) != bytes(BLOCK):
        raise UserError(f"{path} is not a whole, uncompressed tar file: its end is missing")
    return ranges


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
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, UnicodeError, OverflowError) as error:
        raise UserError(f"its bytes are no tar members: {error}") from error
