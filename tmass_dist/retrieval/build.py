"""Make a gallery, or change one: encode videos on all ranks, in parts that a killed process does not lose."""

# Shapes: V videos, F frames, H W pixels, C colours, D embedding width.

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmass_dist.cli import write_json, writing
from tmass_dist.data.remote import sha256_of
from tmass_dist.data.video import read_video
from tmass_dist.distributed import all_gather_objects, barrier, is_main, rank, world_size
from tmass_dist.errors import UserError
from tmass_dist.evaluation.search import FrameIndex
from tmass_dist.retrieval.gallery import ARRAYS, NAME, Part, VideoGallery, write_gallery
from tmass_dist.retrieval.model import TMass
from tmass_dist.retrieval.videos import Batch, Source, read_batches

PART, THUMBNAIL = 256, 128
"""Videos of a part, and side of the thumbnails in pixels."""


@dataclass(frozen=True)
class Changes:
    """What a call of :func:`update` did."""

    added: int
    removed: int
    unchanged: int
    failed: list[tuple[str, str]]
    """Id and reason of every video that cannot be read."""


def update(
    model: TMass,
    source: str,
    out: Path,
    sources: Sequence[Source],
    *,
    remove: Sequence[str] = (),
    batch_size: int = 16,
) -> Changes:
    """Bring a gallery up to date: encode what is new or has changed, remove what is named. Every rank calls it.

    Args:
        model: encodes the videos.
        source: where the model was loaded from; search loads it from there again.
        out: directory of the gallery; made if it does not exist.
        sources: videos that shall be in it, beside those that are there already.
        remove: ids to remove.
        batch_size: videos encoded at a time.

    Raises:
        UserError: the gallery was made by another model, an id that is not there, or two videos with one id.
    """
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        return _update(model, source, out, sources, remove, batch_size)


def _update(
    model: TMass, source: str, out: Path, sources: Sequence[Source], remove: Sequence[str], batch_size: int
) -> Changes:
    fingerprint = model.fingerprint()
    old = VideoGallery(out) if (out / NAME).is_file() else None
    if old is not None and old.fingerprint != fingerprint:
        raise UserError(f"{out} was made by another model, {old.model}; give another --out, or remove the directory")
    rows = old.rows if old else {}
    unknown = [video_id for video_id in remove if video_id not in rows]
    if unknown:
        raise UserError(f"{len(unknown)} videos to remove are not in {out}: {', '.join(unknown[:3])}")
    ids = [item.id for item in sources]
    if len(set(ids)) < len(ids):
        twice = next(video_id for video_id in ids if ids.count(video_id) > 1)
        raise UserError(f"two videos have the id {twice}")
    known = {} if old is None else {video["id"]: video for part in old.parts for video in part.videos}
    bad = {} if old is None else {entry["id"]: entry for part in old.parts for entry in part.failed}
    failed = [(item.id, bad[item.id]["reason"]) for item in sources if _is_same(bad.get(item.id), item)]
    bad_ids = {video_id for video_id, _ in failed}
    unchanged = [item for item in sources if item.id in rows and _is_same(known[item.id], item)]
    skip = bad_ids | {item.id for item in unchanged}
    new = [item for item in sources if item.id not in skip]
    names = _encode_parts(model, fingerprint, old.num_rows if old else 0, out, new, batch_size)
    barrier()
    gone = {rows[item.id] for item in new if item.id in rows} | {rows[video_id] for video_id in remove}
    if is_main() and old is not None and not names and not gone:
        write_gallery(out, {**old.about, "model": source})  # the model may have moved
    elif is_main():
        commit(out, old, names, gone, fingerprint, source, (model.num_frames, model.embed_dim))
    barrier()
    parts = [Part(out, name, 0) for name in names]
    failed += [(entry["id"], entry["reason"]) for part in parts for entry in part.failed]
    return Changes(sum(map(len, parts)), len(remove), len(unchanged), failed)


def _is_same(entry: dict[str, Any] | None, source: Source) -> bool:
    """Whether a video of the gallery, or one that could not be read, has not changed since."""
    return entry is not None and entry["state"] == source.state()


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Let no other process change the gallery meanwhile; rank 0 holds the lock for all ranks.

    Raises:
        UserError: another process holds it.
    """
    import filelock

    lock = filelock.FileLock(out / ".lock")
    free = True
    if is_main():
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            free = False
    if not all(all_gather_objects(free)):
        raise UserError(f"another process is changing {out}; wait for its end")
    try:
        yield
    finally:
        if is_main():
            lock.release()


def _encode_parts(
    model: TMass, fingerprint: str, first: int, out: Path, sources: list[Source], batch_size: int
) -> list[str]:
    """Write the parts that are missing; ranks take them in turn. Returns the names of all."""
    from tqdm import tqdm

    names = []
    with tqdm(total=len(sources), desc="encode", unit="video", disable=not is_main()) as bar:
        for number, start in enumerate(range(0, len(sources), PART)):
            some = sources[start : start + PART]
            states = [item.state() for item in some]
            key = hashlib.sha256(json.dumps([fingerprint, first, states, THUMBNAIL]).encode()).hexdigest()[:16]
            names.append(f"part-{key}")
            if number % world_size() == rank() and not is_whole(out, names[-1]):
                _encode_part(model, out, names[-1], some, states, batch_size)
            bar.update(len(some))
    return names


def is_whole(out: Path, name: str) -> bool:
    """Whether a part was written to its end."""
    try:
        Part(out, name, 0)
        return True
    except UserError:
        return False


def _encode_part(model: TMass, out: Path, name: str, sources: list[Source], states: list[Any], batch_size: int) -> None:
    """Encode the videos of one part; its ``.json`` is written last."""
    state_of = {item.id: state for item, state in zip(sources, states)}
    videos, failed = [], []
    frames, times, jpegs = [], [], []
    for batch in read_batches(sources, model.num_frames, model.towers.image_size, batch_size):
        failed += [{"id": video_id, "reason": reason, "state": state_of[video_id]} for video_id, reason in batch.failed]
        if not batch.sources:
            continue
        frames.append(model.encode_frames(torch.from_numpy(batch.pixels_VFHWC)).half().cpu().numpy())
        times.append(batch.times_VF)
        jpegs += _thumbnails(batch)
        videos += [
            {"id": item.id, "path": item.path, "seconds": float(seconds), "state": state_of[item.id]}
            for item, seconds in zip(batch.sources, batch.seconds_V)
        ]
    shape = (0, model.num_frames, model.embed_dim)
    frames_VFD = np.concatenate(frames) if frames else np.empty(shape, np.float16)
    times_VF = np.concatenate(times) if times else np.empty(shape[:2], np.float32)
    write_part(out, name, videos, failed, frames_VFD, times_VF, jpegs)


def write_part(
    out: Path,
    name: str,
    videos: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    frames_VFD: np.ndarray,
    times_VF: np.ndarray,
    jpegs: list[bytes],
) -> None:
    """Write a part of a gallery.

    Args:
        out: directory of the gallery.
        name: of the part.
        videos: ``id``, ``path``, ``seconds`` and ``state`` of each video.
        failed: ``id``, ``reason`` and ``state`` of each video that cannot be read.
        frames_VFD: embeddings, float16.
        times_VF: seconds of each frame, float32.
        jpegs: V F thumbnails, those of a video together.
    """
    ends = np.cumsum([len(jpeg) for jpeg in jpegs], dtype=np.int64)
    arrays = {"frames": frames_VFD, "times": times_VF, "thumbnail_ends": ends}
    for what in ARRAYS:
        path = out / f"{name}.{what}.npy"
        with writing(path), path.open("wb") as file:
            np.save(file, arrays[what])
    path = out / f"{name}.jpegs"
    with writing(path):
        path.write_bytes(b"".join(jpegs) + b"\0")  # a byte more: an empty file cannot be memory-mapped
    files = [f"{name}.{what}.npy" for what in ARRAYS] + [f"{name}.jpegs"]
    sizes = {file: {"bytes": (out / file).stat().st_size, "sha256": sha256_of(out / file)} for file in files}
    write_json(out / f"{name}.json", {"videos": videos, "failed": failed, "files": sizes})


def _thumbnails(batch: Batch) -> list[bytes]:
    """A JPEG of every frame, in order."""
    import simplejpeg
    from PIL import Image

    out = []
    for item, pixels_FHWC, indices in zip(batch.sources, batch.pixels_VFHWC, batch.indices):
        side = pixels_FHWC.shape[1]
        if side < THUMBNAIL and item.path:  # the model sees less than a person wants to see
            pixels_FHWC = np.stack(read_video(Path(item.path), lambda _, i=indices: i, THUMBNAIL)[0])[..., :3]
        for frame in pixels_FHWC:
            if side > THUMBNAIL:
                frame = np.asarray(Image.fromarray(frame).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
            out.append(simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=80, colorspace="RGB"))
    return out


def commit(
    out: Path,
    old: VideoGallery | None,
    names: list[str],
    gone: set[int],
    fingerprint: str,
    source: str,
    shape: tuple[int, int],
    *,
    anew: bool = False,
) -> None:
    """Bring the index up to date and write ``gallery.json``, then remove the index that it replaces.

    Args:
        out: directory of the gallery.
        old: the gallery as it was, if there was one.
        names: parts to add, in order.
        gone: rows that are no longer in it.
        fingerprint: of the model.
        source: where the model was loaded from.
        shape: F and D.
        anew: the gallery shall have the parts ``names`` alone, and an index made from them.
    """
    from tqdm import tqdm

    previous = out / old.about["index"]["file"] if old else None
    kept = None if anew else old
    index = FrameIndex(*shape, previous if kept else None)
    if gone:
        index.remove(sorted(gone))
    first = kept.num_rows if kept else 0
    for name in tqdm(names, desc="index", unit="part", disable=len(names) < 2):
        part = Part(out, name, first)
        index.add(np.arange(first, first + len(part)), part.frames)
        first += len(part)
    number = (int(previous.stem.split("-")[1]) + 1) if previous else 0
    path = out / f"frames-{number:06d}.usearch"
    index.save(path)
    about = {
        "model": source,
        "fingerprint": fingerprint,
        "num_frames": shape[0],
        "width": shape[1],
        "parts": [*(kept.about["parts"] if kept else []), *names],
        "removed": sorted((kept.removed if kept else set()) | gone),
        "index": {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)},
    }
    write_gallery(out, about)
    if previous:
        previous.unlink()
