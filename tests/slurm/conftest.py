"""One cluster for all SLURM tests, the demo's shards, and a run that nothing disturbs."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.demo_data import generate
from tests.slurm.cluster import ROOT, Cluster, Job, NoClusterError, start

STEPS = 90


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # It holds sockets, whose paths must be short.
    state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    state.chmod(0o755)
    try:
        started = start(state)
    except NoClusterError as error:
        _remove(state)
        pytest.skip(f"no SLURM here: {error}")
    yield started
    started.control("stop")
    _remove(state)


def _remove(state: Path) -> None:
    shutil.rmtree(state, ignore_errors=True)
    Path(f"{state}.log").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a small demo with its own shards."""
    source, out = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("shards")
    generate(source, {"train": 60, "val": 20, "test": 30}, seed=0)
    for split in ("train", "val", "test"):
        command = [sys.executable, "shards/make_shards.py", "--source", "manifest", "--image-size", "32"]
        command += ["--annotations", str(source / "manifest.jsonl"), "--videos", str(source)]
        subprocess.run([*command, "--split", split, "--out", str(out / split)], cwd=ROOT, check=True)
    data = [f"data.{split}={out / split}" for split in ("train", "val", "test")]
    return [*data, f"max_steps={STEPS}", "eval_every=15", "log_every=1", "data.batch_size=16"]


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two nodes, one task each, to the end."""
    job = cluster.submit(tmp_path_factory.mktemp("undisturbed"), "--nodes", "2", *settings)
    job.until_completed()
    return job
