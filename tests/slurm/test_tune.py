"""``--tune`` on a real SLURM: the driver and a trial are killed, and every trial ends, once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.submitted import jobs_of
from launch.tune import JOURNAL, import_optuna
from tests.slurm.cluster import ON_CPUS, PATIENCE_S, ROOT, Cluster, Job, until
from tmass_dist.loggers import read_metrics

pytestmark = pytest.mark.slurm


def test_killed_driver_and_killed_trial(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    base, log = tmp_path / "study", tmp_path / "log"
    command = [sys.executable, "launch/submit.py", "--config", "demo.yaml", *ON_CPUS, "--requeue-pause", "1"]
    command += ["--tune", "optim.lr=log:1e-5..1e-3", "--trials", "3", "--parallel", "2", *settings]
    command += ["max_steps=40", "eval_every=20", "eval_at_start=false", f"run_dir={base}"]

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(command, cwd=ROOT, env=cluster.env, stdout=out, stderr=out)

    driver = start()
    run_dirs = [base / f"trial-{number:04d}" for number in range(3)]
    until(lambda: jobs_of(run_dirs[0]) and jobs_of(run_dirs[1]), PATIENCE_S, "submission of two trials")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    job = Job(cluster, jobs_of(run_dirs[0])[0]["id"], run_dirs[0])
    # As a driver leaves it that is killed after sbatch, but before it could record the job.
    other = jobs_of(run_dirs[1])[0]["id"]
    (run_dirs[1] / "jobs" / "jobs.json").unlink()

    driver = start()
    until(lambda: read_metrics(run_dirs[0] / "metrics.jsonl"), PATIENCE_S, "first step of trial 0")
    job.kill(rank=0)
    assert driver.wait(timeout=PATIENCE_S) == 0, log.read_text()

    optuna = import_optuna()
    backend = optuna.storages.journal.JournalFileBackend(str(base / JOURNAL))
    trials = optuna.load_study(study_name="tune", storage=optuna.storages.JournalStorage(backend)).trials
    assert [(trial.number, trial.state.name) for trial in trials] == [(n, "COMPLETE") for n in range(3)]
    assert [trial.user_attrs["starts"] for trial in trials] == [1, 1, 1], "SLURM queues a killed trial again by itself"
    assert "restart 1" in (run_dirs[0] / "jobs" / "restarts.log").read_text()
    assert jobs_of(run_dirs[1])[0]["id"] == other
    names = cluster.run("sacct", "-X", "-n", "-P", "-o", "JobName").stdout.split()
    assert len([name for name in names if name.startswith("tune-")]) == 3  # a job for each trial
    for run_dir in run_dirs:
        steps = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss/total" in line]
        assert steps == list(range(1, 41))
    assert "best trial: " in log.read_text()
