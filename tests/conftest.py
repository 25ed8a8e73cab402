"""Shared by several test files: commands as a user runs them, and a small generated data set."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forked

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch
ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, timeout_s: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python`` with ``arguments``: commands in a process with all imports, ``-c CODE`` in a new one."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= environment
    if arguments[0] != "-c":
        return forked(*arguments, environment=env, cwd=ROOT, timeout_s=timeout_s)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s
    )


@pytest.fixture(scope="session")
def demo_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated videos with a manifest of three splits."""
    from shards.demo_data import generate
    from tests.packing import SIZES

    out = tmp_path_factory.mktemp("videos")
    generate(out, SIZES, seed=0)
    return out


@pytest.fixture(scope="session")
def demo_shards(demo_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training split of ``demo_videos``, packed."""
    from tests.packing import pack

    out = tmp_path_factory.mktemp("shards")
    done = pack(demo_videos, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Shards of a small generated data set, as overrides."""
    out = tmp_path_factory.mktemp("demo")
    made = run("shards/demo_data.py", "--out", str(out / "v"), "--train", "40", "--val", "12", "--test", "14")
    assert made.returncode == 0, made.stderr
    overrides = []
    for split in ("train", "val", "test"):
        shards = out / split
        command = ["--source", "manifest", "--annotations", str(out / "v/manifest.jsonl"), "--videos", str(out / "v")]
        command += ["--split", split, "--out", str(shards), "--image-size", "32", "--workers", "1"]
        packed = run("shards/make_shards.py", *command)
        assert packed.returncode == 0, packed.stderr
        overrides.append(f"data.{split}={shards}")
    return [*overrides, "data.batch_size=8", "max_steps=6", "eval_every=3", "log_every=1"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, by playwright."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
