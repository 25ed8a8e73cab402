"""The version of the code that runs, which results state."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from tmass_dist import __version__

COMMIT_FILE = "COMMIT"
"""Beside the packages in a copy of the code that a job runs: the commit that was copied."""
_ROOT = Path(__file__).resolve().parents[1]


@cache
def revision() -> str:
    """For example ``0.2.0, commit 1a2b3c4d5e6f with changes``; the version alone where no commit is known."""
    commit = _commit()
    return f"{__version__}, commit {commit}" if commit else __version__


def _commit() -> str | None:
    try:
        return (_ROOT / COMMIT_FILE).read_text(encoding="utf-8").strip() or None
    except OSError:
        pass
    # An installed package may lie inside a repository of the user, whose commit says nothing about this code.
    if not (_ROOT / ".git").exists():
        return None
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return f"{head}{' with changes' if changes else ''}" if head else None


def _git(*arguments: str) -> str:
    """Output of a git command in this checkout; empty if it fails."""
    command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
