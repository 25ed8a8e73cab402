"""Start commands quickly: each process is forked from a server that has imported torch and the other libraries.

Tests of what a command imports use new interpreters (``tests/test_cli.py``), as jobs always do
(``tests/test_train.py``, ``tests/slurm``).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

START_METHOD = "forkserver"
multiprocessing.set_forkserver_preload(["tests.preload"])


def _command(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    cwd: Path,
    outputs: tuple[Path, Path],
    prepare: Callable[[], None] | None,
) -> None:
    for number, path in enumerate(outputs, 1):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, number)
        os.close(target)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if prepare is not None:
        prepare()
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.modules.pop(arguments[1], None)  # runpy warns if the module is imported already
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def start(
    *arguments: str,
    environment: dict[str, str],
    cwd: Path,
    stdout: Path,
    stderr: Path,
    prepare: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start ``python`` with ``arguments`` (a file, ``-m`` and a module, or ``-c`` and code).

    Args:
        arguments: of the command line.
        environment: all environment variables of the process.
        cwd: its working directory.
        stdout: file to which its output is appended.
        stderr: file to which its errors are appended.
        prepare: called in the process before the command; importable by name.
    """
    whole = (arguments, environment, cwd, (stdout, stderr), prepare)
    process = multiprocessing.get_context(START_METHOD).Process(target=_command, args=whole)
    process.start()
    return process


def forked(*arguments: str, environment: dict[str, str], cwd: Path, timeout_s: float) -> CompletedProcess[str]:
    """Run a command as :func:`start` does, and wait for its end.

    Raises:
        TimeoutExpired: it did not end within ``timeout_s`` and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(*arguments, environment=environment, cwd=cwd, stdout=stdout, stderr=stderr)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(list(arguments), timeout_s)
        return CompletedProcess(list(arguments), process.exitcode, stdout.read_text(), stderr.read_text())
