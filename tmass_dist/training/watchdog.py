"""Ends a rank, with a line that says why, when another rank is gone or nothing progresses."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from types import TracebackType

from tmass_dist.cli import MACHINE_FAILURE, print_error
from tmass_dist.distributed import all_gather_objects, collectives_entered, is_main, open_store, rank, world_size
from tmass_dist.errors import MachineError, PeerLostError
from tmass_dist.training.heartbeats import Heartbeats

_COLLECTIVE_ERROR = re.compile(r"gloo|nccl|tcpstore|connection|socket|broken pipe|timed out waiting", re.IGNORECASE)
SILENCE_S = 20.0
"""Seconds without a heartbeat after which a rank is taken for dead. A busy interpreter is silent for less."""

ADVICE = "; raise engine.timeout_s if a step may take so long"


class Watchdog:
    """Sends heartbeats and watches those of the other ranks; a context around the training loop.

    A rank that fails reports it before it ends. A rank whose collective fails asks for the reason. A thread ends the
    rank, even while a collective blocks it, if another rank failed or is silent, or if it made no step in ``limit_s``.

    Args:
        limit_s: seconds that a step may take; in validation and saving, seconds between two calls of :meth:`progress`.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.period_s = min(1.0, limit_s / 4)
        self.silence_s = max(4 * self.period_s, min(SILENCE_S, limit_s))
        self._leaving, self._done = threading.Event(), threading.Event()
        self._step, self._progress_at = -1, time.monotonic()
        self._heartbeats: Heartbeats | None = None
        self._store_answered_at = 0.0

    def __enter__(self) -> Watchdog:
        if world_size() > 1:
            self._heartbeats = Heartbeats(open_store(), rank(), world_size(), self.period_s)
            all_gather_objects(None)  # every rank has written its first heartbeat
            self._store_answered_at = time.monotonic()
            threading.Thread(target=self._exchange, name="heartbeats", daemon=True).start()
        self._progress_at = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def begin_step(self, step: int) -> None:
        """This rank begins step ``step`` (from 0)."""
        self._step, self._progress_at = step, time.monotonic()

    def progress(self) -> None:
        """This rank is still working, for example on the next batch of a validation."""
        self._progress_at = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()  # from now on this thread says why, and not the one that watches
        try:
            self._leave(error)
        finally:
            self._done.set()

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            all_gather_objects(None)  # no rank needs the store any more
        elif isinstance(error, PeerLostError) or "DataLoader worker" in str(error):
            # The death of a worker is a signal to its parent, wherever that is; torch turns it into a RuntimeError.
            line = " ".join(str(error).split())
            line = line if isinstance(error, PeerLostError) else f"a decoding process ended or hangs: {line}"
            self._report(line)
            raise PeerLostError(f"rank {rank()}: {line}") from error
        elif isinstance(error, RuntimeError) and _COLLECTIVE_ERROR.search(str(error)):
            raise PeerLostError(self._reason("a collective failed")) from error
        else:
            kind = "" if isinstance(error, MachineError) else f"{type(error).__name__}: "
            self._report(kind + " ".join(str(error).split()))

    def _report(self, error: str) -> None:
        """Tell the other ranks; if rank 0 does not answer, give up after a few seconds."""
        if self._heartbeats is not None:
            thread = threading.Thread(target=self._send_report, args=(self._heartbeats, error), daemon=True)
            thread.start()
            thread.join(5 * self.period_s)

    def _send_report(self, heartbeats: Heartbeats, error: str) -> None:
        try:
            heartbeats.report_failure(error)
        except RuntimeError:
            return  # rank 0 is gone
        if is_main():  # the store ends with this rank: let the others read it first
            time.sleep(3 * self.period_s)

    def _exchange(self) -> None:
        """Send and read heartbeats; if rank 0 is stopped, this blocks for good."""
        assert self._heartbeats is not None
        while not self._done.wait(self.period_s):
            try:
                self._heartbeats.exchange(self._step, collectives_entered())
            except RuntimeError:
                return  # rank 0 is gone, which the age of the last answer will tell
            self._store_answered_at = time.monotonic()

    def _watch(self) -> None:
        """End this rank if there is a reason to, and its main thread did not within a few seconds."""
        noticed_at = None
        while not self._leaving.wait(self.period_s):
            if time.monotonic() - self._progress_at > self.limit_s:
                self._end(self._reason())
            lost = self._lost_rank(self.silence_s)
            noticed_at = None if lost is None else noticed_at or time.monotonic()
            # A gloo collective fails when its peer ends, and the main thread then reports it. One of NCCL waits on.
            if lost is not None and noticed_at is not None and time.monotonic() - noticed_at > 4 * self.period_s:
                self._end(lost)

    def _end(self, reason: str) -> None:
        if not self._leaving.is_set():
            line = f"rank {rank()}: {reason}"
            logging.getLogger("tmass_dist").info("ended: %s", line)
            print_error(line)
            os._exit(MACHINE_FAILURE)

    def _lost_rank(self, silence_s: float) -> str | None:
        """One line that names a rank which failed or was silent for ``silence_s``; None if there is none."""
        if self._heartbeats is None:
            return None
        summary, now = self._heartbeats.summary, time.monotonic()
        others_failed = {number: error for number, error in summary.failed.items() if number != str(rank())}
        if others_failed:
            return "; ".join(f"rank {number} failed: {error}" for number, error in others_failed.items())
        here = f"this rank waited for it at step {self._step + 1}"
        silent_since = min(self._store_answered_at, self._heartbeats.summary_changed_at)
        if now - silent_since > silence_s:
            return f"rank 0 is gone or stopped; {here}"
        silent = [(other, step) for other, step, age in summary.silent if other != rank() and age > silence_s]
        if silent:
            names = ", ".join(f"{other} (last seen at step {step})" for other, step in silent)
            return f"rank {names} is gone or stopped; {here}"
        return None

    def _reason(self, event: str | None = None) -> str:
        """One line that names the rank which failed, fell silent, or is behind; it may take a few seconds.

        Args:
            event: what happened; by default, no step was made in time.
        """
        event, advice = event or f"no step within {self.limit_s:.0f} s", "" if event else ADVICE
        if self._heartbeats is None:
            return f"{event} at step {self._step + 1}{advice}"
        patience_s = 3 * self.period_s
        deadline = time.monotonic() + patience_s + 2 * self.period_s
        while time.monotonic() < deadline:
            lost = self._lost_rank(patience_s)
            if lost is not None:
                return lost
            time.sleep(self.period_s / 2)
        # All are alive, and one of them has not entered the collective in which the others wait.
        behind, step = self._heartbeats.summary.behind
        return f"{event}; rank {behind} is behind, at step {step} (this rank: {self._step + 1}){advice}"
