"""A contact sheet of packed shards: frames and captions as training sees them.

``python shards/inspect_shards.py DIR [--shard NAME] [--out sheet.png]``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import program, run_command  # noqa: E402
from tmass_dist.data.index import load_index  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python shards/inspect_shards.py"), description=__doc__)
    parser.add_argument("directory", help="a split: a directory, or a URL with --cache")
    parser.add_argument("--shard", metavar="NAME", help="only this tar (default: spread over all)")
    parser.add_argument("--videos", type=int, default=12, help="rows of the sheet")
    parser.add_argument("--frames", type=int, default=12, help="pictures in a row")
    parser.add_argument("--out", type=Path, default=Path("contact-sheet.png"))
    parser.add_argument("--cache", help="local directory for shards behind a URL")
    arguments = parser.parse_args()
    if arguments.videos < 1 or arguments.frames < 1:
        raise UserError("--videos and --frames must be at least 1")
    import numpy as np

    from tmass_dist.data.samples import read_into
    from tmass_dist.pictures import sheet

    if arguments.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--out is {arguments.out}; name a .png or .jpg file")
    index = load_index(arguments.directory, arguments.cache)
    numbers = np.arange(len(index))
    if arguments.shard:
        names = [shard.name for shard in index.shards]
        if arguments.shard not in names:
            raise UserError(f"no shard {arguments.shard} in {index.directory}; it has {', '.join(names[:8])}")
        numbers = numbers[index.columns["shard"] == names.index(arguments.shard)]
    numbers = numbers[np.linspace(0, len(numbers) - 1, min(arguments.videos, len(numbers))).astype(int)]
    num_frames = min(arguments.frames, index.num_frames or arguments.frames)
    rows = []
    for number in numbers:
        frames = np.empty((num_frames, index.image_size, index.image_size, 3), np.uint8)
        meta = read_into(frames, index, int(number))
        counts = f"{len(meta['captions'])} captions, {meta.get('num_decoded_frames', '?')} frames decoded"
        rows.append(([str(meta["id"])[:40], counts, meta["captions"][0]], list(frames)))
    sheet(rows).save(arguments.out)
    print(f"{arguments.out}: {len(numbers)} of {len(index)} videos")


if __name__ == "__main__":
    run_command(main)
