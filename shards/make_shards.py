"""Pack videos and captions into WebDataset tar shards with an index.

``python shards/make_shards.py --source manifest --annotations manifest.jsonl --videos DIR --split train --out DIR``
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shards.foreign_tars import parse_caption_keys, read_rows_of_tars  # noqa: E402
from shards.pack_pool import Job, Limits, Packed, pack_all  # noqa: E402
from shards.pack_video import Recipe  # noqa: E402
from shards.shard_writer import ShardWriter  # noqa: E402
from shards.sources import SOURCES, Row, read_rows  # noqa: E402
from tmass_dist.cli import program, run_command, share_of, writable_dir, write_json, write_text  # noqa: E402
from tmass_dist.data.index import NAME as INDEX  # noqa: E402
from tmass_dist.data.index import Index, Sample, Shard, make_columns  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402


@dataclass(frozen=True)
class PackSettings:
    """How a split is packed."""

    split: str
    """Its name, written to the index."""
    recipe: Recipe = field(default_factory=Recipe)
    """How each video is packed."""
    shard_size: int = 256
    """Videos in a shard."""
    workers: int = 1
    """Decoding processes."""
    limits: Limits = field(default_factory=Limits)
    """What a video may use before it is put into quarantine."""
    max_bad: float = 0.01
    """Largest share of videos in quarantine that is still a success."""
    part: tuple[int, int] = (0, 1)
    """Pack only shards ``part[0]``, ``part[0] + part[1]``, ...; ``(0, 1)`` is all of them, and writes the index."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        if not 0 <= self.max_bad <= 1:  # also not a number
            raise UserError(f"--max-bad must be a share from 0 to 1, or from 0% to 100%; it is {self.max_bad}")


@dataclass(frozen=True)
class _ShardRecord:
    """A finished shard, as kept in ``parts/``."""

    inputs: str
    """Checksum of the rows, files and settings that it was made from."""
    shard: Shard
    samples: list[Sample]
    bad: list[dict[str, Any]]
    """Its videos in quarantine."""


def make_shards(rows: list[Row], videos: Path, out: Path, settings: PackSettings) -> None:
    """Pack every row, or list it in ``quarantine.jsonl`` with its reason.

    Shard ``k`` holds rows ``k * shard_size`` to ``(k + 1) * shard_size``, without the bad ones. A finished shard
    leaves a record in ``parts/``. A shard with a record of the same rows, files and settings is not packed again:
    after a kill, only the unfinished shard is lost. Any number of tasks can each pack a part; the run that packs all
    parts writes the index.

    Args:
        rows: of the split, in order.
        videos: the directory that rows' paths start from.
        out: the directory of the shards.
        settings: of the packing.

    Raises:
        UserError: nothing was packed, or more videos are bad than ``settings.max_bad`` allows.
    """
    records = writable_dir(out / "parts")
    number, count = settings.part
    if settings.part == (0, 1):  # without an index, an interrupted packing is not taken for a finished one
        (out / INDEX).unlink(missing_ok=True)
    chunks = [rows[start : start + settings.shard_size] for start in range(0, len(rows), settings.shard_size)]
    inputs = [_checksum_of_inputs(chunk, videos, settings.recipe) for chunk in chunks]
    pending = []
    for k in range(number, len(chunks), count):
        record = _read_record(records, out, k, inputs[k])
        if record is None or any(entry["try_again"] for entry in record.bad):
            pending.append(k)
    _pack_chunks({k: chunks[k] for k in pending}, inputs, videos, out, settings)
    if settings.part != (0, 1):
        print(f"{out}: part {number}/{count} is done, {len(pending)} shards")
        return
    finished = [record for k in range(len(chunks)) if (record := _read_record(records, out, k, inputs[k]))]
    _write_index(finished, len(rows), out, settings)


def _pack_chunks(
    chunks: dict[int, list[Row]], inputs: list[str], videos: Path, out: Path, settings: PackSettings
) -> None:
    """Write the shard and the record of each numbered chunk of rows."""
    from tqdm import tqdm

    jobs = [Job(row, videos, settings.recipe) for chunk in chunks.values() for row in chunk]
    with closing(pack_all(jobs, settings.workers, settings.limits)) as packed:
        results = iter(tqdm(packed, total=len(jobs), desc=f"pack {settings.split}", unit="video"))
        for k, chunk in chunks.items():
            shard, samples, bad = _write_shard(out / _shard_name(k), islice(results, len(chunk)))
            write_json(out / "parts" / f"{_shard_name(k)}.json", asdict(_ShardRecord(inputs[k], shard, samples, bad)))


def _write_shard(path: Path, results: Iterable[Packed]) -> tuple[Shard, list[Sample], list[dict[str, Any]]]:
    """Write the good videos to one shard; returns it, its samples, and an entry for each bad video."""
    bad: list[dict[str, Any]] = []
    writer = ShardWriter(path)
    try:
        for result in results:
            if result.members is None or result.facts is None:
                entry = {"id": result.row["id"], "path": result.row["path"]}
                bad.append({**entry, "reason": result.reason, "try_again": result.try_again})
            else:
                writer.add(result.row, result.members, result.facts)
        return *writer.close(), bad
    except BaseException:
        writer.discard()
        raise


def _write_index(finished: list[_ShardRecord], num_rows: int, out: Path, settings: PackSettings) -> None:
    """Write the index and the quarantine of a split whose shards are all there, and say what was packed."""
    bad = [{key: entry[key] for key in ("id", "path", "reason")} for record in finished for entry in record.bad]
    filled = [record for record in finished if record.samples]
    shards = tuple(record.shard for record in filled)
    for stale in set(out.glob("shard-*.tar*")) - {out / shard.name for shard in shards}:
        stale.unlink()
    lines = "".join(json.dumps(entry) + "\n" for entry in bad)
    write_text(out / "quarantine.jsonl", lines)
    first = f"the first: {bad[0]['path']}: {bad[0]['reason']}" if bad else ""
    if not shards:
        raise UserError(f"none of {num_rows} videos could be packed; see {out / 'quarantine.jsonl'}; {first}")
    samples = [replace(sample, shard=k) for k, record in enumerate(filled) for sample in record.samples]
    recipe, columns = settings.recipe, make_columns(samples)
    num_frames = recipe.num_frames if recipe.rate is None and recipe.store == "jpeg" else 0
    Index(str(out), settings.split, num_frames, recipe.image_size, recipe.store, shards, columns).save()
    num_captions = int(columns["num_captions"].sum())
    print(f"{out}: {len(samples)} videos, {num_captions} captions, {len(shards)} shards, {len(bad)} in quarantine")
    if len(bad) > settings.max_bad * num_rows:
        raise UserError(
            f"{len(bad)} of {num_rows} videos are in {out / 'quarantine.jsonl'}, more than --max-bad; {first}"
        )


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _checksum_of_inputs(rows: list[Row], videos: Path, recipe: Recipe) -> str:
    """Checksum of what a shard is made from: its rows, the size and time of each file, and the recipe."""

    def file_state(path: Path) -> tuple[int, int] | None:
        return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None

    content = [[row, file_state(videos / row["path"])] for row in rows]
    return hashlib.sha256(json.dumps([content, asdict(recipe)], sort_keys=True).encode()).hexdigest()


def _read_record(records: Path, out: Path, number: int, inputs: str) -> _ShardRecord | None:
    """The record of a finished shard, or None where the shard must be packed."""
    try:
        content = json.loads((records / f"{_shard_name(number)}.json").read_text(encoding="utf-8"))
        shard, samples = Shard(**content["shard"]), [Sample(**sample) for sample in content["samples"]]
        bad = [{key: entry[key] for key in ("id", "path", "reason", "try_again")} for entry in content["bad"]]
        is_whole = (out / shard.name).stat().st_size == shard.bytes
        return _ShardRecord(inputs, shard, samples, bad) if is_whole and content["inputs"] == inputs else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _share(text: str) -> float:
    """A share, as ``0.01`` or ``1%``."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program("python shards/make_shards.py"), description=__doc__)
    parser.add_argument(
        "--source", choices=sorted([*SOURCES, "webdataset"]), required=True, help="the form of the annotations"
    )
    parser.add_argument("--annotations", type=Path, help="the data set's own files; not needed for a folder")
    parser.add_argument(
        "--videos",
        required=True,
        help="the directory of the videos; of webdataset: tar files, as 'data/{000..099}.tar'",
    )
    parser.add_argument("--captions", metavar="KEYS", help="of webdataset: txt, or keys of the json, with commas (txt)")
    parser.add_argument("--split", required=True, help="train, val, test; MSR-VTT also has train-7k")
    parser.add_argument("--out", type=Path, required=True, help="the directory of the shards")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--num-frames", type=int, default=12, help="frames of a video, uniform over it (default 12)")
    frames.add_argument("--rate", type=float, metavar="FPS", help="frames a second, in place of a number")
    parser.add_argument("--image-size", type=int, default=224, help="side of the square frames, pixels (224)")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality (90)")
    parser.add_argument(
        "--store",
        choices=("jpeg", "clip", "mp4"),
        default="jpeg",
        help="frames, or the video file itself (mp4 is another name of clip)",
    )
    parser.add_argument("--shard-size", type=int, default=256, help="videos in a shard (256)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes (one a core)")
    limits = Limits()
    parser.add_argument(
        "--time-limit-s",
        type=float,
        default=limits.seconds,
        help=f"seconds for one video, else it goes into quarantine ({limits.seconds:g})",
    )
    parser.add_argument(
        "--memory-limit-gb",
        type=float,
        default=limits.memory_gb,
        help=f"memory for one video, else it goes into quarantine ({limits.memory_gb:g})",
    )
    parser.add_argument("--allow-outside", action="store_true", help="rows may name files outside of --videos")
    parser.add_argument("--part", metavar="I/N", help="pack every N-th shard from the I-th, and write no index")
    parser.add_argument(
        "--max-bad", type=_share, default=0.01, help="largest share of bad videos that is still a success (1%%)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = _parse_arguments()
    recipe = Recipe(
        arguments.num_frames,
        arguments.rate,
        arguments.image_size,
        arguments.quality,
        "jpeg" if arguments.store == "jpeg" else "clip",
    )
    settings = PackSettings(
        arguments.split,
        recipe,
        shard_size=arguments.shard_size,
        workers=arguments.workers,
        limits=Limits(arguments.time_limit_s, arguments.memory_limit_gb),
        max_bad=arguments.max_bad,
        part=share_of(arguments.part, "--part") if arguments.part else (0, 1),
    )
    rows, counts = _read_rows(arguments)
    print(counts)
    make_shards(rows, Path(arguments.videos), arguments.out, settings)


def _read_rows(arguments: argparse.Namespace) -> tuple[list[Row], str]:
    """The rows that the command line names, and a line with their number."""
    if arguments.source == "webdataset":
        if arguments.annotations is not None or arguments.allow_outside:
            raise UserError("--annotations and --allow-outside do not apply to --source webdataset")
        return read_rows_of_tars(arguments.videos, parse_caption_keys(arguments.captions or "txt"))
    if arguments.captions is not None:
        raise UserError("--captions applies to --source webdataset only")
    videos = Path(arguments.videos)
    if not videos.is_dir():
        raise UserError(f"no directory {videos}")
    return read_rows(
        arguments.source, arguments.annotations, videos, arguments.split, allow_outside=arguments.allow_outside
    )


if __name__ == "__main__":
    run_command(main)
