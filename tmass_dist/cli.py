"""What every command shares: errors in one line, output directories, atomic JSON files."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tmass_dist.errors import PeerLostError, UserError


def run_command(command: Callable[[], None]) -> None:
    """Run ``command``; a user error or a file error is printed in one line without a traceback, with exit code 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except PeerLostError as error:
        # Threads of a broken collective may never end, so the process does not wait for them.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def program(usual: str) -> str:
    """Name of the running command for its usage line: ``usual``, or ``tmass NAME`` if ``tmass`` started it."""
    return sys.argv[0] if sys.argv[0].startswith("tmass ") else usual


def writable_dir(path: str | Path) -> Path:
    """Create the directory, and check that files can be written there.

    Raises:
        UserError: they cannot.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".write-probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}; choose another directory") from error
    return directory


def write_json(path: Path, value: Any) -> None:
    """Write a temporary file and rename it, so that a reader sees either the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def share_of(text: str, option: str) -> tuple[int, int]:
    """Both numbers of ``I/N``, as given to ``option``.

    Raises:
        UserError: not of this form, or I is not below N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"{option} {text} is no share; write I/N with I from 0 to N - 1, as 3/8")
    return int(match[1]), int(match[2])
