"""Where every rank is, told through a key-value store: two requests a rank and period, whatever the number of ranks.

Each rank writes its own position and reads one summary. Rank 0 reads all positions in one request and writes the
summary.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

NUM_NAMED = 8
"""Silent ranks that a summary names at most."""


@dataclass(frozen=True)
class Summary:
    """What rank 0 knows of all ranks."""

    number: int = 0
    """Summaries written so far."""
    failed: dict[str, str] = field(default_factory=dict)
    """By rank: the error that it reported."""
    silent: list[tuple[int, int, float]] = field(default_factory=list)
    """Rank, last step and seconds since its last heartbeat, of ranks that missed several; longest silent first."""
    behind: tuple[int, int] = (0, 0)
    """Rank and step of the rank that entered the fewest collectives."""


class Heartbeats:
    """One rank's connection.

    Args:
        store: a ``torch.distributed.TCPStore``.
        rank, world_size: of this process.
        period_s: seconds between two calls of :meth:`exchange`.
    """

    def __init__(self, store: Any, rank: int, world_size: int, period_s: float) -> None:
        self.store, self.rank, self.world_size, self.period_s = store, rank, world_size, period_s
        self.summary = Summary()
        self.summary_changed_at = time.monotonic()
        self._number = 0
        self._last_seen: dict[int, tuple[bytes, float]] = {}
        self._write(-1, 0)  # so that rank 0 finds a position of every rank, once all ranks are here
        if rank == 0:
            store.set("failures", "")
            store.set("summary", json.dumps(vars(Summary())))

    def exchange(self, step: int, num_collectives: int) -> None:
        """Write this rank's position and read the summary.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        self._write(step, num_collectives)
        if self.rank == 0:
            self.store.set("summary", json.dumps(vars(self._summarise())))
        summary = Summary(**json.loads(self.store.get("summary")))
        if summary.number != self.summary.number:
            self.summary_changed_at = time.monotonic()
        self.summary = summary

    def report_failure(self, error: str) -> None:
        """Tell all ranks that this one failed."""
        self.store.append("failures", json.dumps([self.rank, error]) + "\n")

    def failures(self) -> dict[str, str]:
        """By rank: the reported errors, read from the store."""
        lines = self.store.get("failures").decode().split("\n")
        return {str(rank): error for rank, error in (json.loads(line) for line in lines if line)}

    def _write(self, step: int, num_collectives: int) -> None:
        self._number += 1
        self.store.set(f"position/{self.rank}", f"{self._number} {step} {num_collectives}")

    def _summarise(self) -> Summary:
        now = time.monotonic()
        positions = self.store.multi_get([f"position/{rank}" for rank in range(self.world_size)])
        for rank, position in enumerate(positions):
            if rank not in self._last_seen or self._last_seen[rank][0] != position:
                self._last_seen[rank] = (position, now)
        steps = [int(position.split()[1]) + 1 for position in positions]
        collectives = [int(position.split()[2]) for position in positions]
        behind = min(range(self.world_size), key=collectives.__getitem__)
        ages = sorted(((now - at, rank) for rank, (_, at) in self._last_seen.items()), reverse=True)
        silent = [(rank, steps[rank], age) for age, rank in ages[:NUM_NAMED] if age > 3 * self.period_s]
        return Summary(self.summary.number + 1, self.failures(), silent, (behind, steps[behind]))
