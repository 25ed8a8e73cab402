"""Worker processes that decode videos: a crash, a hang or too much memory costs one video, never the packing."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.own_videos import Row
from shards.pack_video import BadVideoError, Recipe, pack_row
from tmass_dist.errors import UserError

AHEAD = 8
"""Videos for each worker that are packed before the oldest one is taken; it bounds the memory of waiting results."""


@dataclass(frozen=True)
class Limits:
    """What one video may use."""

    seconds: float = 1800.0
    """Of wall-clock time."""
    memory_gb: float = 4.0
    """In addition to what the worker process has when it starts. Enforced on Linux only."""

    def __post_init__(self) -> None:
        for option, value in (("--time-limit-s", self.seconds), ("--memory-limit-gb", self.memory_gb)):
            if not 0 < value < float("inf"):
                raise UserError(f"{option} is {value}; it must be above 0 and finite")


@dataclass(frozen=True)
class Job:
    """One video to pack."""

    row: Row
    videos: Path
    """The directory that the row's path starts from."""
    recipe: Recipe


@dataclass(frozen=True)
class Packed:
    """A video that was packed, or the reason why not."""

    row: Row
    members: dict[str, bytes] | None = None
    facts: dict[str, Any] | None = None
    reason: str = ""
    try_again: bool = False
    """Whether packing may succeed later: the video itself was not found to be bad."""


def pack_job(job: Job) -> Packed:
    """Pack one video in this process."""
    try:
        members, facts = pack_row(job.videos, job.row, job.recipe)
        return Packed(job.row, members, facts)
    except BadVideoError as error:
        return Packed(job.row, reason=str(error))
    except MemoryError:
        return Packed(job.row, reason="it needs more memory than --memory-limit-gb", try_again=True)
    except Exception as error:
        return Packed(job.row, reason=f"{type(error).__name__}: {error}", try_again=isinstance(error, OSError))


def pack_all(jobs: Iterable[Job], workers: int, limits: Limits) -> Generator[Packed, None, None]:
    """Pack videos in worker processes; results come in the order of ``jobs``.

    A worker that dies or exceeds a limit is replaced; the video that it had is returned with the reason.
    """
    import multiprocessing

    from pebble import ProcessExpired, ProcessPool

    pool = ProcessPool(
        workers,
        context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(limits.memory_gb,),
    )
    waiting: deque[tuple[Job, Any]] = deque()
    remaining = iter(jobs)
    try:
        while True:
            while len(waiting) < workers * AHEAD and (job := next(remaining, None)) is not None:
                waiting.append((job, pool.schedule(pack_job, (job,), timeout=limits.seconds)))
            if not waiting:
                return
            job, future = waiting.popleft()
            try:
                yield future.result()
            except TimeoutError:
                reason = f"it takes longer than --time-limit-s {limits.seconds:g}"
                yield Packed(job.row, reason=reason, try_again=True)
            except ProcessExpired as error:
                yield Packed(job.row, reason=_cause_of_death(error.exitcode), try_again=True)
    finally:
        pool.stop()
        pool.join()


def _cause_of_death(exit_code: int | None) -> str:
    import signal

    if exit_code is None or exit_code >= 0:
        return f"its process ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _start_worker(memory_gb: float) -> None:
    """Import what packing needs, limit this process's memory, and end it when the packing process ends."""
    import multiprocessing
    import multiprocessing.connection
    import signal

    import av  # noqa: F401
    import simplejpeg  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the packing process answers it
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()
    status = Path("/proc/self/status")
    if status.is_file():
        import resource

        used = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = used * 1024 + int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def _exit_after(sentinel: int) -> None:
    """End this process when the one behind ``sentinel`` has ended, however that happened."""
    import multiprocessing.connection

    multiprocessing.connection.wait([sentinel])
    os._exit(1)
