"""The command: which function to audit, the table that it prints, and ``audit.json`` with its page."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tmass_dist.cli import program, writable_dir, write_json, write_text
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    from tmass_dist.audit.result import Audit

DESCRIPTION = """Audit a similarity function: similarity(text_TD, frames_VFD, owner_T) -> (T, V). It is called with
random texts and videos that belong together only by owner_T; docs/audit.md explains each check and shows adapters."""


def load_function(name: str) -> Callable[..., Any]:
    """The function of ``module:function`` or ``path/to/file.py:function``; modules are also found in this directory.

    Raises:
        UserError: there is no such module or function, or importing it fails.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise UserError(f"{name!r} names no function; write module:function or file.py:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        # SystemExit too: a script that ends on import must not end the audit with its exit code.
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{source} cannot be imported: {type(error).__name__}: {reason}") from error
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise UserError(f"{source} has no function {attribute}") from error
    if not callable(function):
        raise UserError(f"{source}:{attribute} is of type {type(function).__name__}, which cannot be called")
    return function


def _import_file(path: Path) -> ModuleType:
    """The module of a file; modules beside it can be imported by it."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    # Another name than the file's, which may be that of a library.
    spec = importlib.util.spec_from_file_location(f"audited_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def table(found: Audit) -> str:
    """The audit as plain text."""
    lines = [f"audit of {found.function}"]
    width = max(len(check.name) for check in found.checks)
    for check in found.checks:
        value = "" if check.value is None else f"{check.value:.3g}"
        lines.append(f"{check.verdict.upper():<13}{check.name:<{width}}{value:>10}  {check.unit}")
        lines.append(f"{'':<13}{check.meaning}")
    return "\n".join([*lines, conclusion(found)])


def conclusion(found: Audit) -> str:
    """The result in one line."""
    verdict = "LEAK: the scores depend on which video is the right one" if found.leak else "no leak found"
    if found.transductive:
        verdict += "; transductive: the score of a pair depends on other queries or videos"
    failed = [check.name for check in found.checks if check.verdict == "fail"]
    skipped = [check.name for check in found.checks if check.verdict == "skipped"]
    verdict += f"; failed: {', '.join(failed)}" if failed else ""
    return verdict + (f"; not tested: {', '.join(skipped)}" if skipped else "")


def write(found: Audit, directory: Path) -> None:
    """``audit.json`` and ``audit.html``."""
    from tmass_dist.pages import render_page

    write_json(directory / "audit.json", found.as_dict())
    write_text(directory / "audit.html", render_page("audit.html", audit=found, conclusion=conclusion(found)))


def main() -> None:
    """Parse, audit, print.

    Raises:
        SystemExit: code 1, the function leaks.
        UserError: what is asked for does not go together, or the function cannot be called.
    """
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.audit"), description=DESCRIPTION)
    parser.add_argument("function", nargs="?", help="module:function or file.py:function")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of --run, for its evaluation")
    parser.add_argument("--run", type=Path, help="audit the scoring of one of our runs instead")
    parser.add_argument("--ranks", metavar="FUNCTION", help="ranks(similarity_TV, owner_T) -> (T,), to check its ties")
    parser.add_argument("--numpy", action="store_true", help="call the functions with numpy arrays")
    parser.add_argument("--width", type=int, help="D of the embeddings (default: 64)")
    parser.add_argument("--frames", type=int, help="frames of a video (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write audit.json and audit.html there")
    given = parser.parse_args()
    if given.run is not None:
        overrides = [text for text in (given.function, *given.overrides) if text is not None]
        if given.numpy or given.width or given.frames or given.ranks:
            raise UserError("--run knows its own shapes and ranks: leave --numpy, --width, --frames and --ranks out")
    elif given.function is None or given.overrides:
        raise UserError("name one function as module:function, or a run with --run RUN and its settings")
    for option, least, most in (("width", 1, 2**16), ("frames", 1, 2**12), ("seed", 0, 2**31)):
        value = getattr(given, option)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{option} is {value}; from {least} to {most}")
    out = None if given.out is None else writable_dir(given.out)

    from tmass_dist.audit.checks import audit

    if given.run is not None:
        from tmass_dist.audit.ours import ranks_of_ours, similarity_of_run

        ours = similarity_of_run(given.run, overrides)
        found = audit(
            ours.similarity,
            ranks=ranks_of_ours,
            width=ours.width,
            frames=ours.num_frames,
            seed=given.seed,
            name=ours.name,
        )
    else:
        found = audit(
            load_function(given.function),
            numpy=given.numpy,
            ranks=load_function(given.ranks) if given.ranks else None,
            width=given.width or 64,
            frames=given.frames or 8,
            seed=given.seed,
            name=given.function,
        )
    print(table(found))
    if out is not None:
        write(found, out)
        print(f"report: {out / 'audit.html'}")
    if found.leak:
        raise SystemExit(1)
