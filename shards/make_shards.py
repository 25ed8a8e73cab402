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
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shards.sources import SOURCES, Row, read_rows  # noqa: E402
from tmass_dist.cli import program, run_command, share_of, writable_dir, write_json  # noqa: E402
from tmass_dist.data.index import NAME as INDEX  # noqa: E402
from tmass_dist.data.index import Index, Sample, Shard, make_columns  # noqa: E402
from tmass_dist.data.remote import sha256_of  # noqa: E402
from tmass_dist.data.samples import safe_key  # noqa: E402
from tmass_dist.data.video import BadVideoError, Choose, Timeline, at_rate, read_video, uniform  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402


@dataclass(frozen=True)
class Recipe:
    """How every video of a split is packed."""

    num_frames: int = 12
    rate: float | None = None
    """Frames a second, in place of a number of frames."""
    image_size: int = 224
    quality: int = 90
    store: str = "jpeg"
    """``jpeg``, or ``clip`` to keep the file itself."""

    def frames_of(self, row: Row) -> Choose:
        window = (row.get("start"), row.get("end"))
        return uniform(self.num_frames, *window) if self.rate is None else at_rate(self.rate, *window)


def pack_video(path: Path, row: Row, recipe: Recipe) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
    """Members (name after the key, content) of one video, and what was decoded.

    Raises:
        BadVideoError: it cannot be packed; the message is the reason.
    """
    import simplejpeg

    if recipe.store == "clip":
        # Decoded once to know that it decodes, and between which frames training may choose.
        edges: list[int] = []

        def whole(timeline: Timeline) -> list[int]:
            start, end = (int(edge) for edge in timeline.window(row.get("start"), row.get("end")))
            if end <= start:
                raise UserError("the video has no frame there")
            edges[:] = start, end
            return [start]

        _, facts = read_video(path, whole, recipe.image_size, row.get("end"))
        suffix = re.sub(r"[^a-z0-9]", "", path.suffix.lower()) or "mp4"
        del facts["frame_indices"]
        return [(suffix, path.read_bytes())], facts | {"frame_window": edges}
    frames, facts = read_video(path, recipe.frames_of(row), recipe.image_size, row.get("end"))
    jpegs = (simplejpeg.encode_jpeg(frame, quality=recipe.quality, colorspace="RGBX") for frame in frames)
    return [(f"{number:03d}.jpg", jpeg) for number, jpeg in enumerate(jpegs)], facts


def _pack(job: tuple[Row, Path, Recipe]) -> tuple[Row, list[tuple[str, bytes]] | None, Any]:
    """One row in a worker: its members and facts, or None and the reason."""
    row, videos, recipe = job
    try:
        return row, *pack_video(videos / row["path"], row, recipe)
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
        self.file = self.aside.open("w+b")
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.samples: list[Sample] = []

    def add(self, row: Row, members: list[tuple[str, bytes]], facts: dict[str, Any]) -> None:
        key, start = safe_key(row["id"]), self.tar.offset
        further = {name: value for name, value in row.items() if name not in ("id", "path", "captions")}
        meta = {"id": row["id"], "captions": row["captions"], "source": row["path"], "fields": further, **facts}
        self._member(f"{key}.json", json.dumps(meta, ensure_ascii=False).encode())
        for name, content in members:
            self._member(f"{key}.{name}", content)
        self.file.flush()
        size = self.tar.offset - start
        crc32 = zlib.crc32(os.pread(self.file.fileno(), size, start))
        self.samples.append(Sample(row["id"], 0, len(row["captions"]), start, size, crc32))

    def _member(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)  # time, owner and group stay zero
        header.size = len(content)
        self.tar.addfile(header, io.BytesIO(content))

    def close(self) -> tuple[Shard, list[Sample]]:
        self.tar.close()
        self.file.close()
        os.replace(self.aside, self.path)
        return Shard(self.path.name, self.path.stat().st_size, sha256_of(self.path)), self.samples


def make_shards(
    rows: list[Row],
    videos: Path,
    out: Path,
    recipe: Recipe,
    arguments: argparse.Namespace,
    part: tuple[int, int] = (0, 1),
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
        recipe: how a video is packed.
        arguments: of the command line: split, shard_size, workers, max_bad.
        part: pack shards ``part[0]``, ``part[0] + part[1]``, ... only; ``(0, 1)`` is all of them.
    """
    from tqdm import tqdm

    records = writable_dir(out / "parts")
    if part == (0, 1):  # no index, no split: a stopped packing is not taken for a whole one
        (out / INDEX).unlink(missing_ok=True)
    chunks = [rows[start : start + arguments.shard_size] for start in range(0, len(rows), arguments.shard_size)]
    states = [_state(chunk, videos, recipe) for chunk in chunks]
    pending = [k for k in range(part[0], len(chunks), part[1]) if _read_record(records, out, k, states[k]) is None]
    jobs = [(row, videos, recipe) for k in pending for row in chunks[k]]
    done = _packed(jobs, arguments.workers)
    results = iter(tqdm(done, total=len(jobs), desc=f"pack {arguments.split}", unit="video"))
    for k in pending:
        writer = _ShardWriter(out / _shard_name(k))
        bad: list[dict[str, str]] = []
        for _ in chunks[k]:
            row, members, facts = next(results)
            if members is None:
                bad.append({"id": row["id"], "path": row["path"], "reason": facts})
            else:
                writer.add(row, members, facts)
        shard, samples = writer.close()
        record = {"of": states[k], "shard": asdict(shard), "samples": [asdict(s) for s in samples], "bad": bad}
        write_json(records / f"{_shard_name(k)}.json", record)
    if part != (0, 1):
        print(f"{out}: part {part[0]}/{part[1]} is done, {len(pending)} shards")
        return
    found = [record for k in range(len(chunks)) if (record := _read_record(records, out, k, states[k]))]
    bad = [entry for _, _, entries in found for entry in entries]
    found = [record for record in found if record[1]]
    shards = tuple(shard for shard, _, _ in found)
    samples = [replace(sample, shard=k) for k, (_, packed, _) in enumerate(found) for sample in packed]
    for stale in set(out.glob("shard-*.tar*")) - {out / shard.name for shard in shards}:
        stale.unlink()
    (out / "quarantine.jsonl").write_text("".join(json.dumps(b) + "\n" for b in bad), encoding="utf-8")
    num_frames = recipe.num_frames if recipe.rate is None and recipe.store == "jpeg" else 0
    columns = make_columns(samples)
    Index(str(out), arguments.split, num_frames, recipe.image_size, recipe.store, shards, columns).save()
    num_captions = int(columns["num_captions"].sum())
    print(
        f"{out}: {len(rows) - len(bad)} videos, {num_captions} captions, {len(shards)} shards, {len(bad)} in quarantine"
    )
    if len(bad) > arguments.max_bad * len(rows):
        raise UserError(
            f"{len(bad)} of {len(rows)} videos are in {out / 'quarantine.jsonl'}, more than --max-bad; "
            f"the first: {bad[0]['path']}: {bad[0]['reason']}"
        )


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _state(rows: list[Row], videos: Path, recipe: Recipe) -> str:
    """Of what a shard is made: its rows, the size and time of each file, and the settings."""

    def state(path: Path) -> tuple[int, int] | None:
        return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None

    content = [[row, state(videos / row["path"])] for row in rows]
    return hashlib.sha256(json.dumps([content, asdict(recipe)], sort_keys=True).encode()).hexdigest()


def _read_record(
    records: Path, out: Path, number: int, state: str
) -> tuple[Shard, list[Sample], list[dict[str, str]]] | None:
    """A finished shard, its samples and its quarantine, or None if it must be packed (again)."""
    try:
        record = json.loads((records / f"{_shard_name(number)}.json").read_text(encoding="utf-8"))
        shard, samples = Shard(**record["shard"]), [Sample(**sample) for sample in record["samples"]]
        whole = (out / shard.name).stat().st_size == shard.bytes
        return (shard, samples, record["bad"]) if whole and record["of"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python shards/make_shards.py"), description=__doc__)
    parser.add_argument("--source", choices=sorted(SOURCES), required=True)
    parser.add_argument("--annotations", type=Path, help="the data set's own files; a folder may bring its captions")
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--split", required=True, help="train, val, test; of MSR-VTT also train-7k")
    parser.add_argument("--out", type=Path, required=True)
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--num-frames", type=int, default=12, help="frames of a video, uniform over it (default 12)")
    frames.add_argument("--rate", type=float, metavar="FPS", help="frames a second, in place of a number")
    parser.add_argument("--image-size", type=int, default=224, help="side of the square frames, pixels")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality")
    parser.add_argument(
        "--store",
        choices=("jpeg", "clip", "mp4"),
        default="jpeg",
        help="frames, or the video file itself (mp4: the same)",
    )
    parser.add_argument("--shard-size", type=int, default=256, help="videos in a shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", metavar="I/N", help="only every N-th shard from the I-th; without it: the rest")
    parser.add_argument("--max-bad", type=_share, default=0.01, help="share of broken videos that is still a success")
    arguments = parser.parse_args()
    for name in ("num_frames", "image_size", "shard_size", "workers"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.rate is not None and arguments.rate <= 0:
        raise UserError("--rate must be above 0 frames a second")
    if not arguments.videos.is_dir():
        raise UserError(f"no directory {arguments.videos}")
    rows, counts = read_rows(arguments.source, arguments.annotations, arguments.videos, arguments.split)
    print(counts)
    store = "jpeg" if arguments.store == "jpeg" else "clip"
    recipe = Recipe(arguments.num_frames, arguments.rate, arguments.image_size, arguments.quality, store)
    part = share_of(arguments.part, "--part") if arguments.part else (0, 1)
    make_shards(rows, arguments.videos, arguments.out, recipe, arguments, part)


if __name__ == "__main__":
    run_command(main)
