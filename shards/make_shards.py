"""Pack videos and captions into WebDataset tar shards with an index.

``python shards/make_shards.py --source manifest --annotations manifest.jsonl --videos DIR --split train --out DIR``
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import run_command, share_of, writable_dir, write_json  # noqa: E402
from tmass_dist.data.index import Index, Sample, Shard, sha256_of  # noqa: E402


def safe_key(video_id: str) -> str:
    """A WebDataset key: no dot or slash, since the library cuts a name at its first dot; two ids never share one."""
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", video_id)
    return clean if clean == video_id else f"{clean}-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"


def read_manifest(path: Path, split: str) -> list[dict[str, Any]]:
    """Rows ``id, path, captions, split`` (and ``start``, ``end`` in seconds) of a JSON-lines file.

    Raises:
        ValueError: the line that is wrong, or a split that has no row.
    """
    if not path.is_file():
        raise ValueError(f"no annotations {path}")
    rows, splits, seen = [], set(), set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = {"id", "path", "captions", "split"} - set(row)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if missing:
            raise ValueError(f"{path} line {number} lacks {', '.join(sorted(missing))}")
        if not isinstance(row["captions"], list) or not row["captions"]:
            raise ValueError(f"{path} line {number}: captions must be a list with at least one text")
        splits.add(row["split"])
        if row["split"] == split:
            if row["id"] in seen:
                raise ValueError(f"{path} line {number}: the id {row['id']!r} is there twice")
            seen.add(row["id"])
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no row of split {split!r}; it has {', '.join(sorted(splits)) or 'none'}")
    return rows


def read_folder(videos: Path, split: str) -> list[dict[str, Any]]:
    """A directory of videos with ``captions.jsonl`` or ``.csv`` (``file``, ``caption``), or same-name ``.txt``."""
    import csv

    captions: dict[str, list[str]] = {}
    if (videos / "captions.jsonl").is_file():
        lines = (videos / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [(row["file"], row["caption"]) for row in map(json.loads, filter(str.strip, lines))]
    elif (videos / "captions.csv").is_file():
        with (videos / "captions.csv").open(encoding="utf-8", newline="") as file:
            pairs = [(row["file"], row["caption"]) for row in csv.DictReader(file)]
    else:
        texts = {text.stem: text.read_text(encoding="utf-8").strip() for text in sorted(videos.glob("*.txt"))}
        pairs = [(v.name, texts[v.stem]) for v in sorted(videos.iterdir()) if v.suffix != ".txt" and v.stem in texts]
    for name, text in pairs:
        captions.setdefault(name, []).append(text)
    if not captions:
        raise ValueError(f"{videos} has no captions.jsonl, no captions.csv and no same-name .txt")
    return [{"id": Path(n).stem, "path": n, "captions": c, "split": split} for n, c in captions.items()]


def _pack(job: tuple[dict[str, Any], Path, int, int, int]) -> tuple[dict[str, Any], list[bytes] | None, Any]:
    """One row in a worker: its frames and facts, or None and the reason."""
    from shards.video import BadVideoError, pack_video

    row, videos, num_frames, image_size, quality = job
    try:
        jpegs, facts = pack_video(
            videos / row["path"], num_frames, image_size, quality, row.get("start"), row.get("end")
        )
        return row, jpegs, facts
    except BadVideoError as error:
        return row, None, str(error)
    except Exception as error:
        return row, None, f"{type(error).__name__}: {error}"


def _packed(jobs: list[Any], workers: int) -> Iterator[Any]:
    if workers <= 1:
        yield from map(_pack, jobs)
        return
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_pack, jobs, chunksize=4)


class _ShardWriter:
    """One tar, written aside; the same samples give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.aside = path, path.with_name(path.name + ".tmp")
        self.file = self.aside.open("wb")
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.samples: list[Sample] = []

    def add(self, row: dict[str, Any], jpegs: list[bytes], facts: dict[str, Any]) -> None:
        key, start = safe_key(row["id"]), self.tar.offset
        meta = {"id": row["id"], "captions": row["captions"], "source": row["path"], **facts}
        self._member(f"{key}.json", json.dumps(meta, ensure_ascii=False).encode())
        for number, jpeg in enumerate(jpegs):
            self._member(f"{key}.{number:03d}.jpg", jpeg)
        self.samples.append(Sample(key, row["id"], len(row["captions"]), start, self.tar.offset - start))

    def _member(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)  # time, owner and group stay zero
        header.size = len(content)
        self.tar.addfile(header, io.BytesIO(content))

    def close(self) -> Shard:
        self.tar.close()
        self.file.close()
        os.replace(self.aside, self.path)
        return Shard(self.path.name, self.path.stat().st_size, sha256_of(self.path), tuple(self.samples))


def make_shards(
    rows: list[dict[str, Any]], videos: Path, out: Path, arguments: argparse.Namespace, part: tuple[int, int] = (0, 1)
) -> None:
    """Pack every row, or list it in ``quarantine.jsonl`` with its reason.

    Shard ``k`` holds rows ``k * shard_size`` to ``(k + 1) * shard_size``, less those that are broken, and leaves a
    record in ``parts/`` once it is whole. What has a record of the same rows and settings is not packed again: after
    a kill, only the shard in hand is lost. Any number of tasks can each take a part; the index is written when all
    records are there.

    Args:
        rows: of the split, in order.
        videos: the directory that rows' paths start from.
        out: of the shards.
        arguments: of the command line.
        part: pack shards ``part[0]``, ``part[0] + part[1]``, ... only; ``(0, 1)`` is all of them.
    """
    from tqdm import tqdm

    records = writable_dir(out / "parts")
    if part == (0, 1):
        (out / "index.json").unlink(
            missing_ok=True
        )  # no index, no split: a stopped packing is not taken for a whole one
    settings = (arguments.num_frames, arguments.image_size, arguments.quality)
    chunks = [rows[start : start + arguments.shard_size] for start in range(0, len(rows), arguments.shard_size)]
    recipes = [_recipe(chunk, videos, settings) for chunk in chunks]
    pending = [k for k in range(part[0], len(chunks), part[1]) if _read_record(records, out, k, recipes[k]) is None]
    jobs = [(row, videos, *settings) for k in pending for row in chunks[k]]
    results = iter(
        tqdm(_packed(jobs, arguments.workers), total=len(jobs), desc=f"pack {arguments.split}", unit="video")
    )
    for k in pending:
        writer = _ShardWriter(out / _shard_name(k))
        bad: list[dict[str, str]] = []
        for _ in chunks[k]:
            row, jpegs, facts = next(results)
            if jpegs is None:
                bad.append({"id": row["id"], "path": row["path"], "reason": facts})
            else:
                writer.add(row, jpegs, facts)
        record = {"recipe": recipes[k], "shard": asdict(writer.close()), "bad": bad}
        write_json(records / f"{_shard_name(k)}.json", record)
    if part != (0, 1):
        print(f"{out}: part {part[0]}/{part[1]} is done, {len(pending)} shards")
        return
    found = [_read_record(records, out, k, recipes[k]) for k in range(len(chunks))]
    shards = tuple(shard for shard, _ in filter(None, found) if shard.samples)
    bad = [entry for _, entries in filter(None, found) for entry in entries]
    for stale in set(out.glob("shard-*.tar*")) - {out / shard.name for shard in shards}:
        stale.unlink()
    (out / "quarantine.jsonl").write_text("".join(json.dumps(b) + "\n" for b in bad), encoding="utf-8")
    Index(out, arguments.split, arguments.num_frames, arguments.image_size, shards).save()
    num_captions = sum(sample.num_captions for shard in shards for sample in shard.samples)
    print(
        f"{out}: {len(rows) - len(bad)} videos, {num_captions} captions, {len(shards)} shards, {len(bad)} in quarantine"
    )
    if len(bad) > arguments.max_bad * len(rows):
        raise ValueError(
            f"{len(bad)} of {len(rows)} videos are in {out / 'quarantine.jsonl'}, more than --max-bad; "
            f"the first: {bad[0]['path']}: {bad[0]['reason']}"
        )


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _recipe(rows: list[dict[str, Any]], videos: Path, settings: tuple[int, ...]) -> str:
    """Of what a shard is made: its rows, the size and time of each file, and the settings."""

    def state(path: Path) -> tuple[int, int] | None:
        return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None

    content = json.dumps([[row, state(videos / row["path"])] for row in rows] + [list(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_record(records: Path, out: Path, number: int, recipe: str) -> tuple[Shard, list[dict[str, str]]] | None:
    """A finished shard and its quarantine, or None if it must be packed (again)."""
    try:
        record = json.loads((records / f"{_shard_name(number)}.json").read_text(encoding="utf-8"))
        shard = Shard(**record["shard"] | {"samples": tuple(Sample(**s) for s in record["shard"]["samples"])})
        whole = (out / shard.name).stat().st_size == shard.bytes
        return (shard, record["bad"]) if whole and record["recipe"] == recipe else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python shards/make_shards.py", description=__doc__)
    parser.add_argument("--source", choices=("manifest", "folder"), required=True)
    parser.add_argument("--annotations", type=Path, help="the manifest; a folder brings its own captions")
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-frames", type=int, default=12)
    parser.add_argument("--image-size", type=int, default=224, help="side of the square frames, pixels")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality")
    parser.add_argument("--shard-size", type=int, default=256, help="videos in a shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", metavar="I/N", help="only every N-th shard from the I-th; without it: the rest")
    parser.add_argument("--max-bad", type=_share, default=0.01, help="share of broken videos that is still a success")
    arguments = parser.parse_args()
    if not arguments.videos.is_dir():
        raise ValueError(f"no directory {arguments.videos}")
    if arguments.source == "manifest":
        if arguments.annotations is None:
            raise ValueError("--source manifest needs --annotations FILE")
        rows = read_manifest(arguments.annotations, arguments.split)
    else:
        rows = read_folder(arguments.videos, arguments.split)
    part = share_of(arguments.part, "--part") if arguments.part else (0, 1)
    make_shards(rows, arguments.videos, arguments.out, arguments, part)


if __name__ == "__main__":
    run_command(main)
