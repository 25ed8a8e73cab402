"""What each task of a job runs. submitit pickles it by reference, so it lives in an importable module."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.cluster import FINAL_ERROR
from tmass_dist.config import Config
from tmass_dist.errors import PeerLostError, UserError

STOPPED = 85
"""Exit code of a rank that saved because it was asked to stop; the job is queued again."""


@dataclass
class RankedJob:
    """Ranks that work together: train, then evaluate or encode; or one of these alone.

    Args:
        config: the run.
        folder: of this submission's logs and notes.
        do: what to do, in order.
        requeues: how often the job may start again.
        cpu_threads: threads of a rank on CPU.
    """

    config: Config
    folder: str
    do: tuple[Literal["train", "encode", "evaluate"], ...] = ("train", "evaluate")
    requeues: int = 3
    cpu_threads: int = 1

    def __call__(self) -> None:
        import submitit

        from tmass_dist.training.checks import usable_ranks

        env = submitit.JobEnvironment()
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restarts:
            # An earlier attempt may have left a result that is no longer true.
            env.paths.result_pickle.unlink(missing_ok=True)
        world = usable_ranks(self.config, env.num_tasks)
        if env.global_rank >= world:
            print(f"the batch of {self.config.data.batch_size} divides by {world} ranks: this one is idle", flush=True)
            return
        os.environ.update(
            RANK=str(env.global_rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(env.local_rank),
            OMP_NUM_THREADS=str(self.cpu_threads),
        )
        host, port = _meeting_point(Path(self.folder) / f"{env.job_id}-{restarts}.meet", env)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
        try:
            self._run(restarts, env.job_id)
        except (ValueError, OSError) as error:
            if "SLURM_JOB_ID" not in os.environ:
                raise
            _end_for_good(self.folder, env.job_id, f"rank {env.global_rank}: {' '.join(str(error).split())}")
        except PeerLostError as error:
            print(f"error: rank {env.global_rank}: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def _run(self, restarts: int, job_id: str) -> None:
        import torch

        from tmass_dist.distributed import StopRequest, finish, is_main
        from tmass_dist.evaluation.encode import encode_run, evaluate
        from tmass_dist.training.loop import train

        stop = StopRequest()
        torch.set_num_threads(self.cpu_threads)
        if restarts > self.requeues:
            raise UserError(f"the job was started again {restarts} times, more than --requeues {self.requeues}")
        if restarts and os.environ["RANK"] == "0":
            log = Path(self.config.run_dir) / "jobs" / "restarts.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{stamp} job {job_id} restart {restarts} of at most {self.requeues}: {_last_end()}\n")
        if "train" in self.do and not train(self.config, stop):
            if is_main():
                print("stopped on request and saved", file=sys.stderr, flush=True)
            os._exit(STOPPED)
        if "encode" in self.do:
            encode_run(self.config)
        if "evaluate" in self.do:
            evaluate(self.config)
        finish()
        _ignore_signals()


@dataclass
class CommandJob:
    """One task that runs ``python`` with ``arguments`` in the code that was submitted, as a person could by hand."""

    arguments: tuple[str, ...]
    folder: str
    cpu_threads: int = 1

    def __call__(self) -> None:
        import submitit

        env = submitit.JobEnvironment()
        env.paths.result_pickle.unlink(missing_ok=True)
        os.environ["OMP_NUM_THREADS"] = str(self.cpu_threads)
        root = Path(__file__).resolve().parents[1]
        process = subprocess.Popen([sys.executable, *self.arguments], cwd=root, stderr=subprocess.PIPE, text=True)

        def stop(*_: Any) -> None:
            process.kill()
            os._exit(STOPPED)

        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, stop)
        last = ""
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
        code = process.wait()
        if code == 0:
            _ignore_signals()
            return
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError(last.removeprefix("error: ") or f"{self.arguments[0]} ended with {code}")
        if code == 2:
            _end_for_good(self.folder, env.job_id, last.removeprefix("error: "))
        os._exit(1)


def _ignore_signals() -> None:
    """The work is done: while the interpreter ends it drops its handlers, and SLURM's warning would then kill it."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_for_good(folder: str, job_id: str, line: str) -> None:
    """What a person must put right is not tried again."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    (Path(folder) / f"{FINAL_ERROR}-{job_id}.txt").write_text(f"error: {line}\n", encoding="utf-8")
    os._exit(2)


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
            raise UserError(f"rank 0 did not start within 120 s: {path} is missing")
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
