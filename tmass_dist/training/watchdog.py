"""No rank waits for ever: when one is gone or hangs, the others end with a line that names it."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from types import TracebackType
from typing import Any

from tmass_dist.distributed import all_gather_objects, collectives_entered, is_main, open_store, rank, world_size
from tmass_dist.errors import PeerLostError

_OF_A_COLLECTIVE = re.compile(r"gloo|nccl|tcpstore|connection|socket|broken pipe|timed out waiting", re.IGNORECASE)


class Watchdog:
    """Every rank tells the others, through a store on rank 0, where it is; a context around the training loop.

    A rank that fails says so before it ends. A rank whose collective breaks asks the store why. A thread ends a rank
    that made no step in ``limit_s``, wherever it hangs, after asking the same.

    Args:
        limit_s: seconds that a step may take; validation and its checkpoint included.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.period_s = min(1.0, limit_s / 4)
        self._done = threading.Event()
        self._step, self._at, self._beats = -1, time.monotonic(), 0
        self._store: Any = None
        self._seen: dict[int, tuple[str, float]] = {}
        self._failed: dict[int, str] = {}
        self._heard = 0.0

    def __enter__(self) -> Watchdog:
        if world_size() > 1:
            self._store = open_store()
            self._heard = time.monotonic()
            threading.Thread(target=self._talk, name="watch-talk", daemon=True).start()
        self._at = time.monotonic()
        threading.Thread(target=self._limit, name="watch-limit", daemon=True).start()
        return self

    def beat(self, step: int) -> None:
        """This rank begins step ``step`` (from 0)."""
        self._step, self._at = step, time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                all_gather_objects(None)  # nobody needs the store any more
            elif isinstance(error, PeerLostError) or "DataLoader worker" in str(error):
                # A worker's death is a signal to its parent, wherever that is; torch makes it a RuntimeError.
                line = " ".join(str(error).split())
                line = line if isinstance(error, PeerLostError) else f"a decoding process ended or hangs: {line}"
                self._tell(line)
                raise PeerLostError(f"rank {rank()}: {line}") from error
            elif isinstance(error, RuntimeError) and _OF_A_COLLECTIVE.search(str(error)):
                raise PeerLostError(self._why()) from error
            elif error is not None:
                self._tell(f"{type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            self._done.set()

    def _tell(self, why: str) -> None:
        if self._store is not None:
            try:
                self._store.set(f"failed/{rank()}", why)
                time.sleep(2 * self.period_s if is_main() else 0)  # rank 0 takes the store with it: let the others read
            except RuntimeError:
                pass  # rank 0 is gone already

    def _talk(self) -> None:
        """Tell the store where this rank is and read about the others; if rank 0 is stopped, this waits for ever."""
        while not self._done.wait(self.period_s):
            self._beats += 1
            try:
                self._store.set(f"beat/{rank()}", f"{self._beats} {self._step} {collectives_entered()}")
                for other in range(world_size()):
                    if other not in self._failed and self._store.check([f"failed/{other}"]):
                        self._failed[other] = self._store.get(f"failed/{other}").decode()
                    key = f"beat/{other}"
                    word = self._store.get(key).decode() if self._store.check([key]) else ""
                    if other not in self._seen or self._seen[other][0] != word:
                        self._seen[other] = (word, time.monotonic())
            except RuntimeError:
                return  # rank 0 is gone, as the age of this word will tell
            self._heard = time.monotonic()

    def _limit(self) -> None:
        while not self._done.wait(self.period_s):
            if time.monotonic() - self._at > self.limit_s:
                why = self._why()
                if not self._done.is_set():
                    print(f"error: rank {rank()}: {why}", file=sys.stderr, flush=True)
                    os._exit(1)

    def _why(self) -> str:
        """One line: who failed, who fell silent, or who is behind."""
        here = f"this rank waited for it at step {self._step + 1}"
        if self._store is None:
            return (
                f"no step within {self.limit_s:.0f} s at step {self._step + 1}; "
                "raise engine.timeout_s if a step may take so long"
            )
        patience_s = 3 * self.period_s
        deadline = time.monotonic() + patience_s + self.period_s
        while True:
            if self._failed:
                return "; ".join(f"rank {number} failed: {why}" for number, why in self._failed.items())
            now = time.monotonic()
            if now - self._heard > patience_s:
                return f"rank 0 is gone or stopped; {here}"
            silent = [n for n, (_, at) in self._seen.items() if n != rank() and now - at > patience_s]
            if silent:
                names = ", ".join(f"{n} (last seen at step {self._last(n)})" for n in silent)
                return f"rank {names} is gone or stopped; {here}"
            if now > deadline:
                # Alive, and yet it has not entered the exchange in which the others wait.
                behind = min(self._seen, key=lambda number: int((self._seen[number][0].split() or [0])[-1]))
                return (
                    f"no step within {self.limit_s:.0f} s; rank {behind} is behind, at step {self._last(behind)} (this "
                    f"rank: {self._step + 1}); raise engine.timeout_s if a step may take so long"
                )
            time.sleep(self.period_s / 2)

    def _last(self, number: int) -> int:
        words = self._seen[number][0].split()
        return int(words[1]) + 1 if words else 0
