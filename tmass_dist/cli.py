"""How every command ends: a person's mistake is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


class PeerLostError(RuntimeError):
    """Another rank, or a process that works for this one, is gone or hangs: starting again may help."""


def run_command(command: Callable[[], None]) -> None:
    """Run ``command`` and exit; ``ValueError`` and file errors speak to the person who ran it."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except PeerLostError as error:
        # Threads of a broken collective may never end.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def writable_dir(path: str | Path) -> Path:
    """Make the directory and prove that it can be written.

    Raises:
        ValueError: in one line, when it cannot.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".write-probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {directory}: {error.strerror or error}; choose another directory") from error
    return directory
