"""Give back the space of removed videos: write the parts that hold some again, without them, and index all parts anew.

The old gallery stays whole until ``gallery.json`` is replaced. A killed process loses at most the part it was writing:
the names of the new parts are functions of their content, and parts that are whole are used again.
"""

# Shapes: V videos, F frames, D embedding width.

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from tmass_dist.distributed import barrier, is_main
from tmass_dist.retrieval.build import commit, exclusive, is_whole, write_part
from tmass_dist.retrieval.gallery import Part, VideoGallery


def compact(out: Path) -> int:
    """Rewrite a gallery without the videos that were removed, and delete files that do not belong to it.

    While it runs it needs room for the parts it rewrites and for a second index. Every rank calls it; rank 0 works.

    Args:
        out: directory of the gallery.

    Returns:
        Bytes given back, on rank 0.

    Raises:
        UserError: there is no gallery, it is damaged, or another process changes it.
    """
    freed = 0
    with exclusive(out):
        if is_main():
            before = _bytes(out)
            gallery = VideoGallery(out)
            names = [name for part in gallery.parts for name in _without_removed(gallery, part)]
            if names != gallery.about["parts"]:
                shape = (gallery.num_frames, gallery.width)
                commit(out, gallery, names, set(), gallery.fingerprint, gallery.model, shape, anew=True)
            _delete_strangers(out)
            freed = before - _bytes(out)
        barrier()
    return freed


def _without_removed(gallery: VideoGallery, part: Part) -> list[str]:
    """Name of the part with its remaining videos: the same if all remain; none if nothing does."""
    kept_V = [number for number in range(len(part)) if part.first + number not in gallery.removed]
    if not kept_V and not part.failed:  # videos that could not be read are remembered, so as not to be tried again
        return []
    if len(kept_V) == len(part):
        return [part.name]
    name = "part-" + hashlib.sha256(json.dumps([part.name, kept_V]).encode()).hexdigest()[:16]
    if not is_whole(gallery.directory, name):
        frames_VFD = np.ascontiguousarray(part.frames[kept_V])
        jpegs = [part.thumbnail(number, frame) for number in kept_V for frame in range(gallery.num_frames)]
        videos = [part.videos[number] for number in kept_V]
        write_part(gallery.directory, name, videos, part.failed, frames_VFD, np.asarray(part.times[kept_V]), jpegs)
    return [name]


def _delete_strangers(out: Path) -> None:
    """Delete parts and indexes that ``gallery.json`` does not name: replaced ones, and those of killed processes."""
    gallery = VideoGallery(out)
    own = {gallery.about["index"]["file"]} | {f"{part.name}.json" for part in gallery.parts}
    own |= {file for part in gallery.parts for file in part.files}
    for pattern in ("part-*", "frames-*.usearch*"):
        for path in out.glob(pattern):
            if path.name not in own:
                path.unlink()


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
