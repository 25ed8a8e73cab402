"""Index WebDataset tar files that other programs wrote, so that training reads them where they are.

``python shards/index_shards.py 'DIRECTORY-or-URL/{00000..00099}.tar' --out data/mine/train`` reads each file once and
copies nothing. A sample is a clip (mp4, webm, mkv, avi, mov, mpg ...) or numbered frames (KEY.000.jpg ...), with its
caption in KEY.txt, or under keys of KEY.json: ``--captions caption,alt``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shards.foreign_tars import (  # noqa: E402
    ForeignTar,
    common_kind,
    expand,
    name_samples,
    parse_caption_keys,
    read_tar,
)
from tmass_dist.cli import program, run_command, writable_dir  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402


@dataclass(frozen=True)
class IndexSettings:
    """How foreign tar files are indexed."""

    split: str
    """Name of the split."""
    caption_keys: tuple[str, ...] = ("txt",)
    """Where a sample's captions are."""
    image_size: int = 224
    """Side of the square frames that training decodes, pixels."""
    cache: str | None = None
    """Where downloaded files are kept."""
    workers: int = 1
    """Files that are read at a time."""
    max_bad: float = 0.01
    """Largest share of samples, and of files, that may be left out."""


def index_shards(names: Sequence[str], out: Path, settings: IndexSettings) -> None:
    """Write the index of tar files, and list samples and files that cannot be used in ``quarantine.jsonl``.

    Args:
        names: paths and URLs, in order.
        out: the directory of the index.
        settings: of the index.

    Raises:
        UserError: nothing can be used, or more is left out than ``settings.max_bad`` allows.
    """
    from tqdm import tqdm

    writable_dir(out)
    read = partial(read_tar, caption_keys=settings.caption_keys, cache=settings.cache)
    with ThreadPoolExecutor(settings.workers) as pool:
        # Captions are counted here and read again in training.
        results = (_without_texts(tar) for tar in pool.map(read, names))
        tars = list(tqdm(results, total=len(names), desc="index", unit="tar"))
    kind = common_kind(tars)
    left_out = _write_index(tars, kind, out, settings)
    num_samples = sum(len(tar.samples) for tar in tars)
    num_damaged = sum(bool(tar.damage) for tar in tars)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in left_out)
    (out / "quarantine.jsonl").write_text(lines, encoding="utf-8", errors="replace")
    first = f"the first: {left_out[0]['path']}: {left_out[0]['reason']}" if left_out else ""
    if num_damaged > settings.max_bad * len(tars) or len(left_out) - num_damaged > settings.max_bad * num_samples:
        raise UserError(
            f"{num_damaged} of {len(tars)} files and {len(left_out) - num_damaged} of {num_samples} samples are left "
            f"out, see {out / 'quarantine.jsonl'}, more than --max-bad; {first}"
        )


def _without_texts(tar: ForeignTar) -> ForeignTar:
    """The same with empty captions in place of texts: millions of texts would take gigabytes."""
    samples = [replace(sample, captions=[""] * len(sample.captions)) for sample in tar.samples]
    return replace(tar, samples=samples)


def _write_index(tars: list[ForeignTar], kind: str, out: Path, settings: IndexSettings) -> list[dict[str, str]]:
    """Write the index of all samples of a kind; returns an entry for everything that is left out."""
    import numpy as np

    from tmass_dist.data.index import Index, Sample, Shard, make_columns

    left_out: list[dict[str, str]] = []
    shards: list[Shard] = []
    parts: list[dict[str, np.ndarray]] = []
    for tar, ids in zip(tars, name_samples(tars)):
        path = f"{tar.directory}/{tar.name}"
        if tar.damage:
            left_out.append({"id": tar.stem, "path": path, "reason": tar.damage})
        samples = []
        for sample, sample_id in zip(tar.samples, ids):
            if sample.kind == kind:
                place = sample.place
                number = len(sample.captions)
                samples.append(Sample(sample_id, len(shards), number, place.offset, place.size, place.crc32))
            else:
                reason = sample.reason or f"it holds a {sample.kind}, and most samples a {kind}"
                left_out.append({"id": sample_id, "path": path, "reason": reason})
        if samples:
            shards.append(Shard(tar.name, tar.bytes, tar.sha256, tar.directory))
            parts.append(make_columns(samples))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths = [len(part["id_bytes"]) for part in parts]
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), [len(part["id_end"]) for part in parts])
    columns["id_end"] = columns["id_end"] + starts
    store = "clip" if kind == "clip" else "jpeg"
    keys = settings.caption_keys
    index = Index(str(out), settings.split, 0, settings.image_size, store, tuple(shards), columns, caption_keys=keys)
    index.save()
    num_captions = int(index.num_captions.sum())
    what = "clips" if kind == "clip" else "videos of numbered frames"
    print(f"{out}: {len(index)} {what}, {num_captions} captions, {len(shards)} tar files, {len(left_out)} left out")
    return left_out


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python shards/index_shards.py"), description=__doc__)
    parser.add_argument("tars", nargs="+", metavar="TAR", help="paths or URLs, with braces: 'data/{00000..00099}.tar'")
    parser.add_argument("--out", type=Path, required=True, help="the directory of the index")
    parser.add_argument("--split", help="name of the split (default: that of the directory)")
    parser.add_argument("--captions", default="txt", metavar="KEYS", help="txt, or keys of the json, with commas (txt)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the frames in training, pixels (224)")
    parser.add_argument("--cache", help="keep downloads of URLs here; name the same directory as data.cache")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="files read at a time")
    parser.add_argument("--max-bad", type=float, default=0.01, help="largest share that may be left out (0.01)")
    arguments = parser.parse_args()
    from tmass_dist.data.index_checks import MAX_IMAGE_SIZE

    keys = parse_caption_keys(arguments.captions)
    if not 1 <= arguments.image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"--image-size must be from 1 to {MAX_IMAGE_SIZE}")
    if arguments.workers < 1 or not 0 <= arguments.max_bad <= 1:
        raise UserError("--workers must be at least 1, and --max-bad a share from 0 to 1")
    names = expand(arguments.tars)
    if arguments.cache and not any("://" in name for name in names):
        raise UserError("--cache applies to URLs only")
    split = arguments.split or arguments.out.resolve().name
    settings = IndexSettings(split, keys, arguments.image_size, arguments.cache, arguments.workers, arguments.max_bad)
    index_shards(names, arguments.out, settings)


if __name__ == "__main__":
    run_command(main)
