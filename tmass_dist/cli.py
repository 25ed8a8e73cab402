"""How every command ends: a person's mistake is one line on stderr and exit code 2, never a traceback."""

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
        UserError: in one line, when it cannot.
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
    """Write aside and rename, so that a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def share_of(text: str, option: str) -> tuple[int, int]:
    """``I/N`` as numbers.

    Raises:
        UserError: it is no share.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"{option} {text} is no share; write I/N with I from 0 to N - 1, as 3/8")
    return int(found[1]), int(found[2])
