"""The process of a node that downloads shards ahead of their use and deletes those that are needed last.

One process serves all ranks of a node; they meet in the cache's directory, where each shard is a file:

- ``NAME`` is complete and checked; ``NAME.fetched`` says that we downloaded it, so we may delete it;
- ``NAME.wanted`` is written by a worker that waits for the shard;
- ``NAME.failed`` says why the shard cannot be downloaded;
- ``fetcher.alive`` is touched every second; ``rank-R.step`` holds the step that a rank has read.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tmass_dist.cli import write_json
from tmass_dist.data.cache import CachePlan
from tmass_dist.data.remote import DownloadError, cached_path, fetch, is_remote
from tmass_dist.errors import PeerLostError, UserError

PARALLEL = 4
"""Downloads at a time."""
POLL_S = 0.02
SILENT_S = 60.0
"""A fetcher that has not touched ``fetcher.alive`` for so long is taken for dead."""
DEMAND_S = 60.0
"""A shard that a worker waited for is not deleted for so long."""


@dataclass(frozen=True)
class RemoteShard:
    """A shard behind a URL, and where its local copy is kept; or a local file, if ``url`` is a path."""

    url: str
    cache: str
    bytes: int
    sha256: str

    @property
    def is_remote(self) -> bool:
        return is_remote(self.url)

    @property
    def path(self) -> Path:
        return cached_path(self.url, self.cache) if self.is_remote else Path(self.url)

    def beside(self, suffix: str) -> Path:
        """A file that says something about the shard."""
        return self.path.with_name(f"{self.path.name}.{suffix}")

    def is_here(self) -> bool:
        try:
            return self.path.stat().st_size == self.bytes
        except FileNotFoundError:
            return False


def wait_for(shard: RemoteShard, directory: Path) -> Path:
    """The path of a shard, as soon as the node's fetcher has downloaded it.

    Args:
        shard: the shard.
        directory: the cache.

    Raises:
        UserError: the store has no such shard, or another file.
        DownloadError: the download failed for ``data.retry_s`` seconds.
        PeerLostError: the fetcher is dead.
    """
    began = time.monotonic()
    while shard.is_remote and not shard.is_here():
        if shard.beside("failed").is_file():
            failure = json.loads(shard.beside("failed").read_text(encoding="utf-8"))
            raise (UserError if failure["by_user"] else DownloadError)(failure["message"])
        if time.monotonic() - began > 1:
            shard.beside("wanted").touch()
            if time.monotonic() - began > SILENT_S and _silent_s(directory) > SILENT_S:
                raise PeerLostError(f"the process that downloads shards into {directory} has ended")
        time.sleep(POLL_S)
    return shard.path


def _silent_s(directory: Path) -> float:
    """Seconds since the fetcher was last known to be alive."""
    try:
        return time.time() - (directory / "fetcher.alive").stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def write_step(directory: Path, rank: int, step: int) -> None:
    """Say that a rank has read all batches before ``step``."""
    descriptor = os.open(directory / f"rank-{rank}.step", os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(descriptor, step.to_bytes(8, "little"), 0)
    finally:
        os.close(descriptor)


class Fetcher:
    """Starts and ends the process that downloads the shards of a node.

    Args:
        shards: all shards of the split.
        make_plan: makes the plan, from the shards that we may delete and those that we may not.
        directory: the cache; ranks of the node exchange their steps in it.
        ranks: ranks of the node.
        retry_s: seconds for which a download that fails is tried again.
    """

    def __init__(
        self,
        shards: list[RemoteShard],
        make_plan: Callable[[list[int], list[int]], CachePlan],
        directory: Path,
        ranks: list[int],
        retry_s: float,
    ) -> None:
        self._shards, self._make_plan, self._directory, self._ranks = shards, make_plan, directory, ranks
        self._retry_s, self._parent = retry_s, os.getpid()
        self._number_of = {shard.beside("wanted"): number for number, shard in enumerate(shards) if shard.is_remote}
        self._folders = {path.parent for path in self._number_of}
        context = multiprocessing.get_context("fork")
        receiver, self._sender = context.Pipe(duplex=False)
        self._process = context.Process(target=self._run, daemon=True, name="shard fetcher")
        self._process.start()
        self._sender.close()
        try:
            error = receiver.recv()
        except EOFError:
            raise PeerLostError(f"the process that downloads shards into {directory} did not start") from None
        if error:
            self.close()
            raise UserError(error)

    def close(self) -> None:
        """End the process. Downloaded shards stay; unfinished downloads are removed."""
        self._process.kill()
        self._process.join()
        for folder in self._folders:
            for unfinished in folder.glob(f"*.{self._process.pid}.tmp"):
                unfinished.unlink(missing_ok=True)

    def _run(self) -> None:
        import filelock

        # SLURM signals every process of a step; only the training process may act on it.
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self._directory / "fetcher.lock")
        try:
            lock.acquire(timeout=10)  # the fetcher of a run that was killed ends within a second
        except filelock.Timeout:
            self._sender.send(
                f"another run with data.cache_gb uses the cache {self._directory}; set another data.cache"
            )
            os._exit(0)
        try:
            plan = self._clean_and_plan()
            (self._directory / "fetcher.alive").touch()
        except BaseException:
            self._sender.close()
            raise
        self._sender.send(None)
        self._sender.close()
        with ThreadPoolExecutor(PARALLEL) as pool:
            self._loop(plan, pool)

    def _clean_and_plan(self) -> CachePlan:
        """Remove what a killed run left behind, and plan from what is here."""
        for shard in (self._shards[number] for number in self._number_of.values()):
            for leftover in (shard.beside("failed"), shard.beside("wanted")):
                leftover.unlink(missing_ok=True)
        for folder in self._folders:
            for leftover in folder.glob("*.tmp"):
                process = leftover.name.split(".")[-2]
                if process.isdigit() and not Path(f"/proc/{process}").exists():
                    leftover.unlink(missing_ok=True)
        for rank in self._ranks:
            (self._directory / f"rank-{rank}.step").unlink(missing_ok=True)
        here = [number for number, shard in enumerate(self._shards) if shard.is_here()]
        remote = set(self._number_of.values())
        ours = [number for number in here if number in remote and self._shards[number].beside("fetched").is_file()]
        plan = self._make_plan(ours, sorted(set(here) - set(ours)))
        for number in plan.shrink():
            self._delete(number)
        return plan

    def _loop(self, plan: CachePlan, pool: ThreadPoolExecutor) -> None:
        downloads: dict[Future[None], int] = {}
        demanded: dict[int, float] = {}
        next_beat = 0.0
        while True:
            if os.getppid() != self._parent:
                os._exit(0)
            for future in [future for future in downloads if future.done()]:
                number = downloads.pop(future)
                if self._note_end(number, future):
                    plan.downloaded(number)
            plan.advance(max(plan.step, self._lowest_step(plan.step)))
            while len(downloads) < PARALLEL and (next_download := plan.next_download()):
                number, deleted = next_download
                downloads[self._start(pool, number, deleted)] = number
            now = time.monotonic()
            if now > next_beat:
                next_beat = now + 1
                (self._directory / "fetcher.alive").touch()
                plan.pinned = {number for number, end in demanded.items() if now < end}
                for number in self._wanted():
                    if self._shards[number].is_here():
                        self._shards[number].beside("wanted").unlink(missing_ok=True)
                        continue
                    plan.lost(number)
                    deleted = plan.demand(number)
                    if deleted is not None:
                        downloads[self._start(pool, number, deleted)] = number
                        demanded[number] = now + DEMAND_S
            time.sleep(POLL_S)

    def _lowest_step(self, default: int) -> int:
        """The step that all ranks of the node have reached."""
        steps = []
        for rank in self._ranks:
            try:
                content = (self._directory / f"rank-{rank}.step").read_bytes()
            except FileNotFoundError:
                return default
            steps.append(int.from_bytes(content, "little") if len(content) == 8 else default)
        return min(steps)

    def _wanted(self) -> list[int]:
        return [self._number_of[path] for folder in self._folders for path in folder.glob("*.wanted")]

    def _start(self, pool: ThreadPoolExecutor, number: int, deleted: list[int]) -> Future[None]:
        for other in deleted:
            self._delete(other)
        return pool.submit(self._download, number)

    def _delete(self, number: int) -> None:
        shard = self._shards[number]
        shard.path.unlink(missing_ok=True)
        for suffix in ("fetched", "lock", "wanted"):
            shard.beside(suffix).unlink(missing_ok=True)

    def _download(self, number: int) -> None:
        shard = self._shards[number]
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        if not shard.is_here():
            shard.beside("fetched").touch()
        fetch(shard.url, shard.cache, shard.bytes, shard.sha256, retry_s=self._retry_s)

    def _note_end(self, number: int, future: Future[None]) -> bool:
        shard, error = self._shards[number], future.exception()
        shard.beside("wanted").unlink(missing_ok=True)
        if error is None:
            return True
        failure = {"by_user": isinstance(error, UserError), "message": str(error)}
        write_json(shard.beside("failed"), failure)
        return False
