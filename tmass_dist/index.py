"""Encode videos into a gallery that can be searched: ``python -m tmass_dist.index MODEL --videos DIR --out GALLERY``.

Running the command again adds new videos, encodes changed ones again, and resumes after a kill. It also runs on several
ranks under torchrun. ``tmass search GALLERY "a dog"`` and ``tmass serve GALLERY`` use the gallery.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tmass_dist.cli import program, run_command
from tmass_dist.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.index"), description=__doc__)
    parser.add_argument("model", help="an export, a run directory, or a name on the Hugging Face Hub")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--videos", type=Path, metavar="DIR", help="directory of video files, with subdirectories")
    group.add_argument("--shards", metavar="DIR", help="packed split (a directory, or a URL with --cache)")
    parser.add_argument("--out", type=Path, required=True, metavar="GALLERY", help="directory of the gallery")
    parser.add_argument(
        "--remove",
        nargs="+",
        action="extend",
        default=[],
        metavar="ID",
        help="remove these videos from the gallery; may be given several times",
    )
    parser.add_argument(
        "--compact", action="store_true", help="then give back the space of removed videos; it makes the index anew"
    )
    parser.add_argument("--cache", help="where shards of a URL are kept")
    parser.add_argument("--batch-size", type=int, default=16, help="videos encoded at a time by a rank (16)")
    parser.add_argument("--check", action="store_true", help="check every file's checksum when done")
    arguments = parser.parse_args()
    if not (arguments.videos or arguments.shards or arguments.remove or arguments.compact or arguments.check):
        raise UserError("say what to do: --videos DIR, --shards DIR, --remove ID, --compact or --check")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; at least 1")
    from tmass_dist.distributed import finish, initialise, is_main
    from tmass_dist.retrieval.build import update
    from tmass_dist.retrieval.compact import compact
    from tmass_dist.retrieval.gallery import VideoGallery, read_gallery
    from tmass_dist.retrieval.model import TMass
    from tmass_dist.retrieval.videos import files_of, samples_of

    if not (arguments.videos or arguments.shards):
        read_gallery(arguments.out)  # a gallery that does not exist is not made by removing from it
    sources = files_of(arguments.videos) if arguments.videos else []
    sources = samples_of(arguments.shards, arguments.cache) if arguments.shards else sources
    model = TMass.from_pretrained(arguments.model)
    # A later search starts in another directory, perhaps.
    source = str(Path(arguments.model).resolve()) if Path(arguments.model).is_dir() else arguments.model
    model.to(initialise(model.config.engine.timeout_s))
    changes = update(model, source, arguments.out, sources, remove=arguments.remove, batch_size=arguments.batch_size)
    freed = compact(arguments.out) if arguments.compact else None
    if is_main():
        for video_id, reason in changes.failed:
            print(f"left out: {video_id}: {reason}", file=sys.stderr)
        gallery = VideoGallery(arguments.out)
        if arguments.check and (damaged := gallery.damaged()):
            raise UserError(f"{len(damaged)} files of {arguments.out} are damaged: {', '.join(damaged[:5])}")
        print(
            f"{arguments.out}: {len(gallery)} videos; {changes.added} encoded, {changes.unchanged} unchanged, "
            f"{changes.removed} removed, {len(changes.failed)} left out"
            + ("" if freed is None else f"; {freed / 1e6:.1f} MB given back")
        )
    finish()


if __name__ == "__main__":
    run_command(main)
