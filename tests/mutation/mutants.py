"""A seeded sample of small changes (mutants) to modules, made by the operators of cosmic-ray."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

OPERATORS = [name for name in operator_names() if "Variable" not in name]
"""The operators that replace and insert variables need arguments, and are left out."""


@dataclass(frozen=True)
class Mutant:
    """One change at one place of a module."""

    id: str
    """Made from the changed line and the operator, so that it stays the same when other lines change."""
    module: str
    """Path of the file from the root of the repository."""
    operator: str
    line: int
    before: str
    after: str
    """The line with the change."""
    source: str
    """The whole changed module."""


def sample(root: Path, modules: list[str], count: int, seed: int) -> list[Mutant]:
    """``count`` places of the modules, one mutant each, chosen by a hash of the seed, the line and the kind of change.

    Changes to annotations are left out, because they do not change the behaviour; so are those of the ``*`` that
    separates parameters.

    Args:
        root: of the repository.
        modules: paths from ``root``.
        count: of mutants.
        seed: another seed gives another sample.
    """
    sources = {module: (root / module).read_text(encoding="utf-8") for module in modules}
    candidates = []
    for module, source in sources.items():
        candidates += [(_hash(seed, key), key, module, choices) for key, choices in _places(module, source).items()]
    mutants: list[Mutant] = []
    for _, key, module, choices in sorted(candidates):
        for operator, occurrence, line in sorted(choices, key=lambda choice: _hash(seed, (key, choice[0]))):
            changed = mutate_code(sources[module], get_operator(operator)(), occurrence)
            if changed is None or _same_behaviour(sources[module], changed):
                continue
            before, after = (text.splitlines()[line - 1].strip() for text in (sources[module], changed))
            mutants.append(Mutant(_hash(0, (key, operator))[:12], module, operator, line, before, after, changed))
            break
        if len(mutants) == count:
            break
    return mutants


def _places(module: str, source: str) -> dict[tuple[str, ...], list[tuple[str, int, int]]]:
    """For each place and kind of change: (operator, its occurrence, line) of each possible mutant."""
    lines, places, seen = source.splitlines(), {}, Counter[tuple[str, ...]]()
    nodes = list(_walk(get_ast(source)))
    for name in OPERATORS:
        operator, occurrence = get_operator(name)(), 0
        family = name.split("/")[-1].split("_")[0]
        for node in nodes:
            for (line, column), _ in operator.mutation_positions(node):
                text = (module, family, lines[line - 1].strip(), str(column))
                number = seen[name, *text]
                seen[name, *text] += 1
                places.setdefault((*text, str(number)), []).append((name, occurrence, line))
                occurrence += 1
    return places


def _walk(node: Any) -> Any:
    """In the order in which cosmic-ray counts occurrences."""
    yield node
    for child in getattr(node, "children", ()):
        yield from _walk(child)


def _hash(seed: int, key: object) -> str:
    return hashlib.sha256(f"{seed} {key}".encode()).hexdigest()


class _WithoutAnnotations(ast.NodeTransformer):
    """Removes annotations, and lists all parameters of a function together."""

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        self.generic_visit(node)
        node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
        node.defaults = [*node.defaults, *(value for value in node.kw_defaults if value is not None)]
        node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node


def _same_behaviour(source: str, changed: str) -> bool:
    """Whether the change is to signatures only; a change that does not compile counts as such."""
    try:
        one, other = (ast.dump(_WithoutAnnotations().visit(ast.parse(text))) for text in (source, changed))
    except SyntaxError:
        return True
    return one == other
