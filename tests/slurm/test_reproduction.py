"""launch/reproduce.py on a real SLURM: a submitted run is not submitted again, a finished one is collected."""

import sys
from pathlib import Path

import pytest

from launch.paper.measure import is_finished
from launch.submitted import jobs_of
from tests.slurm.cluster import PATIENCE_S, Cluster, until

pytestmark = pytest.mark.slurm


def test_a_table_is_submitted_once_and_collected(cluster: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, "launch/reproduce.py", "--table", "4", "--steps", "30", "--cluster", "slurm"]
    command += ["--submit", "--nodes 1 --gpus 0 --procs 1 --cpus 1", "--out", str(tmp_path)]
    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "demo-ci" / "tmass" / "seed-0"
    [job] = jobs_of(run)
    assert "not trained yet" in (tmp_path / "demo-ci" / "index.md").read_text()
    again = cluster.run(*command)
    assert again.returncode == 0 and jobs_of(run) == [job], again.stderr
    until(lambda: is_finished(run), PATIENCE_S, f"end of job {job['id']}", 0.5)
    assert cluster.run(*command).returncode == 0 and jobs_of(run) == [job]
    assert "| embedded benchmark, query_conditioned, 1 seed |" in (tmp_path / "demo-ci" / "index.md").read_text()
