"""What every command shares: how it ends, output directories, files written by rename."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any

from tmass_dist.errors import MachineError, PeerLostError, UserError

USER_ERROR, MACHINE_FAILURE, INTERRUPTED = 2, 1, 130
"""Exit codes."""


def run_command(command: Callable[[], None]) -> None:
    """Run ``command``. An error is one line on stderr.

    The exit code is 2 for a user error: a :class:`UserError`, or a file named on the command line that cannot be
    opened. It is 1 for everything else, whose traceback goes to the run's log, or to stderr if there is no log.
    """
    try:
        command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        code = report_error(error)
        if isinstance(error, PeerLostError):
            os._exit(code)  # threads of a broken collective may never end, so the process does not wait for them
        raise SystemExit(code) from None


def report_error(error: Exception) -> int:
    """Print one line about ``error`` on stderr, log its traceback if it is not the user's, return the exit code."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError) or _is_named_file(error):
        print_error(line)
        return USER_ERROR
    if not isinstance(error, MachineError):
        line = f"{type(error).__name__}: {line}"
    if log := _log_traceback(line, error):
        line += f" (traceback in {log})"
    elif not isinstance(error, PeerLostError):
        _new_line()
        traceback.print_exception(error)
    print_error(line)
    return MACHINE_FAILURE


def _log_traceback(line: str, error: Exception) -> str | None:
    """Write ``line`` and the traceback to the run's log; its path, or None if there is none that can be written."""
    files = [
        handler for handler in logging.getLogger("tmass_dist").handlers if isinstance(handler, logging.FileHandler)
    ]
    if not files:
        return None
    exc_info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("tmass_dist", logging.ERROR, "", 0, line, None, exc_info)
    try:
        for handler in files:
            handler.handle(record)
    except OSError:  # the log itself cannot be opened
        return None
    return files[0].baseFilename


def print_error(line: str) -> None:
    """Print ``error: ...`` on stderr, on a line of its own even if a progress bar is shown."""
    _new_line()
    print(f"error: {line}", file=sys.stderr, flush=True)


def _new_line() -> None:
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if any(not bar.disable for bar in list(getattr(tqdm, "_instances", ()))):
        print(file=sys.stderr)


def _is_named_file(error: Exception) -> bool:
    """Whether the error is that a file named on the command line is missing, forbidden or not a file."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    if not isinstance(error, kinds) or not isinstance(error.filename, str | bytes | os.PathLike):
        return False
    path = Path(os.fsdecode(error.filename)).absolute()
    named = [part for argument in sys.argv[1:] for part in (argument, argument.partition("=")[2]) if part]
    return any(Path(part).absolute() == path for part in named)


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
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same for text, as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """A temporary file beside ``path``, which is renamed to it at the end, and removed if writing it fails.

    Args:
        path: the file to write.
        mark: part of the temporary file's name, where several processes may write the same file.

    Raises:
        MachineError: it cannot be written, for example because the disk is full; the line names ``path``.
    """
    temporary = path.with_name(f"{path.name}{mark}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of writing ``path`` name it: that of a full disk does not, and each library has its own.

    Raises:
        MachineError: it cannot be written.
    """
    try:
        yield
    except Exception as error:
        is_named = isinstance(error, MachineError) or getattr(error, "filename", None) is not None
        is_write_error = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"
        if is_named or not is_write_error:
            raise
        raise MachineError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file if it is of type ``kind``; None if the file is missing or damaged.

    Use it for files that a run can do without; a damaged one is reported in the log.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logging.getLogger("tmass_dist").warning("%s is ignored: %s", path, error)
        return None
    if not isinstance(value, kind):
        logging.getLogger("tmass_dist").warning("%s is ignored: it holds no %s", path, kind.__name__)
        return None
    return value


def read_object(path: Path, keys: dict[str, type | UnionType], remedy: str) -> dict[str, Any]:
    """The object of a JSON file that cannot be done without.

    Args:
        path: of the file.
        keys: that the object must have, with the types of their values.
        remedy: what the user can do about a damaged file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"it holds no object but {type(value).__name__}")
        wrong = [key for key, kind in keys.items() if not isinstance(value.get(key), kind)]
        if wrong:
            raise TypeError(f"{wrong[0]} is missing or of another type")
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; {remedy}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from error
    return value


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8: half a surrogate pair cannot, and names of files may hold some."""
    return not re.search("[\ud800-\udfff]", text)


def printable(text: str) -> str:
    """The text for a terminal: line breaks and control characters, which a name of a file may hold, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def share_of(text: str, option: str) -> tuple[int, int]:
    """Both numbers of ``I/N``, as given to ``option``.

    Raises:
        UserError: not of this form, or I is not below N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"{option} {text} is no share; write I/N with I from 0 to N - 1, as 3/8")
    return int(match[1]), int(match[2])
