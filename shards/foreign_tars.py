"""WebDataset tar files that other programs wrote: which samples they hold, and what is wrong with the others."""

from __future__ import annotations

import glob
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards.own_videos import Row
from tmass_dist.data.foreign import captions_of, kind_of, members_of
from tmass_dist.data.mixture import part_names
from tmass_dist.data.remote import fetch, is_remote
from tmass_dist.data.tars import TarSample, scan_tar
from tmass_dist.errors import UserError


@dataclass(frozen=True)
class ForeignSample:
    """A sample of one tar file, with what is needed to pack or to index it."""

    key: str
    place: TarSample
    kind: str
    """``clip`` or ``jpeg``; empty if it cannot be used."""
    captions: list[str]
    reason: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True)
class ForeignTar:
    """One tar file; without samples if it is damaged."""

    name: str
    directory: str
    """The directory or the URL that holds it."""
    bytes: int
    sha256: str
    samples: list[ForeignSample]
    damage: str = ""

    @property
    def stem(self) -> str:
        """Its name without ``.tar``."""
        return self.name.removesuffix(".tar")


def parse_caption_keys(text: str) -> tuple[str, ...]:
    """The names of ``--captions``, which have commas between them.

    Raises:
        UserError: a name is empty or occurs twice.
    """
    keys = tuple(key.strip() for key in text.split(","))
    if not all(keys) or len(set(keys)) < len(keys):
        raise UserError(f"--captions {text} must be different names with commas between them")
    return keys


def expand(patterns: Sequence[str]) -> list[str]:
    """Paths and URLs of tar files, in order: braces as in ``{00000..00099}.tar``, and for paths ``*`` and ``?``.

    Raises:
        UserError: a file does not exist, is named twice, or is no ``.tar``.
    """
    import braceexpand

    names: list[str] = []
    for pattern in patterns:
        try:
            expanded = list(braceexpand.braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"the braces of {pattern} do not match: {error}") from error
        for name in expanded:
            if not is_remote(name) and any(character in name for character in "*?"):
                found = sorted(glob.glob(name))
                if not found:
                    raise UserError(f"no file matches {name}")
                names += found
            else:
                names.append(name)
    for name in names:
        if not name.endswith(".tar"):
            raise UserError(
                f"{name} is no .tar; compressed tar files must be decompressed, since samples are read alone"
            )
        if not is_remote(name) and not Path(name).is_file():
            raise UserError(f"{name} does not exist")
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is named twice")
    return names


def read_tar(name: str, caption_keys: Sequence[str], cache: str | None = None) -> ForeignTar:
    """Read a tar file once.

    Args:
        name: a path, or a URL, which is downloaded to ``cache`` or to a temporary directory.
        caption_keys: where a sample's captions are; see :mod:`tmass_dist.data.foreign`.
        cache: local directory that keeps the download.

    Raises:
        UserError: a URL does not exist.
        DownloadError: it could not be downloaded.
    """
    samples: list[ForeignSample] = []
    keys: set[str] = set()

    def visit(place: TarSample, raw: bytes) -> None:
        samples.append(_read_sample(place, raw, caption_keys, is_repeated=place.key in keys))
        keys.add(place.key)

    directory, _, last = name.rpartition("/") if is_remote(name) else (str(Path(name).resolve().parent), "", "")
    last = last or Path(name).name
    with _local(name, cache) as path:
        try:
            content = scan_tar(path, visit)
        except UserError as error:
            damage = str(error).replace(str(path), name)
            return ForeignTar(last, directory, 0, "", [], damage)
    return ForeignTar(last, directory, content.bytes, content.sha256, samples)


@contextmanager
def _local(name: str, cache: str | None) -> Iterator[Path]:
    if not is_remote(name):
        yield Path(name)
    elif cache is not None:
        yield fetch(name, cache, _size_of(name))
    else:
        with tempfile.TemporaryDirectory() as directory:
            yield fetch(name, directory, _size_of(name))


def _size_of(url: str) -> int | None:
    """The size that a store states for a file, or None if it states none."""
    import fsspec

    try:
        system, inside = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        return system.info(inside).get("size")
    except Exception:  # the download tells what is wrong, and is tried again
        return None


def _read_sample(place: TarSample, raw: bytes, caption_keys: Sequence[str], *, is_repeated: bool) -> ForeignSample:
    try:
        place.key.encode()
        if is_repeated:
            raise UserError("another sample of the file has the same key")
        kind = kind_of(place.suffixes)
        if kind is None:
            raise UserError(f"no clip and no numbered frames, only {', '.join(place.suffixes)}")
        captions = captions_of(members_of(raw, place.key), caption_keys)
        if not captions:
            raise UserError(f"no caption under {', '.join(caption_keys)}")
        return ForeignSample(place.key, place, kind, captions)
    except (ValueError, RecursionError) as error:
        key = place.key.encode(errors="replace").decode()
        return ForeignSample(key, place, "", [], str(error))


def name_samples(tars: Sequence[ForeignTar]) -> list[list[str]]:
    """The ids of the samples of each tar file: their keys, or ``TAR/KEY`` for all if a key occurs in several files.

    If files have the same name, ``TAR`` is the end of their paths that tells them apart: ``run1/00000``.
    """
    keys = Counter(sample.key for tar in tars for sample in tar.samples if sample.kind)
    if max(keys.values(), default=0) <= 1:
        return [[sample.key for sample in tar.samples] for tar in tars]
    stems = part_names([f"{tar.directory}/{tar.stem}" for tar in tars])
    return [[f"{stem}/{sample.key}" for sample in tar.samples] for stem, tar in zip(stems, tars)]


def common_kind(tars: Sequence[ForeignTar]) -> str:
    """What most samples store, ``clip`` or ``jpeg``.

    Raises:
        UserError: no sample can be used.
    """
    kinds = Counter(sample.kind for tar in tars for sample in tar.samples if sample.kind)
    if kinds:
        return kinds.most_common(1)[0][0]
    reasons = [f"{tar.name}: {tar.damage}" for tar in tars if tar.damage]
    reasons += [f"{tar.name}: {sample.key}: {sample.reason}" for tar in tars for sample in tar.samples]
    places = [f"{tar.directory}/{tar.name} is empty" for tar in tars]
    raise UserError(f"no sample of {len(tars)} tar files can be used; the first reason: {[*reasons, *places][0]}")


def read_rows_of_tars(pattern: str, caption_keys: Sequence[str]) -> tuple[list[Row], str]:
    """The samples of local tar files as rows to pack, and a line with their number.

    A row's ``path`` is its tar file; ``tar_range`` is offset, size and checksum of its bytes. A sample that cannot be
    used has the reason under ``unusable``.

    Raises:
        UserError: a file is behind a URL or damaged, or no sample can be used.
    """
    names = expand([pattern])
    if remote := [name for name in names if is_remote(name)]:
        raise UserError(f"{remote[0]} is a URL; download it first, or index it by shards/index_shards.py")
    tars = [read_tar(name, caption_keys) for name in names]
    if damaged := [tar.damage for tar in tars if tar.damage]:
        raise UserError(f"{len(damaged)} of {len(tars)} files are damaged: {'; '.join(damaged[:5])}")
    common_kind(tars)
    rows: list[Row] = []
    for tar, ids in zip(tars, name_samples(tars)):
        for sample, sample_id in zip(tar.samples, ids):
            place = [sample.place.offset, sample.place.size, sample.place.crc32]
            row = {"id": sample_id, "path": f"{tar.directory}/{tar.name}", "captions": sample.captions}
            rows.append(row | {"tar_range": place} | ({"unusable": sample.reason} if sample.reason else {}))
    ids = Counter(row["id"] for row in rows)
    for row in rows:
        if "unusable" in row and ids[row["id"]] > 1:
            row["id"] += f" at byte {row['tar_range'][0]}"
    num_captions = sum(len(row["captions"]) for row in rows)
    return rows, f"webdataset: {len(rows)} samples, {num_captions} captions in {len(tars)} tar files"
