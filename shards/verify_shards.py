"""Check packed shards: recount, re-hash, decode every frame. ``python shards/verify_shards.py DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import program, run_command  # noqa: E402
from tmass_dist.data.index import load_index  # noqa: E402
from tmass_dist.data.remote import sha256_of  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python shards/verify_shards.py"), description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--decode", type=int, metavar="N", help="decode N videos spread over the split (default: all)")
    arguments = parser.parse_args()
    import numpy as np
    from tqdm import tqdm

    from tmass_dist.data.samples import read_into, read_sample

    index = load_index(arguments.directory)
    damaged = []
    for shard in tqdm(index.shards, desc="hash", unit="shard"):
        if sha256_of(Path(index.directory) / shard.name) != shard.sha256:
            damaged.append(f"{shard.name}: its checksum differs from the index")
    decode = len(index) if arguments.decode is None else min(arguments.decode, len(index))
    decoded = set(np.linspace(0, len(index) - 1, decode).astype(int).tolist())
    for number in tqdm(range(len(index)), desc="read", unit="video"):
        try:
            meta, payload = read_sample(index, number)
            counted = len(payload), len(meta["captions"])
            expected = index.num_frames or len(payload), int(index.num_captions[number])
            if counted != expected or not payload:
                raise UserError(f"{index.id_of(number)!r} has {counted[0]} frames and {counted[1]} captions")
            if number in decoded:
                side = index.image_size
                read_into(np.empty((index.num_frames or 4, side, side, 3), np.uint8), index, number)
        except ValueError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"{len(damaged)} damaged: {'; '.join(damaged[:20])}")
    print(f"{arguments.directory}: {len(index.shards)} shards and {len(index)} videos are whole, {decode} decoded")


if __name__ == "__main__":
    run_command(main)
