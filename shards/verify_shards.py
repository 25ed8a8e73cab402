"""Check packed shards: recount, re-hash, decode every frame. ``python shards/verify_shards.py DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import run_command  # noqa: E402
from tmass_dist.data.index import load_index, read_sample, sha256_of  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="python shards/verify_shards.py", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="write a picture of the first videos' frames")
    arguments = parser.parse_args()
    import numpy as np
    import simplejpeg
    from PIL import Image

    index = load_index(arguments.directory)
    damaged = [shard.name for shard in index.shards if sha256_of(index.directory / shard.name) != shard.sha256]
    sheet = []
    for path, sample in index.located:
        try:
            meta, jpegs = read_sample(path, sample)
            frames = [simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs]
            if len(frames) != index.num_frames or len(meta["captions"]) != sample.num_captions:
                raise ValueError(f"{len(frames)} frames and {len(meta['captions'])} captions")
        except ValueError as error:
            damaged.append(f"{path.name} {sample.id}: {error}")
            continue
        if len(sheet) < 12:
            sheet.append(np.concatenate(frames, axis=1))
    if arguments.contact_sheet and sheet:
        Image.fromarray(np.concatenate(sheet)).save(arguments.contact_sheet)
    if damaged:
        raise ValueError(f"{len(damaged)} damaged: {'; '.join(damaged[:5])}")
    print(f"{arguments.directory}: {len(index.shards)} shards and {len(index.samples)} videos are whole")


if __name__ == "__main__":
    run_command(main)
