"""Checks of an index that is read from disk or from a URL: its checksum, its columns, its header."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tmass_dist.errors import UserError

COLUMNS = {"shard": np.int32, "num_captions": np.int32, "offset": np.int64, "size": np.int64, "crc32": np.uint32}
"""One row for each sample."""
ID_COLUMNS = {"id_bytes": np.uint8, "id_end": np.int64}
"""``id_bytes`` holds the UTF-8 bytes of all ids; ``id_end`` has one row for each sample."""
MAX_IMAGE_SIZE, MAX_FRAMES, MAX_CAPTIONS = 4096, 4096, 100_000
"""Larger numbers are taken for damage: they would only allocate memory."""


def checksum(header: str, columns: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the header's JSON and every column: name, type and values."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(columns):
        digest.update(f"\n{name} {columns[name].dtype.str} {columns[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest()


def check_header(header: dict[str, Any]) -> None:
    """Types and ranges of the header's fields.

    Raises:
        UserError: the first field that is wrong.
    """
    _require(isinstance(header["split"], str), "its split is not a string")
    for key, smallest, largest in (("num_frames", 0, MAX_FRAMES), ("image_size", 1, MAX_IMAGE_SIZE)):
        value = header[key]
        _require(type(value) is int and smallest <= value <= largest, f"its {key} is {value!r}")
    _require(header["store"] in ("jpeg", "clip"), f"its store is {header['store']!r}")
    _require(isinstance(header["shards"], list), "its shards are not a list")
    for shard in header["shards"]:
        name, size = shard["name"], shard["bytes"]
        _require(isinstance(name, str) and bool(name.strip(".")), f"a shard's name is {name!r}")
        _require(not set(name) & set("/\\\0"), f"the shard name {name!r} is not a file name")
        _require(type(size) is int and 0 <= size < 2**62, f"the size of shard {name} is {size!r}")
        _require(isinstance(shard["sha256"], str), f"the checksum of shard {name} is not a string")
        place = shard.get("directory", "")
        _require(isinstance(place, str) and "\0" not in place, f"the directory of shard {name} is {place!r}")
    keys = header.get("caption_keys", [])
    _require(isinstance(keys, list) and all(isinstance(key, str) for key in keys), f"its caption_keys are {keys!r}")


def check_columns(columns: Mapping[str, np.ndarray], shard_bytes: list[int]) -> None:
    """Types, lengths and ranges of the columns: every sample must lie inside its shard.

    Args:
        columns: those of ``COLUMNS`` and ``ID_COLUMNS``.
        shard_bytes: size of each shard.

    Raises:
        UserError: the first column that is wrong, with the number of its first wrong sample.
    """
    for name, kind in (COLUMNS | ID_COLUMNS).items():
        column = columns[name]
        _require(column.dtype == kind and column.ndim == 1, f"column {name} is {column.dtype} {column.shape}")
    lengths = {name: len(columns[name]) for name in (*COLUMNS, "id_end")}
    _require(len(set(lengths.values())) == 1, f"its columns have different lengths: {lengths}")
    shard, size, offset, captions = (columns[name] for name in ("shard", "size", "offset", "num_captions"))
    _require_all((shard >= 0) & (shard < len(shard_bytes)), "shard", shard)
    limit = np.array(shard_bytes, np.int64)[shard]
    _require_all((size > 0) & (size <= limit), "size", size)
    _require_all((offset >= 0) & (offset <= limit - size), "offset", offset)
    # A caption takes at least two bytes of the sample's JSON.
    _require_all((captions >= 0) & (captions <= np.minimum(size, MAX_CAPTIONS)), "num_captions", captions)
    _check_ids(columns["id_bytes"], columns["id_end"])


def _check_ids(id_bytes: np.ndarray, id_end: np.ndarray) -> None:
    if not len(id_end):
        _require(not len(id_bytes), "it has bytes of ids and no sample")
        return
    _require_all(np.diff(id_end, prepend=0) > 0, "id_end", id_end)
    _require(int(id_end[-1]) == len(id_bytes), f"its ids end at byte {id_end[-1]} of {len(id_bytes)}")
    starts = id_bytes[id_end[:-1]]
    _require_all(np.append(False, starts & 0xC0 == 0x80) == 0, "id_end", id_end)  # an id ends inside a character
    try:
        id_bytes.tobytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"its ids are not UTF-8 at byte {error.start}") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_all(valid: np.ndarray, name: str, column: np.ndarray) -> None:
    if not valid.all():
        number = int(valid.argmin())
        raise UserError(f"column {name} is {column[number]} at sample {number}, which is out of range")
