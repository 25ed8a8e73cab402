"""The rule for hostile input, in one place.

Each case runs in a process forked from the test's, which has all imports, under a limit of time and of memory. It must
end in one of two ways:

- with a result, which the test compares with an independent reading of the same input;
- with an error meant for users: one line that names the file. A command then exits with a code other than zero.

A traceback, another exception, an exceeded limit or a result that differs from the independent reading is a failure.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, settings

from tmass_dist.data.video import BadVideoError
from tmass_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT_S, CPU_LIMIT_S = 180, 30
"""For one case. The first is high because other processes may use the machine."""
MEMORY_LIMIT = 2**30
"""Bytes that a case may allocate."""
TOTAL = int(os.environ.get("FUZZ_CASES", "300"))
"""Cases of all forms together; ``make fuzz`` runs 10,000."""

counts: dict[str, Counter[str]] = {}
"""For each form of input: cases, results and errors; printed at the end, see ``conftest.py``."""
seconds: Counter[str] = Counter()


def cases(of_10000: int, least: int = 4) -> settings:
    """Settings of a test that runs ``of_10000`` cases when all forms together run 10,000."""
    return settings(
        max_examples=max(least, round(of_10000 * TOTAL / 10_000)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # A case takes a process, so a failure is printed as it was found.
        phases=(Phase.explicit, Phase.generate),
        print_blob=False,
    )


def result_or_error(form: str, work: Callable[[], Any], *names: str) -> Any:
    """What ``work`` returns in a process of its own, or None after an error that is meant for users.

    Args:
        form: of the input, for the table.
        work: reads the input; assertions in it count. Its result must be small and can be pickled.
        names: the message must hold each of them, for example the name of the file.

    Raises:
        AssertionError: the rule was broken.
    """
    kind, value = _forked(form, lambda: _outcome(work))
    if kind == "failed":
        raise AssertionError(f"{form}: {value}")
    if kind == "error":
        _check_line(value, names)
        return None
    return value


def _outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "result", work()
    except (UserError, BadVideoError) as error:
        return "error", str(error)


def _check_line(line: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in line]
    assert line.strip() and not missing, f"the message does not name {missing}: {line!r}"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    error: str


def command_or_error(form: str, arguments: list[str], *names: str, new_process: bool = False) -> Ended | None:
    """Run ``tmass`` with ``arguments``: how it ended with code 0, or None after an error that is meant for users.

    Args:
        form: of the input, for the table.
        arguments: of the command line.
        names: the line of the error must hold each of them.
        new_process: start a new interpreter instead of forking this one.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "out"), Path(folder, "error")
        kind, code = _forked(form, lambda: ("code", _command(arguments, paths, new_process)))
        out, error = (path.read_text(errors="replace") if path.is_file() else "" for path in paths)
    assert kind == "code", f"{form}: {code}\n{error}"
    if code == 0:
        assert "Traceback" not in error, error
        return Ended(code, out, error)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code in (1, 2) and len(lines) == 1 and "Traceback" not in error, f"{form}: exit code {code}\n{error}"
    _check_line(lines[0], names)
    counts[form]["errors"] += 1
    counts[form]["results"] -= 1
    return None


def _command(arguments: list[str], outputs: tuple[Path, Path], new_process: bool) -> int:
    for number, path in enumerate(outputs, 1):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, number)
    os.chdir(ROOT)
    if new_process:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.execv(sys.executable, [sys.executable, "-m", "tmass_dist", *arguments])
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["tmass", *arguments]
    from tmass_dist.__main__ import entry

    try:
        entry()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _forked(form: str, work: Callable[[], tuple[str, Any]]) -> tuple[str, Any]:
    began, count = time.monotonic(), counts.setdefault(form, Counter())
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.close(read_end)
            os.setsid()
            content = pickle.dumps(_limited(work))
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(content)
            code = 0
        os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        content = pipe.read()  # ends with the child, which an alarm ends
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    seconds[form] += time.monotonic() - began
    count["cases"] += 1
    code = os.waitstatus_to_exitcode(status)
    if content:
        kind, value = pickle.loads(content)
    elif code < 0:
        kind, value = "failed", f"ended by {signal.Signals(-code).name} after {time.monotonic() - began:.0f} s"
    else:
        kind, value = "code", code  # of another program
    count[{"result": "results", "code": "results", "error": "errors"}.get(kind, "failures")] += 1
    return kind, value


def _limited(work: Callable[[], tuple[str, Any]]) -> tuple[str, Any]:
    data = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY_LIMIT, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(TIME_LIMIT_S)
    try:
        return work()
    except BaseException:
        return "failed", traceback.format_exc()
