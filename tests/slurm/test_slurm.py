"""Training on a real SLURM of four nodes with every fault of a cluster: the final weights are the same, bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shards.demo_data import generate
from tests.slurm.cluster import ON_CPUS, PATIENCE_S, ROOT, Cluster, Job, until
from tests.slurm.conftest import STEPS
from tmass_dist.training.checkpoint import weights_of

pytestmark = pytest.mark.slurm


def _same_weights(job: Job, undisturbed: Job) -> None:
    one, other = (weights_of(j.run_dir / "checkpoints" / f"step-{STEPS:08d}") for j in (job, undisturbed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _same_end(job: Job, undisturbed: Job) -> None:
    _same_weights(job, undisturbed)
    assert job.metrics()["t2v"] == undisturbed.metrics()["t2v"]


def _restarted(job: Job) -> str:
    log = job.run_dir / "jobs" / "restarts.log"
    assert log.is_file(), f"the job was never started again: {job.history()}"
    return log.read_text()


def _report(what: str, seconds: float, job: Job) -> None:
    print(f"\n{what}: {seconds:.0f} s to the end; {'; '.join(job.history().split())}")


def test_four_nodes_train_the_demo(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    job = cluster.submit(tmp_path / "run", "--nodes", "4", *settings)
    job.until_step(1)
    print(f"\nsubmit to first step on 4 nodes: {time.monotonic() - began:.1f} s")
    job.until_completed()
    assert job.metrics()["num_videos"] == 30
    status = job.status()
    assert f"step {STEPS} of {STEPS}" in status and "COMPLETED" in status
    # Four ranks as two tasks on each of two nodes train the same weights.
    several = cluster.submit(
        tmp_path / "several", "--nodes", "2", "--gpus", "0", "--procs", "2", "--cpus", "1", *settings
    )
    several.until_completed()
    assert "4 ranks" in (several.run_dir / "train.log").read_text()
    _same_end(several, job)


def test_a_stop_during_evaluation(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    """SLURM's warning arrives while the job evaluates: it leaves, is queued again and finishes the evaluation."""
    job = cluster.submit(tmp_path / "run", "--nodes", "2", *settings, "max_steps=3", "stochastic.num_trials=500")
    log = tmp_path / "run" / "train.log"
    until(lambda: log.is_file() and "training is complete" in log.read_text(), PATIENCE_S, "end of the training", 0.01)
    assert cluster.run("scancel", "--signal=USR2", job.id).returncode == 0
    job.until_completed()
    assert "restart 1" in _restarted(job) and log.read_text().count("step 3/3 ") == 1
    assert job.metrics()["num_videos"] == 30


def test_a_failure_of_the_machine_is_tried_again(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    """A log that cannot be opened fails the job; it is queued again after a pause, and then the log can be opened."""
    broken = tmp_path / "run" / "train.log"
    broken.mkdir(parents=True)
    pause = ["--requeue-pause", "20"]
    job = cluster.submit(tmp_path / "run", "--nodes", "2", *pause, *settings, "max_steps=3", "eval_every=3")
    failures = tmp_path / "run" / "jobs" / f"failures-{job.id}.jsonl"
    until(failures.is_file, PATIENCE_S, "failure")
    failed = time.monotonic()
    broken.rmdir()
    until(lambda: _starts(job), PATIENCE_S, "second start")
    assert time.monotonic() - failed > 19
    job.until_completed()
    assert "restart 1" in _restarted(job) and "IsADirectoryError" in failures.read_text()
    rank_log = tmp_path / "run" / "jobs" / f"{job.id}_0_log.err"
    assert "Traceback (most recent call last)" in rank_log.read_text()


def test_a_rank_without_its_gpu_ends_and_is_not_tried_for_ever(
    cluster: Cluster, settings: list[str], tmp_path: Path
) -> None:
    """The nodes claim GPUs that do not exist. Three failures alike, on the one node that is allowed, are final."""
    options = ["--gpus", "2", "--exclude", "node[2-4]", "--requeues", "9", "--requeue-pause", "1"]
    job = cluster.submit(tmp_path / "run", *options, *settings)
    job.until_failed()
    line = r"node node1: the job has 2 GPUs a node, and this rank \(local rank [01]\) sees 0"
    assert re.search(line, job.status()) and "(3 times in a row: not queued again)" in job.status(), job.status()
    assert _restarted(job).count("restart ") == 2
    assert not (tmp_path / "run" / "checkpoints").exists(), "no rank trained on the CPU instead"


def test_time_limit(cluster: Cluster, settings: list[str], undisturbed: Job, tmp_path: Path) -> None:
    began = time.monotonic()
    job = cluster.submit(
        tmp_path / "run",
        "--nodes",
        "2",
        "--time",
        "1",
        "--save-before",
        "35",
        "--requeues",
        "99",
        *settings,
        "eval_every=2",
    )  # SLURM warns up to a minute early: a start may have little time, so several may be needed
    job.until_completed()
    _report("time limit", time.monotonic() - began, job)
    assert "restart 1" in _restarted(job)
    assert "asked to stop: saved" in (job.run_dir / "train.log").read_text()
    _same_weights(job, undisturbed)  # it validates more often, so that it takes longer than the limit


def test_preemption(cluster: Cluster, settings: list[str], undisturbed: Job, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path / "run", "--nodes", "2", "--partition", "low", *settings)
    job.until_step(25)
    began = time.monotonic()
    above = cluster.run("sbatch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    assert above.returncode == 0, above.stderr
    job.until_completed()
    _report("preemption", time.monotonic() - began, job)
    assert "restart 1" in _restarted(job)
    assert "asked to stop: saved" in (job.run_dir / "train.log").read_text()
    _same_end(job, undisturbed)


@pytest.mark.parametrize("moment", ["step", "save"])
def test_power_cut_of_a_node(
    cluster: Cluster, settings: list[str], undisturbed: Job, tmp_path: Path, moment: str
) -> None:
    often = ["engine.save_every=3"] if moment == "save" else []  # so that some save is under way when it looks
    job = cluster.submit(tmp_path / "run", "--nodes", "2", *settings, *often)
    job.until_step(25)
    lost = job.nodes()[1]
    if moment == "save":
        saving = tmp_path / "run" / "checkpoints"
        until(lambda: list(saving.glob("tmp-step-*")), PATIENCE_S, "save under way", 0.0005)
    began = time.monotonic()
    cluster.control("crash", lost)
    try:
        job.until_completed()
    finally:
        cluster.control("boot", lost)
    _report(f"power cut in mid-{moment}", time.monotonic() - began, job)
    assert "restart 1" in _restarted(job)
    assert lost not in job.history().strip().splitlines()[-1]
    _same_end(job, undisturbed)


def test_killed_rank(cluster: Cluster, settings: list[str], undisturbed: Job, tmp_path: Path) -> None:
    job = cluster.submit(tmp_path / "run", "--nodes", "2", *settings)
    job.until_step(25)
    began = time.monotonic()
    job.kill(rank=1)
    job.until_completed()
    _report("kill -9 of a rank", time.monotonic() - began, job)
    assert "restart 1" in _restarted(job)
    _same_end(job, undisturbed)


def test_no_more_than_the_restarts_that_are_allowed(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    """One restart is allowed and ranks are killed twice: the job fails, and its checkpoints stay."""
    job = cluster.submit(tmp_path / "run", "--nodes", "2", "--requeues", "1", *settings)
    for restarts in (0, 1):
        until(lambda n=restarts: _starts(job) > n, PATIENCE_S, f"start {restarts + 1} of job {job.id}")
        job.kill(rank=1)
    job.until_failed()
    assert _restarted(job).count("restart") == 1 and "restart 1 of at most 1" in job.status()


def _starts(job: Job) -> int:
    """How often training was started."""
    log = job.run_dir / "train.log"
    return log.read_text().count(" ranks, batch ") if log.is_file() else 0


def test_side_by_side_in_use_and_cancelled(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    """Two runs at once do not disturb each other; a directory in use is refused; a cancelled job is not requeued."""
    long = [*settings, "max_steps=1000", "epochs=1000"]
    both = [cluster.submit(tmp_path / name, "--nodes", "2", *long) for name in ("one", "two")]
    for job in both:
        job.until_step(5)
        status = job.status()
        assert f"RUNNING {job.squeue('%N')}" in status and ", loss " in status and " left" in status, status
    again = [sys.executable, "launch/submit.py", "--config", "demo.yaml", *ON_CPUS, "--nodes", "2", *long]
    refused = cluster.run(*again, f"run_dir={both[0].run_dir}")
    assert refused.returncode == 2 and f"in use by job {both[0].id}" in refused.stderr
    for job in both:
        done = cluster.run(sys.executable, "launch/cancel.py", str(job.run_dir))
        assert done.returncode == 0, done.stderr
        until(lambda job=job: job.state().startswith("CANCELLED"), PATIENCE_S, "cancelled job")
    until(lambda: not any(job.squeue("%T") for job in both), PATIENCE_S, "end of what was cancelled")
    time.sleep(3)
    assert not any(job.squeue("%T") for job in both)


def test_all_trains_scores_by_an_array_and_reports(
    cluster: Cluster, settings: list[str], undisturbed: Job, tmp_path: Path
) -> None:
    """One task of the array is killed: it alone starts again, and the metrics equal the undisturbed run's."""
    job = cluster.submit(tmp_path / "run", "--nodes", "2", "--job", "all", "--tasks", "3", *settings)
    array, report = job.following("score"), job.following("report")
    job.until_completed()
    pid = until(lambda: array.task_pid(1), PATIENCE_S, "task 1 of the array")
    assert pid
    os.kill(pid, signal.SIGKILL)
    report.until_completed()
    _same_end(job, undisturbed)
    attempts = [line.split("|")[0] for line in array.history_of_tasks().splitlines()]
    assert sorted(attempts) == [f"{array.id}_{n}" for n in (0, 1, 1, 2)], attempts


def test_what_follows_a_failed_step_is_cancelled(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    wrong = ["model.num_heads=7"]
    job = cluster.submit(tmp_path / "run", "--nodes", "2", "--job", "all", "--tasks", "2", *settings, *wrong)
    job.until_failed()
    for step, _ in job.then:
        until(
            lambda step=step: job.following(step).state().startswith("CANCELLED"), PATIENCE_S, f"cancelled {step}", 0.5
        )


def test_goes_on_with_fewer_nodes(cluster: Cluster, settings: list[str], undisturbed: Job, tmp_path: Path) -> None:
    """Four nodes, of which one dies: the run resumes on the nodes left, with as many ranks as the batch divides by."""
    until(
        lambda: cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == "4",
        PATIENCE_S,
        "four idle nodes",
        0.5,
    )
    job = cluster.submit(tmp_path / "run", "--nodes", "4", "--min-nodes", "2", *settings)
    job.until_step(25)
    lost = job.nodes()[-1]
    cluster.control("crash", lost)
    try:
        job.until_completed()
    finally:
        cluster.control("boot", lost)
    assert "restart 1" in _restarted(job)
    assert (
        "4 ranks" in (job.run_dir / "train.log").read_text() and ", 2 ranks" in (job.run_dir / "train.log").read_text()
    )
    one, other = (weights_of(j.run_dir / "checkpoints" / f"step-{STEPS:08d}") for j in (job, undisturbed))
    whole = [torch.cat([found[name].flatten() for name in sorted(found)]) for found in (one, other)]
    gap = ((whole[0] - whole[1]).norm() / whole[1].norm()).item()
    print(f"\n4 ranks, then 2, against 2: weights differ by {gap:.1e}")
    assert gap < 1e-4


def test_sweep(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    axes = ["--sweep", "optim.lr=1e-3,3e-4", "data.batch_size=8,16"]
    common = [setting for setting in settings if not setting.startswith("data.batch_size=")]
    job = cluster.submit(tmp_path / "sweep", "--nodes", "1", *common, "max_steps=6", "eval_every=6", *axes)
    job.following("compare").until_completed()
    table = (tmp_path / "sweep" / "comparison.md").read_text()
    assert table.count("query_conditioned") == 4 and "optim.lr=0.0003,data.batch_size=8" not in table
    assert "| optim.lr=3e-4,data.batch_size=8 | 8 | 0.0003 |" in table, table


def test_packing_by_an_array(cluster: Cluster, tmp_path: Path) -> None:
    """Three tasks pack what one process packs, byte for byte."""
    generate(tmp_path / "videos", {"train": 12, "val": 1, "test": 1}, seed=0)
    source = f"--source manifest --annotations {tmp_path}/videos/manifest.jsonl --videos {tmp_path}/videos"
    source += " --split train --image-size 32 --shard-size 3"
    packed = cluster.submit(
        tmp_path / "run", "--job", "shards", "--tasks", "3", "--pack", f"{source} --out {tmp_path}/by-array"
    )
    packed.following("index").until_completed()
    alone = [sys.executable, "shards/make_shards.py", *source.split(), "--out", str(tmp_path / "alone")]
    assert cluster.run(*alone).returncode == 0
    names = ["index.safetensors", *(f"shard-{n:06d}.tar" for n in range(4))]
    for name in names:
        assert (tmp_path / "by-array" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--nodes", "9", "data.batch_size=18"], "Node count"),
        (["--partition", "nowhere"], "SLURM has no partition nowhere; it has closed, cpu, large, low, main, mixed"),
        (["--partition", "closed", "--account", "nowhere"], "Invalid account"),
        (["--gpus", "64", "data.batch_size=64"], "--gpus 64 on 1 node: the default partition has 4 nodes with 2 GPUs"),
        (["--nodes", "3"], "not divisible by 3 ranks"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused_at_once(
    cluster: Cluster, settings: list[str], tmp_path: Path, asked: list[str], said: str
) -> None:
    resources = [] if "--gpus" in asked else ON_CPUS
    base = [sys.executable, "launch/submit.py", "--config", "demo.yaml", *resources]
    done = cluster.run(*base, *settings, *asked, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and said in done.stderr, done.stderr


def test_a_mistake_is_not_started_again(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    """A user error ends the job with its line."""
    job = cluster.submit(tmp_path / "run", "--nodes", "2", *settings, "model.num_heads=7")
    job.until_failed()
    assert not (job.run_dir / "jobs" / "restarts.log").exists()
    assert "model.num_heads is 7" in job.status()


def test_without_slurm_one_line_says_so(settings: list[str], tmp_path: Path) -> None:
    if any((Path(folder) / "sbatch").exists() for folder in ("/usr/local/bin",)):
        pytest.skip("sbatch lies in the only PATH left")
    command = [sys.executable, "launch/submit.py", "--config", "demo.yaml", *ON_CPUS, *settings, f"run_dir={tmp_path}"]
    env = os.environ | {"PATH": "/usr/local/bin"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no sbatch on this machine" in done.stderr
