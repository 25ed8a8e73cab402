"""The index of a split: where every sample lies in its tar shard, so that one seek and one read fetch it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One video with its captions; ``offset`` and ``size`` are the bytes of all its tar members."""

    key: str
    id: str
    num_captions: int
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """One tar and what it holds."""

    name: str
    bytes: int
    sha256: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Index:
    """A split directory."""

    directory: Path
    split: str
    num_frames: int
    image_size: int
    shards: tuple[Shard, ...]

    @property
    def located(self) -> list[tuple[Path, Sample]]:
        """Every sample with its shard's path, in order."""
        return [(self.directory / shard.name, sample) for shard in self.shards for sample in shard.samples]

    @property
    def samples(self) -> list[Sample]:
        """Every sample, in order; its position is its number."""
        return [sample for shard in self.shards for sample in shard.samples]

    def subset(self, ids: set[str]) -> Index:
        """The same shards with these samples only."""
        shards = (replace(s, samples=tuple(x for x in s.samples if x.id in ids)) for s in self.shards)
        return replace(self, shards=tuple(shards))

    def hold_out(self, number: int) -> tuple[Index, Index]:
        """What is left, and ``number`` samples chosen by their ids alone: the same ones in every run.

        Raises:
            ValueError: it would leave nothing to train on.
        """
        ids = sorted((hashlib.sha256(sample.id.encode()).hexdigest(), sample.id) for sample in self.samples)
        if number >= len(ids):
            raise ValueError(f"data.holdout is {number} and {self.directory} has {len(ids)} videos")
        held = {sample_id for _, sample_id in ids[:number]}
        return self.subset({sample_id for _, sample_id in ids} - held), self.subset(held)

    def save(self) -> None:
        """Write ``index.json`` aside and rename it."""
        content = {
            "version": VERSION,
            "split": self.split,
            "num_frames": self.num_frames,
            "image_size": self.image_size,
        }
        aside = self.directory / "index.json.tmp"
        aside.write_text(json.dumps(content | {"shards": [asdict(s) for s in self.shards]}, indent=1), encoding="utf-8")
        os.replace(aside, self.directory / "index.json")


def load_index(directory: str | Path) -> Index:
    """Read the index and check that every shard is there, whole.

    Raises:
        ValueError: in one line, what is missing and what is there instead.
    """
    directory = Path(directory)
    path = directory / "index.json"
    if not path.is_file():
        nearest = next((parent for parent in (directory, *directory.parents) if parent.is_dir()), Path("."))
        there = ", ".join(sorted(entry.name for entry in nearest.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"no shards in {directory}: index.json is missing; {nearest} holds {there}. Pack with shards/make_shards.py"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] > VERSION:
            raise ValueError(f"{path} was written by a newer version ({content['version']}); this one reads {VERSION}")
        shards = tuple(
            Shard(s["name"], s["bytes"], s["sha256"], tuple(Sample(**sample) for sample in s["samples"]))
            for s in content["shards"]
        )
        index = Index(directory, content["split"], content["num_frames"], content["image_size"], shards)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); pack the split again with shards/make_shards.py") from error
    for shard in shards:
        file = directory / shard.name
        if not file.is_file():
            there = ", ".join(sorted(tar.name for tar in directory.glob("*.tar"))[:8]) or "no tar"
            raise ValueError(f"shard {file} is missing; {directory} holds {there}")
        if file.stat().st_size != shard.bytes:
            raise ValueError(
                f"shard {file} has {file.stat().st_size} bytes and its index says {shard.bytes}; pack it again"
            )
    return index


def read_sample(path: Path, sample: Sample) -> tuple[dict, list[bytes]]:
    """The JSON of a sample and its JPEG frames, in time order.

    Raises:
        ValueError: the shard is damaged there; it names the shard and the sample.
    """
    with path.open("rb") as shard:
        shard.seek(sample.offset)
        raw = shard.read(sample.size)
    try:
        members: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                members[member.name] = file.read() if file else b""
        meta = json.loads(members.pop(f"{sample.key}.json"))
        return meta, [members[name] for name in sorted(members)]
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise ValueError(f"shard {path} is damaged at sample {sample.id!r}: {error}") from error


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
