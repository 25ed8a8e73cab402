"""Workers that die, hang or need too much memory cost one video each; the others are packed."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from shards.make_shards import PackSettings, make_shards
from shards.own_videos import Row
from shards.pack_pool import Job, Limits, Packed, pack_all
from shards.pack_video import Recipe
from tests.videos import encode, write_greys
from tmass_dist.data.index import load_index
from tmass_dist.data.video import Choose
from tmass_dist.errors import UserError


@dataclass(frozen=True)
class _FatalFor(Recipe):
    """A recipe under which the worker fails at one video, in a way that no exception reports."""

    fatal_id: str = ""
    failure: str = ""

    def frames_of(self, row: Row) -> Choose:
        if row["id"] == self.fatal_id:
            if self.failure == "hang":
                time.sleep(600)
            elif self.failure == "memory":
                np.ones(2**28)  # 2 GiB
            else:
                os.kill(os.getpid(), getattr(signal, self.failure))
        return super().frames_of(row)


def _rows(videos: Path, number: int) -> list[Row]:
    for k in range(number):
        write_greys(videos / f"{k}.mp4", [20 * k] * 8)
    return [{"id": f"v{k}", "path": f"{k}.mp4", "captions": ["a"]} for k in range(number)]


FAILURES = {
    "SIGSEGV": "its process was ended by SIGSEGV",
    "SIGKILL": "its process was ended by SIGKILL (out of memory?)",
    "hang": "it takes longer than --time-limit-s 8",
    "memory": "it needs more memory than --memory-limit-gb",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_one_video_is_lost_and_named(tmp_path: Path, failure: str) -> None:
    rows = _rows(tmp_path, 5)
    recipe = _FatalFor(image_size=32, fatal_id="v2", failure=failure)
    limits = Limits(seconds=8 if failure == "hang" else 600, memory_gb=1)
    results: list[Packed] = list(pack_all([Job(row, tmp_path, recipe) for row in rows], 2, limits))
    assert [result.row["id"] for result in results] == ["v0", "v1", "v2", "v3", "v4"]
    assert [result.members is not None for result in results] == [True, True, False, True, True]
    assert results[2].reason == FAILURES[failure] and results[2].try_again


def test_a_video_lost_with_its_worker_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    rows, out = _rows(tmp_path, 5), tmp_path / "out"
    settings = PackSettings("train", _FatalFor(image_size=32, fatal_id="v2", failure="SIGSEGV"), shard_size=2)
    with pytest.raises(UserError, match=r"1 of 5 videos .* 2\.mp4: its process was ended by SIGSEGV"):
        make_shards(rows, tmp_path, out, settings)
    assert load_index(out).ids == ["v0", "v1", "v3", "v4"]
    untouched = (out / "shard-000000.tar").stat().st_mtime_ns
    make_shards(rows, tmp_path, out, replace(settings, max_bad=0.5))
    (entry,) = (json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines())
    assert entry == {"id": "v2", "path": "2.mp4", "reason": FAILURES["SIGSEGV"]}
    assert (out / "shard-000000.tar").stat().st_mtime_ns == untouched


def test_a_large_picture_is_stopped_by_the_memory_limit(tmp_path: Path) -> None:
    """Memory that ffmpeg allocates counts, not only Python's."""
    encode(tmp_path / "large.avi", [np.zeros((8000, 8000, 3), np.uint8)], "mjpeg")
    rows = [{"id": "large", "path": "large.avi", "captions": ["a"]}, *_rows(tmp_path, 1)]
    jobs = [Job(row, tmp_path, Recipe(image_size=32)) for row in rows]
    large, small = pack_all(jobs, 1, Limits(memory_gb=0.05))
    assert large.members is None and "memory" in large.reason and small.members is not None
    assert next(pack_all(jobs, 1, Limits(memory_gb=2))).members is not None
