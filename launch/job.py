"""What each task of a job runs. submitit pickles it by reference, so it lives in an importable module."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import FINAL_ERROR
from tmass_dist.cli import PeerLostError
from tmass_dist.config import Config

STOPPED = 85
"""Exit code of a rank that saved because it was asked to stop; the job is queued again."""


@dataclass
class TrainJob:
    """Train, then evaluate the best checkpoint on the test split.

    Args:
        config: the run.
        requeues: how often the job may start again.
        cpu_threads: threads of a rank on CPU.
    """

    config: Config
    requeues: int = 3
    cpu_threads: int = 1

    def __call__(self) -> None:
        import submitit

        env = submitit.JobEnvironment()
        jobs = Path(self.config.run_dir) / "jobs"
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restarts:
            # An earlier attempt may have left a result that is no longer true.
            env.paths.result_pickle.unlink(missing_ok=True)
        os.environ.update(
            RANK=str(env.global_rank),
            WORLD_SIZE=str(env.num_tasks),
            LOCAL_RANK=str(env.local_rank),
            OMP_NUM_THREADS=str(self.cpu_threads),
        )
        host, port = _meeting_point(jobs / f"{env.job_id}-{restarts}.meet", env)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
        try:
            self._run(restarts, jobs)
        except (ValueError, OSError) as error:
            if "SLURM_JOB_ID" not in os.environ:
                raise
            # What a person must put right is not tried again.
            line = f"error: rank {env.global_rank}: {' '.join(str(error).split())}"
            print(line, file=sys.stderr, flush=True)
            (jobs / FINAL_ERROR).write_text(line + "\n", encoding="utf-8")
            os._exit(2)
        except PeerLostError as error:
            print(f"error: rank {env.global_rank}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def _run(self, restarts: int, jobs: Path) -> None:
        import torch

        from tmass_dist.distributed import StopRequest, finish, is_main
        from tmass_dist.evaluate import evaluate
        from tmass_dist.train import train

        stop = StopRequest()
        torch.set_num_threads(self.cpu_threads)
        if restarts > self.requeues:
            raise ValueError(f"the job was started again {restarts} times, more than --requeues {self.requeues}")
        if restarts and os.environ["RANK"] == "0":
            with (jobs / "restarts.log").open("a", encoding="utf-8") as log:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                log.write(f"{stamp} restart {restarts} of at most {self.requeues}: {_last_end()}\n")
        if not train(self.config, stop):
            if is_main():
                print("stopped on request and saved", file=sys.stderr, flush=True)
            os._exit(STOPPED)
        evaluate(self.config)
        finish()


def _meeting_point(path: Path, env: Any) -> tuple[str, str]:
    """Host and port where the ranks meet: rank 0 asks its system for a free port and tells the others by a file."""
    if env.global_rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        host = env.hostname if env.num_nodes > 1 else "127.0.0.1"
        path.with_suffix(".tmp").write_text(f"{host} {port}", encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
    deadline = time.monotonic() + 120
    while not path.is_file():
        if time.monotonic() > deadline:
            raise ValueError(f"rank 0 did not start within 120 s: {path} is missing")
        time.sleep(0.05)
    host, port = path.read_text(encoding="utf-8").split()
    return host, port


def _last_end() -> str:
    """How SLURM says that the attempt before this one ended."""
    command = ["sacct", "-D", "-X", "--noheader", "--parsable2", "-j", os.environ["SLURM_JOB_ID"]]
    try:
        done = subprocess.run(
            [*command, "--format=State,NodeList,ExitCode"], capture_output=True, text=True, timeout=30
        )
        lines = [line for line in done.stdout.splitlines() if not line.startswith(("RUNNING", "PENDING"))]
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    return lines[-1].replace("|", " ") if lines else "the reason is not on record"
