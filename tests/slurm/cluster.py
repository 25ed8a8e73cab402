"""A real SLURM of four virtual nodes for the tests, and the means to disturb it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("mini_cluster.sh")
PATIENCE_S = 600
"""Limit of each wait. A minute is usual; a busy machine takes several."""
ON_CPUS = ("--gpus", "0", "--procs", "1", "--cpus", "1")
"""One process a node, on one CPU: the nodes claim GPUs that do not exist."""


class NoClusterError(Exception):
    """No cluster can be started on this machine; the message says why."""


def until(condition: Callable[[], T], seconds: float, what: str, poll_s: float = 0.05) -> T:
    """What ``condition()`` returns, once that is true.

    Raises:
        AssertionError: it was not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s there is no {what}"
        time.sleep(poll_s)
    return found


@dataclass(frozen=True)
class Cluster:
    """A running cluster and its environment."""

    env: dict[str, str]

    def control(self, *arguments: str) -> str:
        """``mini_cluster.sh``: start, stop, crash HOST, boot HOST."""
        # The daemons inherit stdout. With a pipe, `run` would wait for them; so the output goes to a file.
        log = Path(self.env["MC_STATE"] + ".log")
        with log.open("w") as out:
            try:
                code = subprocess.run(
                    ["bash", str(SCRIPT), *arguments], env=self.env, stdout=out, stderr=out, timeout=600
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise NoClusterError(f"mini_cluster.sh {arguments[0]} took more than 600 s") from error
        if code:
            raise NoClusterError(f"mini_cluster.sh {arguments[0]}: {log.read_text()[-300:]}")
        return log.read_text()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=600)

    def submit(self, run_dir: Path, *more: str) -> Job:
        """Call ``launch/submit.py`` as a user would, for one process a node unless ``more`` says otherwise."""
        resources = () if {"--gpus", "--procs"} & {*more} else ON_CPUS
        base = [sys.executable, "launch/submit.py", "--config", "demo.yaml", f"run_dir={run_dir}"]
        pause = () if "--requeue-pause" in more else ("--requeue-pause", "1")
        done = self.run(*base, *resources, *pause, *more)
        assert done.returncode == 0, done.stderr
        first = re.match(r"job (\d+) in ", done.stdout)
        assert first, done.stdout
        for line in ("log: ", "watch: tensorboard ", "status: python launch/status.py ", "cancel: python "):
            assert f"\n{line}" in done.stdout, done.stdout
        return Job(self, first[1], run_dir, re.findall(r"^then (\S+): job (\d+)", done.stdout, re.M))


@dataclass(frozen=True)
class Job:
    """A submitted run."""

    cluster: Cluster
    id: str
    run_dir: Path
    then: list[tuple[str, str]] = field(default_factory=list)
    """Name and job of each step that follows."""

    def following(self, step: str) -> Job:
        return Job(self.cluster, dict(self.then)[step], self.run_dir)

    def step(self) -> int:
        """Steps done, by the log of the run."""
        log = self.run_dir / "train.log"
        steps = re.findall(r"step (\d+)/", log.read_text()) if log.is_file() else []
        return int(steps[-1]) if steps else 0

    def until_step(self, step: int) -> None:
        until(lambda: self.step() >= step, PATIENCE_S, f"step {step} of job {self.id}")

    def nodes(self) -> list[str]:
        names = self.cluster.run("scontrol", "show", "hostnames", self.squeue("%N")).stdout
        return names.split()

    def status(self) -> str:
        done = self.cluster.run(sys.executable, "launch/status.py", str(self.run_dir))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def squeue(self, form: str) -> str:
        return self.cluster.run("squeue", "-h", "-j", self.id, "-o", form).stdout.strip()

    def state(self) -> str:
        lines = self.cluster.run("sacct", "-X", "-n", "-P", "-j", self.id, "-o", "State").stdout.splitlines()
        return lines[-1].split()[0] if lines else "UNKNOWN"

    def history(self) -> str:
        """How each start ended, as SLURM says."""
        return self.cluster.run("sacct", "-D", "-X", "-n", "-P", "-j", self.id, "-o", "State,ExitCode,NodeList").stdout

    def until_completed(self) -> None:
        until(lambda: self.state() == "COMPLETED", PATIENCE_S, f"end of job {self.id}:\n{self.history()}", 0.5)

    def until_failed(self) -> None:
        until(lambda: self.state() == "FAILED", PATIENCE_S, f"failure of job {self.id}:\n{self.history()}", 0.5)

    def history_of_tasks(self) -> str:
        """``JOB_TASK|STATE`` of every start of an array's tasks."""
        return self.cluster.run("sacct", "-D", "-X", "-n", "-P", "-j", self.id, "-o", "JobID,State").stdout

    def task_pid(self, number: int) -> int | None:
        """The scoring process of one task of an array."""
        wanted = {f"SLURM_ARRAY_JOB_ID={self.id}".encode(), f"SLURM_ARRAY_TASK_ID={number}".encode()}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((entry / "environ").read_bytes().split(b"\0"))
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if wanted <= environment and b"tmass_dist.evaluate" in command:
                return int(entry.name)
        return None

    def pids(self, rank: int) -> list[int]:
        """The training process of one rank, found by the environment that SLURM gave it."""
        pids = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={rank}".encode()}
            if wanted <= set(environment) and b"submitit.core._submit" in command:
                pids.append(int(entry.name))
        return pids

    def kill(self, rank: int) -> None:
        """Kill a rank (SIGKILL), and what it has started."""
        first, *others = self.pids(rank)
        os.kill(first, signal.SIGKILL)
        for pid in others:  # they may have ended with the first
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def metrics(self) -> dict:
        return json.loads((self.run_dir / "evaluation" / "metrics.json").read_text())


def start(state: Path) -> Cluster:
    """Start a cluster with its own network, bridge and state directory.

    Raises:
        NoClusterError: this machine does not allow it.
    """
    if os.geteuid() != 0:
        raise NoClusterError("a cluster of namespaces needs root")
    if shutil.which("apt-get") is None:
        raise NoClusterError("mini_cluster.sh installs SLURM with apt-get, and there is none")
    if subprocess.run(
        ["unshare", "--uts", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True
    ).returncode:
        raise NoClusterError("this machine does not allow namespaces")
    number = os.getpid() % 200
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {
        "MC_STATE": str(state),
        "MC_SUBNET": f"10.78.{number}",
        "MC_BRIDGE": f"tm{number}",
        "SLURM_CONF": f"{state}/slurm.conf",
        "OMP_NUM_THREADS": "1",
    }
    cluster = Cluster(env)
    cluster.control("start")
    return cluster
