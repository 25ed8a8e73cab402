"""The index of a split: where every sample lies in its tar shard, so that one seek and one read fetch it.

It is columns and not objects: a million samples are read in a moment, and loader processes share them without copies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tmass_dist.data.remote import fetch, is_remote
from tmass_dist.errors import UserError

VERSION, NAME = 2, "index.safetensors"
COLUMNS = {"shard": np.int32, "num_captions": np.int32, "offset": np.int64, "size": np.int64, "crc32": np.uint32}


class DamagedError(UserError):
    """A sample whose bytes are not those that were packed; it names the shard and the sample."""


@dataclass(frozen=True)
class Sample:
    """One video with its captions; ``offset`` and ``size`` are the bytes of all its tar members, headers included."""

    id: str
    shard: int
    num_captions: int
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class Shard:
    """One tar."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """A split directory.

    ``columns`` are numpy arrays, a row a sample: those of ``COLUMNS``, and ``id_bytes`` with ``id_end``, the UTF-8
    bytes of all ids and where each ends.
    """

    directory: str
    split: str
    num_frames: int
    """JPEG frames of a sample; 0 where they vary, or where the clips themselves are stored."""
    image_size: int
    store: str
    """``jpeg`` or ``clip``."""
    shards: tuple[Shard, ...]
    columns: dict[str, np.ndarray]
    cache: str | None = None
    """Where shards of a URL are kept."""
    further: dict[str, list[str]] = field(default_factory=dict)
    """Captions beside the packed ones, by id; see :meth:`with_captions`."""

    def __len__(self) -> int:
        return len(self.columns["size"])

    @property
    def num_captions(self) -> np.ndarray:
        """Captions of each sample, int32."""
        return self.columns["num_captions"]

    def id_of(self, number: int) -> str:
        ends = self.columns["id_end"]
        return self.columns["id_bytes"][ends[number - 1] if number else 0 : ends[number]].tobytes().decode()

    @cached_property
    def ids(self) -> list[str]:
        """Every sample's id, in order; its position is its number."""
        return [self.id_of(number) for number in range(len(self))]

    def sample(self, number: int) -> Sample:
        return Sample(self.id_of(number), *(int(self.columns[name][number]) for name in COLUMNS))

    def path(self, sample: Sample) -> Path:
        """The sample's shard on this machine; fetched first where the split is a URL."""
        shard = self.shards[sample.shard]
        if not is_remote(self.directory):
            return Path(self.directory) / shard.name
        return fetch(f"{self.directory}/{shard.name}", self.cache, shard.bytes, shard.sha256)

    def with_captions(self, path: str | Path) -> Index:
        """The same samples with further captions, after their own.

        Args:
            path: JSON lines with ``id`` and ``captions``, as ``shards/caption_videos.py`` writes them; below the
                split's directory if it is not found as given.

        Raises:
            UserError: no such file, a line that is wrong, or no id of this split in it.
        """
        file = next((p for p in (Path(path), Path(self.directory) / path) if p.is_file()), None)
        if file is None:
            raise UserError(f"no captions {path}, neither here nor in {self.directory}")
        known = {sample_id: number for number, sample_id in enumerate(self.ids)}
        further, counts = {key: list(texts) for key, texts in self.further.items()}, self.num_captions.copy()
        matched = 0
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                entry = json.loads(line)
                sample_id, texts = entry["id"], [str(text) for text in entry["captions"]]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{file} line {number} is not an object with id and captions: {error}") from error
            if sample_id in known:
                further.setdefault(sample_id, []).extend(texts)
                counts[known[sample_id]] += len(texts)
                matched += 1
        if not matched:
            raise UserError(f"{file} has no caption for any video of {self.directory}")
        return replace(self, further=further, columns=self.columns | {"num_captions": counts})

    def take(self, numbers: Sequence[int] | np.ndarray) -> Index:
        """The same shards with these samples only, in this order."""
        ids = [self.id_of(int(number)) for number in numbers]
        columns = {name: self.columns[name][np.asarray(numbers, dtype=np.int64)] for name in COLUMNS}
        return replace(self, columns=columns | _id_columns(ids))

    def hold_out(self, number: int) -> tuple[Index, Index]:
        """What is left, and ``number`` samples chosen by their ids alone: the same ones in every run.

        Raises:
            UserError: it would leave nothing to train on.
        """
        if number >= len(self):
            raise UserError(f"data.holdout is {number} and {self.directory} has {len(self)} videos")
        hashes = [hashlib.sha256(sample_id.encode()).hexdigest() for sample_id in self.ids]
        by_hash = sorted(range(len(self)), key=hashes.__getitem__)
        return self.take(sorted(by_hash[number:])), self.take(sorted(by_hash[:number]))

    def save(self) -> None:
        """Write it aside and rename it."""
        from safetensors.numpy import save_file

        about = {name: getattr(self, name) for name in ("split", "num_frames", "image_size", "store")}
        about |= {"version": VERSION, "shards": [asdict(shard) for shard in self.shards]}
        aside = Path(self.directory) / f"{NAME}.tmp"
        save_file(self.columns, aside, metadata={"index": json.dumps(about, ensure_ascii=False)})
        os.replace(aside, Path(self.directory) / NAME)


def make_columns(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """The columns of an index, from samples in order."""
    columns = {name: np.array([getattr(s, name) for s in samples], dtype=kind) for name, kind in COLUMNS.items()}
    return columns | _id_columns([sample.id for sample in samples])


def _id_columns(ids: list[str]) -> dict[str, np.ndarray]:
    encoded = [sample_id.encode() for sample_id in ids]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return {"id_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8), "id_end": ends}


def load_index(directory: str | Path, cache: str | None = None) -> Index:
    """Read the index and check that every shard is there, whole.

    Args:
        directory: of the split; or a URL that fsspec opens (``https://``, ``s3://`` ...), whose shards are fetched
            into ``cache`` when they are needed.
        cache: a local directory.

    Raises:
        UserError: in one line, what is missing and what is there instead.
    """
    from safetensors import SafetensorError, safe_open

    directory = str(directory).rstrip("/")
    path = fetch(f"{directory}/{NAME}", cache) if is_remote(directory) else Path(directory) / NAME
    if not path.is_file():
        raise UserError(_nothing_there(Path(directory)))
    try:
        with safe_open(path, framework="numpy") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["index"])
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["version"] > VERSION:
            raise UserError(f"{path} was written by a newer version ({about['version']}); this one reads {VERSION}")
        shards = tuple(Shard(**shard) for shard in about["shards"])
        settings = (about["split"], about["num_frames"], about["image_size"], about["store"])
        known = {name: columns[name] for name in (*COLUMNS, "id_bytes", "id_end")}
        index = Index(directory, *settings, shards, known, cache)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); pack the split again with shards/make_shards.py") from error
    if not is_remote(directory):
        _check_shards(Path(directory), shards)
    return index


def _nothing_there(directory: Path) -> str:
    if (directory / "index.json").is_file():
        return f"{directory} was packed by an older version; pack it again with shards/make_shards.py"
    nearest = next((parent for parent in (directory, *directory.parents) if parent.is_dir()), Path("."))
    there = ", ".join(sorted(entry.name for entry in nearest.iterdir())[:8]) or "nothing"
    return f"no shards in {directory}: {NAME} is missing; {nearest} holds {there}. Pack with shards/make_shards.py"


def _check_shards(directory: Path, shards: tuple[Shard, ...]) -> None:
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory) if entry.name.endswith(".tar")}
    for shard in shards:
        if shard.name not in sizes:
            there = ", ".join(sorted(sizes)[:8]) or "no tar"
            raise UserError(f"shard {directory / shard.name} is missing; {directory} holds {there}")
        if sizes[shard.name] != shard.bytes:
            raise UserError(
                f"shard {directory / shard.name} has {sizes[shard.name]} bytes and its index says {shard.bytes}; "
                "pack it again"
            )


def safe_key(video_id: str) -> str:
    """A WebDataset key: no dot or slash, since the library cuts a name at its first dot; two ids never share one."""
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", video_id)[:64]
    return clean if clean == video_id else f"{clean}-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"


def read_sample(index: Index, number: int) -> tuple[dict[str, Any], list[bytes]]:
    """The JSON of a sample, and its JPEG frames in time order, or its clip alone.

    Raises:
        DamagedError: the shard is damaged there.
    """
    sample = index.sample(number)
    path = index.path(sample)
    with path.open("rb") as shard:
        raw = os.pread(shard.fileno(), sample.size, sample.offset)
    try:
        if zlib.crc32(raw) != sample.crc32:
            raise UserError("its checksum differs from the index")
        (name, meta), *rest = _members(raw)
        key = safe_key(sample.id)
        if name != f"{key}.json" or not all(other.startswith(f"{key}.") for other, _ in rest):
            raise UserError(f"its members are {name} ...")
        about = json.loads(meta)
        about["captions"] += index.further.get(sample.id, [])
        return about, [content for _, content in rest]
    except ValueError as error:
        raise DamagedError(f"shard {path} is damaged at sample {sample.id!r}: {error}") from error


def _members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of regular files in a run of USTAR members; the library's reader takes longer than decoding."""
    at = 0
    while at < len(raw):
        header = raw[at : at + 512]
        size = int(header[124:135], 8)
        if header[156:157] not in (b"0", b"\0") or at + 512 + size > len(raw):
            raise UserError(f"no whole file at byte {at}")
        yield header[:100].rstrip(b"\0").decode(), raw[at + 512 : at + 512 + size]
        at += 512 + -(-size // 512) * 512
