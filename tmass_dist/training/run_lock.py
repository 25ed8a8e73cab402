"""One writer for a run directory."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tmass_dist.cli import read_json, write_json
from tmass_dist.distributed import is_main, share_failure
from tmass_dist.errors import UserError

PATIENCE_S = 10.0
"""Seconds to wait for the lock: an attempt that is ending may still hold it."""


class RunLock:
    """Held by rank 0 of the one start that trains in ``run_dir``; a context that every rank enters.

    It is a lock of the operating system, which ends with the process. NFS version 4 has it, too, and releases that of a
    dead host after its lease time. ``lock.json`` says who holds it.
    """

    def __init__(self, run_dir: Path, patience_s: float = PATIENCE_S) -> None:
        from filelock import FileLock

        self.holder = run_dir / "lock.json"
        self.run_dir, self.patience_s = run_dir, patience_s
        self._lock = FileLock(run_dir / ".lock")

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            UserError: another process holds it; its host, number and start are named.
        """
        failure = None
        if is_main():
            try:
                self._acquire()
            except Exception as error:
                failure = error
        share_failure(failure)
        return self

    def _acquire(self) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=self.patience_s)
        except Timeout:
            holder = read_json(self.holder, dict) or {}
            raise UserError(
                f"{self.run_dir} is in use by process {holder.get('process', '?')} on {holder.get('host', '?')}, since "
                f"{holder.get('since', '?')}; stop that one, or give another run_dir"
            ) from None
        except NotImplementedError:
            return  # a file system without locks
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(self.holder, {"host": socket.gethostname(), "process": os.getpid(), "since": since})

    def __exit__(self, *_: object) -> None:
        if is_main():
            self.holder.unlink(missing_ok=True)
            self._lock.release()
