"""The index of a split: the position of every sample in its tar shard, so that one seek and one read fetch a sample.

The index is stored as columns, not objects: a million samples load quickly, and worker processes share the memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tmass_dist.cli import is_utf8, replacing
from tmass_dist.data.index_checks import COLUMNS, ID_COLUMNS, check_columns, check_header, checksum
from tmass_dist.data.json_lines import read_json_lines
from tmass_dist.data.remote import RETRY_S, fetch, is_remote
from tmass_dist.errors import UserError

VERSION, NAME = 3, "index.safetensors"
"""Version 3 has a checksum; version 2 is the same without."""


class NoCaptionsError(UserError):
    """A file of captions has none for a split."""


@dataclass(frozen=True)
class Sample:
    """One video with its captions. ``offset`` and ``size`` (bytes) span all its tar members, headers included."""

    id: str
    shard: int
    num_captions: int
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    bytes: int
    sha256: str
    directory: str = ""
    """Directory or URL that holds the file; empty if it lies beside the index."""


@dataclass(frozen=True)
class Index:
    """The samples of a split directory.

    ``columns`` holds numpy arrays with one row for each sample: those of ``COLUMNS``, and ``id_end``, where each
    sample's id ends in ``id_bytes``, the UTF-8 bytes of all ids.
    """

    directory: str
    split: str
    num_frames: int
    """JPEG frames of each sample; 0 if the number varies, or if the clips themselves are stored."""
    image_size: int
    """Side of the square frames, pixels."""
    store: str
    """``jpeg`` or ``clip``."""
    shards: tuple[Shard, ...]
    columns: dict[str, np.ndarray]
    cache: str | None = None
    """Local directory for the shards of a split behind a URL."""
    retry_s: float = RETRY_S
    """Seconds for which a download that fails is tried again."""
    caption_keys: tuple[str, ...] = ()
    """For tar files of other programs: where a sample has its captions, see :mod:`tmass_dist.data.foreign`. Empty for
    shards that this project packed."""
    wait_for_shard: Callable[[int], Path] | None = None
    """Gives the path of a downloaded shard, where a process of its own downloads them; see data/fetcher.py."""
    extra_captions: dict[str, list[str]] = field(default_factory=dict)
    """Captions in addition to the packed ones, by id; see :meth:`with_captions`."""

    def __len__(self) -> int:
        return len(self.columns["size"])

    @property
    def num_captions(self) -> np.ndarray:
        """Number of captions of each sample, int32."""
        return self.columns["num_captions"]

    def id_of(self, number: int) -> str:
        """The id of sample ``number``, which counts from 0."""
        ends = self.columns["id_end"]
        return self.columns["id_bytes"][ends[number - 1] if number else 0 : ends[number]].tobytes().decode()

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all samples, by number."""
        return [self.id_of(number) for number in range(len(self))]

    def locate(self, number: int) -> tuple[Index, int]:
        """The split that holds a sample, and the sample's number there: this split, unless it is a mixture."""
        return self, number

    def part_of(self, number: int) -> int:
        """The part that holds a sample: 0, unless this is a mixture."""
        return 0

    def sample(self, number: int) -> Sample:
        return Sample(self.id_of(number), *(int(self.columns[name][number]) for name in COLUMNS))

    @property
    def is_remote(self) -> bool:
        """Whether shards are behind a URL."""
        return is_remote(self.directory) or any(is_remote(shard.directory) for shard in self.shards)

    def path(self, sample: Sample, *, verify: bool = False) -> Path:
        """The local path of the sample's shard, which is downloaded first if it is behind a URL.

        Args:
            sample: a sample of this index.
            verify: compare a downloaded shard with its checksum, and download it again if it is damaged.

        Raises:
            UserError: the store has no such shard, or another file.
            DownloadError: the download failed for ``retry_s`` seconds.
        """
        if self.wait_for_shard is not None and not verify:
            return self.wait_for_shard(sample.shard)
        return self.shard_path(self.shards[sample.shard], verify=verify)

    def shard_path(self, shard: Shard, *, verify: bool = False) -> Path:
        """The local path of a shard; otherwise as :meth:`path`."""
        directory = shard.directory or self.directory
        if not is_remote(directory):
            return Path(directory) / shard.name
        url = f"{directory}/{shard.name}"
        return fetch(url, self.cache, shard.bytes, shard.sha256, retry_s=self.retry_s, verify=verify)

    def with_captions(self, path: str | Path) -> Index:
        """The same samples, with the captions of a file appended to their own.

        Args:
            path: JSON lines with ``id`` and ``captions``, as ``shards/caption_videos.py`` writes them. A path that
                does not exist is looked for in the split's directory.

        Raises:
            UserError: no such file, or an invalid line.
            NoCaptionsError: no line has an id of this split.
        """
        file = next((p for p in (Path(path), Path(self.directory) / path) if p.is_file()), None)
        if file is None:
            raise UserError(f"no file of captions {path}, neither as given nor in {self.directory}")
        number_of = {sample_id: number for number, sample_id in enumerate(self.ids)}
        captions = {sample_id: list(texts) for sample_id, texts in self.extra_captions.items()}
        num_captions, num_matched = self.num_captions.copy(), 0
        for line_number, entry in read_json_lines(file):
            sample_id, texts = entry.get("id"), entry.get("captions")
            if not isinstance(sample_id, str) or not isinstance(texts, list):
                raise UserError(f"{file} line {line_number} has no id (a string) with captions (a list of strings)")
            if wrong := [text for text in texts if not isinstance(text, str) or not is_utf8(text)]:
                raise UserError(f"{file} line {line_number}: the caption {wrong[0]!r} is not a text")
            if sample_id in number_of:
                captions.setdefault(sample_id, []).extend(texts)
                num_captions[number_of[sample_id]] += len(texts)
                num_matched += 1
        if not num_matched:
            raise NoCaptionsError(f"{file} has no caption for any video of {self.directory}")
        return replace(self, extra_captions=captions, columns=self.columns | {"num_captions": num_captions})

    def take(self, numbers: Sequence[int] | np.ndarray) -> Index:
        """An index of these samples only, in this order, over the same shards."""
        ids = [self.id_of(int(number)) for number in numbers]
        columns = {name: self.columns[name][np.asarray(numbers, dtype=np.int64)] for name in COLUMNS}
        return replace(self, columns=columns | _id_columns(ids))

    def hold_out(self, number: int) -> tuple[Index, Index]:
        """Split off ``number`` samples, chosen by their ids alone, so every run chooses the same ones.

        Returns:
            The remaining samples and the samples that were split off, each in the order of this index.

        Raises:
            UserError: no sample would remain.
        """
        if number >= len(self):
            raise UserError(f"data.holdout is {number} and {self.directory} has {len(self)} videos")
        hashes = [hashlib.sha256(sample_id.encode()).hexdigest() for sample_id in self.ids]
        by_hash = sorted(range(len(self)), key=hashes.__getitem__)
        return self.take(sorted(by_hash[number:])), self.take(sorted(by_hash[:number]))

    def save(self) -> None:
        """Write the index into its directory: a temporary file, then renamed."""
        from safetensors.numpy import save_file

        header = {name: getattr(self, name) for name in ("split", "num_frames", "image_size", "store")}
        shards = [asdict(shard) for shard in self.shards]
        for shard in shards:
            if not shard["directory"]:
                del shard["directory"]
        header |= {"version": VERSION, "shards": shards}
        if self.caption_keys:
            header["caption_keys"] = self.caption_keys
        text = json.dumps(header, ensure_ascii=False)
        # The checksum is a column: safetensors writes several entries of metadata in a different order each time.
        digest = np.frombuffer(checksum(text, self.columns).encode(), np.uint8)
        with replacing(Path(self.directory) / NAME) as temporary:
            save_file(self.columns | {"sha256": digest}, temporary, metadata={"index": text})


def make_columns(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """The columns of an index of these samples, in this order."""
    columns = {name: np.array([getattr(s, name) for s in samples], dtype=kind) for name, kind in COLUMNS.items()}
    return columns | _id_columns([sample.id for sample in samples])


def _id_columns(ids: list[str]) -> dict[str, np.ndarray]:
    encoded = [sample_id.encode() for sample_id in ids]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return {"id_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8), "id_end": ends}


def load_index(
    directory: str | Path, cache: str | None = None, retry_s: float = RETRY_S, *, check_shards: bool = True
) -> Index:
    """Read the index of a split, and check that every local shard exists and has the right size.

    Args:
        directory: the split's directory; or a URL that fsspec opens (``https://``, ``s3://`` ...), whose shards are
            downloaded when they are needed.
        cache: local directory for the shards of a URL.
        retry_s: seconds for which a download that fails is tried again.
        check_shards: False if another process of the node checks the sizes of the shards.

    Raises:
        UserError: one line that says what is missing or damaged, and what is there.
        DownloadError: a download failed for ``retry_s`` seconds.
    """
    directory = str(directory).rstrip("/")
    url = f"{directory}/{NAME}"
    path = fetch(url, cache, retry_s=retry_s) if is_remote(directory) else Path(directory) / NAME
    if not path.is_file():
        raise UserError(_no_index(Path(directory)))
    header, columns = _read_index(path)
    shards = tuple(Shard(**shard) for shard in header["shards"])
    settings = (header["split"], header["num_frames"], header["image_size"], header["store"])
    keys = tuple(header.get("caption_keys", ()))
    if not is_remote(directory):
        if check_shards:
            _check_shards(Path(directory), shards)
    elif local := [shard.directory for shard in shards if shard.directory and not is_remote(shard.directory)]:
        raise UserError(f"{url} names shards in {local[0]}, which may be read from a local index only")
    return Index(directory, *settings, shards, columns, cache, retry_s, caption_keys=keys)


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and columns of an index file, checked.

    Raises:
        UserError: the file is damaged, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            header: dict[str, Any] = json.loads(metadata["index"])
            columns = {name: file.get_tensor(name) for name in COLUMNS | ID_COLUMNS}
            digest = file.get_tensor("sha256").tobytes() if "sha256" in file.keys() else b""  # noqa: SIM118
        version = header["version"]
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {_RENEW}") from error
    if type(version) is int and version > VERSION:
        raise UserError(f"{path} was written by a newer version ({version}); this one reads {VERSION}")
    try:
        has_checksum = version != 2 or digest != b""
        if has_checksum and digest != checksum(metadata["index"], columns).encode():
            raise UserError("its content differs from its checksum")
        check_header(header)
        check_columns(columns, [shard["bytes"] for shard in header["shards"]])
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error}); {_RENEW}") from error
    if not has_checksum:
        _warn_old(path)
    return header, columns


_RENEW = "write it again by the command that packed the split (shards/make_shards.py): complete shards are kept"


@cache
def _warn_old(path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning("%s has no checksum: it is of an older version; %s", path, _RENEW)


def _no_index(directory: Path) -> str:
    if (directory / "index.json").is_file():
        return f"{directory} was packed by an older version; pack it again with shards/make_shards.py"
    nearest = next((parent for parent in (directory, *directory.parents) if parent.is_dir()), Path("."))
    names = sorted(entry.name for entry in nearest.iterdir() if not entry.name.startswith("."))
    content = ", ".join(names[:8]) or "nothing"
    return f"no shards in {directory}: {NAME} is missing; {nearest} holds {content}. Pack with shards/make_shards.py"


def _check_shards(directory: Path, shards: tuple[Shard, ...]) -> None:
    places = {shard.directory for shard in shards if not is_remote(shard.directory)}
    for place in places:
        local = Path(place) if place else directory
        sizes: dict[str, int] = {}
        if local.is_dir():
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(local) if entry.name.endswith(".tar")}
        for shard in (shard for shard in shards if shard.directory == place):
            if shard.name not in sizes:
                content = ", ".join(sorted(sizes)[:8]) or "no tar"
                raise UserError(f"shard {local / shard.name} is missing; {local} holds {content}")
            if sizes[shard.name] != shard.bytes:
                raise UserError(
                    f"shard {local / shard.name} has {sizes[shard.name]} bytes and its index says {shard.bytes}; "
                    + ("index it again" if place else "pack it again")
                )
