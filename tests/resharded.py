"""A split in shards of another size: the samples' bytes are copied unchanged."""

import hashlib
import zlib
from dataclasses import replace
from pathlib import Path

from tmass_dist.data.index import Index, Sample, Shard, load_index, make_columns


def reshard(source: Path, out: Path, per_shard: int, copies: int = 1) -> Index:
    """Write the samples of ``source`` into ``out``, ``per_shard`` in each tar, ``copies`` times."""
    index, samples, shards = load_index(source), [], []
    out.mkdir(parents=True, exist_ok=True)
    numbers = [number for _ in range(copies) for number in range(len(index))]
    for k, start in enumerate(range(0, len(numbers), per_shard)):
        content = b""
        for number in numbers[start : start + per_shard]:
            sample: Sample = index.sample(number)
            shard = Path(source) / index.shards[sample.shard].name
            raw = shard.read_bytes()[sample.offset : sample.offset + sample.size]
            samples.append(replace(sample, shard=k, offset=len(content), crc32=zlib.crc32(raw)))
            content += raw
        content += bytes(1024)
        (out / f"shard-{k:06d}.tar").write_bytes(content)
        shards.append(Shard(f"shard-{k:06d}.tar", len(content), hashlib.sha256(content).hexdigest()))
    columns = make_columns(samples)
    replace(index, directory=str(out), shards=tuple(shards), columns=columns).save()
    return load_index(out)
