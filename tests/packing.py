"""Packing as a user runs it, for several test files."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import run

SIZES = {"train": 10, "val": 4, "test": 4}


def pack(source: Path, out: Path, *more: str, kind: str = "manifest") -> subprocess.CompletedProcess[str]:
    """Run ``make_shards.py`` with shards of four videos and frames of 32 pixels."""
    command = ["shards/make_shards.py", "--source", kind, "--videos", str(source), "--split", "train", "--out"]
    command += [str(out), "--image-size", "32", "--shard-size", "4", "--workers", "1", *more]
    if kind == "manifest" and "--annotations" not in more:
        command += ["--annotations", str(source / "manifest.jsonl")]
    return run(*command)
