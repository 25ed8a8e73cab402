"""The work of a job's tasks. submitit pickles these classes by reference, so they live in an importable module."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from launch.failures import STOPPED, USER_ERROR, end_task, fail, finish_for_good
from tmass_dist.config import Config
from tmass_dist.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Sent before a time limit or a preemption."""


@dataclass
class RankedJob:
    """Ranks that work together: they train, then evaluate or encode; or one of these alone.

    Args:
        config: the run.
        folder: of this submission's logs and notes.
        do: what to do, in order.
        requeues: how often the job may start again.
        cpu_threads: threads of a rank on CPUs.
    """

    config: Config
    folder: str
    do: tuple[Literal["train", "encode", "evaluate"], ...] = ("train", "evaluate")
    requeues: int = 3
    cpu_threads: int = 1

    def __call__(self) -> None:
        import submitit

        env = submitit.JobEnvironment()
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if restarts:
            # The result of an earlier start is no longer valid.
            env.paths.result_pickle.unlink(missing_ok=True)
        try:
            self._run(env, restarts)
        except Exception as error:
            end_task(
                error,
                folder=Path(self.folder),
                job_id=env.job_id,
                restarts=restarts,
                name=f"rank {env.global_rank}",
                run=Path(self.config.run_dir),
            )

    def _run(self, env: Any, restarts: int) -> None:
        if restarts > self.requeues:
            raise UserError(f"the job was started again {restarts} times, more than --requeues {self.requeues}")
        if restarts and env.global_rank == 0:
            self._log_restart(env.job_id, restarts)
        if not self._join(env, restarts):
            return
        import torch

        from tmass_dist.distributed import StopRequest, finish, is_main
        from tmass_dist.evaluation.run import encode_run, evaluate_run
        from tmass_dist.training.loop import train

        torch.set_num_threads(self.cpu_threads)
        if "train" in self.do and not train(self.config, StopRequest()):
            if is_main():
                print("stopped on request and saved", file=sys.stderr, flush=True)
            os._exit(STOPPED)
        _exit_on_signals()  # what is scored is kept, and the next start continues from there
        if "encode" in self.do:
            encode_run(self.config)
        if "evaluate" in self.do:
            evaluate_run(self.config)
        finish()
        _ignore_signals()

    def _join(self, env: Any, restarts: int) -> bool:
        """Set the variables by which ranks find each other; False for a rank that the batch has no work for."""
        from tmass_dist.training.checks import usable_ranks

        world = usable_ranks(self.config, env.num_tasks)
        if env.global_rank >= world:
            print(f"the batch of {self.config.data.batch_size} divides by {world} ranks: this one is idle", flush=True)
            return False
        host, port = _meeting_point(Path(self.folder) / f"{env.job_id}-{restarts}.meet", env)
        os.environ.update(
            RANK=str(env.global_rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(env.local_rank),
            OMP_NUM_THREADS=str(self.cpu_threads),
            MASTER_ADDR=host,
            MASTER_PORT=port,
        )
        return True

    def _log_restart(self, job_id: str, restarts: int) -> None:
        log = Path(self.config.run_dir) / "jobs" / "restarts.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{stamp} job {job_id} restart {restarts} of at most {self.requeues}: {_last_end()}\n")


@dataclass
class CommandJob:
    """A task that runs ``python`` with ``arguments`` in the submitted code, as a user could by hand."""

    arguments: tuple[str, ...]
    folder: str
    cpu_threads: int = 1

    def __call__(self) -> None:
        import submitit

        env = submitit.JobEnvironment()
        env.paths.result_pickle.unlink(missing_ok=True)
        os.environ["OMP_NUM_THREADS"] = str(self.cpu_threads)
        process = subprocess.Popen(
            [sys.executable, *self.arguments],
            cwd=Path(__file__).resolve().parents[1],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGKILL),
        )

        def stop(*_: Any) -> NoReturn:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            os._exit(STOPPED)

        for number in STOP_SIGNALS:
            signal.signal(number, stop)
        last = ""
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
        code = process.wait()
        _ignore_signals()
        if code == 0:
            return
        message = last.removeprefix("error: ") or f"{self.arguments[0]} ended with exit code {code}"
        if code == USER_ERROR:
            finish_for_good(Path(self.folder), env.job_id, message)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        fail(message, folder=Path(self.folder), job_id=env.job_id, restarts=restarts, name="")


def end_with_parent(number: int) -> Any:
    """For ``Popen(preexec_fn=...)``: the kernel sends the child this signal when its parent dies, however it dies.

    Does nothing on a system other than Linux.
    """
    parent = os.getpid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def prepare() -> None:
        if prctl is not None:
            prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)  # it died before the request

    return prepare


def _exit_on_signals(patience_s: float = 20.0) -> None:
    """From now on a stop signal ends this rank with ``STOPPED``; after ``patience_s`` even if it hangs."""

    def leave(*_: Any) -> NoReturn:
        fallback = threading.Timer(patience_s, os._exit, (STOPPED,))
        fallback.daemon = True
        fallback.start()
        print("stopped on request; the next start continues the evaluation", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED)

    for number in STOP_SIGNALS:
        signal.signal(number, leave)


def _ignore_signals() -> None:
    """The work is done. While Python exits it drops its handlers, and a late signal would then kill it."""
    for number in (signal.SIGUSR1, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def _meeting_point(path: Path, env: Any) -> tuple[str, str]:
    """Host and port where the ranks meet: rank 0 takes a free port and writes both to a file."""
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
            raise TimeoutError(f"rank 0 did not start within 120 s: {path} is missing")
        time.sleep(0.05)
    host, port = path.read_text(encoding="utf-8").split()
    return host, port


def _last_end() -> str:
    """How the previous start ended, as SLURM says."""
    command = ["sacct", "-D", "-X", "--noheader", "--parsable2", "-j", os.environ["SLURM_JOB_ID"]]
    try:
        answer = subprocess.run(
            [*command, "--format=State,NodeList,ExitCode"], capture_output=True, text=True, timeout=30
        )
        lines = [line for line in answer.stdout.splitlines() if not line.startswith(("RUNNING", "PENDING"))]
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    return lines[-1].replace("|", " ") if lines else "SLURM does not say why"
