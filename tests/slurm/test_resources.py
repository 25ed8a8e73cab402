"""Resources from a real SLURM, on a login node without GPUs: what sinfo says becomes GPUs and CPUs of a task."""

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def _dry_run(cluster: Cluster, run_dir: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "launch/submit.py", "--config", "demo.yaml", "--dry-run", f"run_dir={run_dir}"]
    done = cluster.run(*command, *options, "data.batch_size=32")
    assert "Traceback" not in done.stderr and not run_dir.exists()
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


@pytest.mark.parametrize(
    ("options", "gpus", "cpus"),
    [
        ([], 2, 2),
        (["--nodes", "4"], 2, 2),
        (["--partition", "large"], 8, 8),
        (["--partition", "mixed", "--constraint", "fast"], 8, 8),
        (["--partition", "mixed", "--gpus", "2"], 2, 2),
        (["--partition", "large", "--gpus", "2"], 2, 8),  # a quarter of the GPUs, a quarter of the CPUs
        (["--partition", "cpu", "--gpus", "0"], 0, 8),
        (["--cpus", "1"], 2, 1),
    ],
)
def test_sinfo_gives_gpus_and_cpus(cluster: Cluster, tmp_path: Path, options: list[str], gpus: int, cpus: int) -> None:
    code, printed = _dry_run(cluster, tmp_path / "run", *options)
    assert code == 0, printed
    assert (f"#SBATCH --gpus-per-node={gpus}\n" in printed) == bool(gpus), printed
    assert f"#SBATCH --cpus-per-task={cpus}\n" in printed, printed


def test_the_summary_describes_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    _, printed = _dry_run(cluster, tmp_path / "run", "--partition", "large")
    summary = "1 node x 8 GPUs = 8 ranks, 8 CPUs a rank; partition large: 1 node with 8 GPUs (a100), 64 CPUs and 250 GB"
    assert printed.startswith(f"# {summary}"), printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "nowhere"], "SLURM has no partition nowhere; it has closed, cpu, large, low, main, mixed"),
        (["--partition", "cpu"], "the nodes of partition cpu have no GPUs: give another --partition, or --gpus 0"),
        (
            ["--partition", "mixed"],
            "partition mixed differ: 1 node with no GPUs, 4 with 2 GPUs, 1 with 8 GPUs (a100); choose with --gpus N",
        ),
        (["--gpus", "4"], "--gpus 4 on 1 node: the default partition has 4 nodes with 2 GPUs"),
        (["--partition", "mixed", "--gpus", "8", "--nodes", "2"], "--gpus 8 on 2 nodes: partition mixed has"),
        (["--constraint", "slow"], "no node of partition main has --constraint slow; features: none"),
    ],
)
def test_one_line_asks_where_sinfo_does_not_decide(
    cluster: Cluster, tmp_path: Path, options: list[str], message: str
) -> None:
    code, printed = _dry_run(cluster, tmp_path / "run", *options)
    assert code == 2 and message in printed and len(printed.strip().splitlines()) == 1, printed
