"""List the settings of a run: ``python -m tmass_dist.settings [KEY]``, the same as ``tmass config [KEY]``.

Types, defaults and descriptions are read from the dataclasses of ``tmass_dist/config/``.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass

from tmass_dist.cli import program, run_command
from tmass_dist.config import Config
from tmass_dist.errors import UserError


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted key, its type and default as text, and its description."""

    key: str
    kind: str
    default: str
    meaning: str

    def __str__(self) -> str:
        words = textwrap.fill(self.meaning, 100, initial_indent="    ", subsequent_indent="    ")
        return f"{self.key}={self.default}    ({self.kind})\n{words}"


def all_settings(cls: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting of ``cls`` and of its sections, in the order of the source."""
    meanings = _meanings(cls)
    for field in fields(cls):
        section = field.default_factory
        if isinstance(section, type) and is_dataclass(section):
            yield from all_settings(section, f"{prefix}{field.name}.")
        else:
            yield Setting(f"{prefix}{field.name}", _kind(field), _default(field), meanings[field.name])


def _meanings(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for line, following in zip(body.body, body.body[1:]):
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[line.target.id] = " ".join(str(following.value.value).split())
    return found


def _kind(field: Field) -> str:
    """The annotation as text: choices joined by "or"; ``null`` stands for None, as in YAML."""
    annotation = str(field.type).replace("tuple[str, ...]", "list of str").replace("Any", "str or list")
    kind, null = annotation.removesuffix(" | None"), " or null" if annotation.endswith(" | None") else ""
    if kind.startswith("Literal["):
        kind = " or ".join(str(choice) for choice in ast.literal_eval(f"({kind[8:-1]},)"))
    return kind + null


def _default(field: Field) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def find_settings(key: str | None) -> list[Setting]:
    """All settings, those of a section (``optim``), or the one named ``key``.

    Raises:
        UserError: no such key; the nearest one is named.
    """
    settings = list(all_settings())
    if key is None:
        return settings
    found = [setting for setting in settings if setting.key == key or setting.key.startswith(f"{key}.")]
    if not found:
        names = [setting.key for setting in settings]
        by_last = {name.rpartition(".")[2]: name for name in names}
        near = difflib.get_close_matches(key, names, n=1) or [
            by_last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)
        ]
        hint = f"did you mean {near[0]}?" if near else "`tmass config` lists all"
        raise UserError(f"there is no setting {key}; {hint}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.settings"), description=__doc__)
    parser.add_argument("key", nargs="?", help="a setting (optim.lr) or a section (optim); default: all")
    for setting in find_settings(parser.parse_args().key):
        print(setting)


if __name__ == "__main__":
    run_command(main)
