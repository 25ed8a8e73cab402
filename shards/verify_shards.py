"""Check the shards of a split: checksums, captions, frames. ``python shards/verify_shards.py DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import program, run_command  # noqa: E402
from tmass_dist.data.index import Index, load_index  # noqa: E402
from tmass_dist.data.remote import sha256_of  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402

CLIP_FRAMES = 4
"""Frames of a clip that are decoded."""


def find_damage(index: Index, num_decoded: int) -> list[str]:
    """What is wrong with the shards of a split, a line each.

    Args:
        index: of the split; every shard is hashed and every sample read.
        num_decoded: videos whose frames are decoded too, spread over the split.
    """
    import numpy as np
    from tqdm import tqdm

    from tmass_dist.data.samples import read_into, read_sample

    damage = []
    for shard in tqdm(index.shards, desc="hash", unit="shard"):
        if sha256_of(index.shard_path(shard)) != shard.sha256:
            damage.append(f"{shard.name}: its checksum differs from the index")
    decoded = set(np.linspace(0, len(index) - 1, num_decoded).astype(int).tolist())
    side = index.image_size
    for number in tqdm(range(len(index)), desc="read", unit="video"):
        try:
            _, payload = read_sample(index, number)
            if not payload or len(payload) != (index.num_frames or len(payload)):
                raise UserError(f"{index.id_of(number)!r} has {len(payload)} frames, not {index.num_frames}")
            if number in decoded:
                num_frames = len(payload) if index.store == "jpeg" else CLIP_FRAMES
                read_into(np.empty((num_frames, side, side, 3), np.uint8), index, number)
        except ValueError as error:
            damage.append(str(error))
    return damage


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python shards/verify_shards.py"), description=__doc__)
    parser.add_argument("directory", help="a split: a directory, or a URL with --cache")
    parser.add_argument("--decode", type=int, metavar="N", help="decode N videos spread over the split (default: all)")
    parser.add_argument("--cache", help="local directory for shards behind a URL")
    arguments = parser.parse_args()
    if arguments.decode is not None and arguments.decode < 0:
        raise UserError("--decode must be at least 0")
    index = load_index(arguments.directory, arguments.cache)
    num_decoded = len(index) if arguments.decode is None else min(arguments.decode, len(index))
    damage = find_damage(index, num_decoded)
    if damage:
        raise UserError(f"{len(damage)} damaged: {'; '.join(damage[:20])}")
    print(f"{arguments.directory}: {len(index.shards)} shards and {len(index)} videos are whole, {num_decoded} decoded")


if __name__ == "__main__":
    run_command(main)
