"""Writing one tar shard through WebDataset's ``TarWriter``."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.own_videos import Row
from tmass_dist.cli import writing
from tmass_dist.data.index import Sample, Shard
from tmass_dist.data.samples import safe_key
from tmass_dist.data.tars import scan_tar


class ShardWriter:
    """One shard. It is written under a temporary name and renamed by :meth:`close`.

    The same samples give the same bytes: ``TarWriter`` sorts a sample's members by name, and their time, owner and
    mode are constants.
    """

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter

        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.file = self.temporary.open("wb")
        self.tar = TarWriter(self.file, encoder=False, mtime=0, user="", group="", mode=0o644)
        self.rows: list[Row] = []

    def add(self, row: Row, members: dict[str, bytes], facts: dict[str, Any]) -> None:
        """Append a sample: its members by suffix, and a JSON with its row and ``facts``."""
        fields = {name: value for name, value in row.items() if name not in ("id", "path", "captions", "tar_range")}
        meta = {"id": row["id"], "captions": row["captions"], "source": row["path"], "fields": fields, **facts}
        content = json.dumps(meta, ensure_ascii=False).encode()
        with writing(self.path):
            self.tar.write({"__key__": safe_key(row["id"]), "json": content, **members})
        self.rows.append(row)

    def close(self) -> tuple[Shard, list[Sample]]:
        """Finish the shard; the places of its samples are read back from the file.

        Raises:
            OSError: the file does not hold what was written.
        """
        with writing(self.path):
            self.tar.close()
            self.file.close()
        content = scan_tar(self.temporary)
        if [sample.key for sample in content.samples] != [safe_key(row["id"]) for row in self.rows]:
            raise OSError(f"{self.temporary} does not hold the samples that were written; is the disk sound?")
        samples = [
            Sample(row["id"], 0, len(row["captions"]), place.offset, place.size, place.crc32)
            for row, place in zip(self.rows, content.samples)
        ]
        os.replace(self.temporary, self.path)
        return Shard(self.path.name, content.bytes, content.sha256), samples

    def discard(self) -> None:
        """Remove an unfinished shard."""
        for part in (self.tar, self.file):
            with suppress(OSError):  # what is still in a buffer may not fit on the disk
                part.close()
        self.temporary.unlink(missing_ok=True)
