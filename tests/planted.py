"""Mistakes planted in the functions of a module: a tensor on the CPU, or a host wait.

The planted function is the same object with other code, so that every module that imported it runs the mistake.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.accelerator import OnAccel

MISTAKES = ("CPU tensor", "item")
reached: set[str] = set()
"""``module:qualified name`` of the planted functions that met a tensor of the accelerator."""


def functions_of(module: ModuleType) -> dict[str, FunctionType]:
    """Every function and method of a module that is written in it, by its qualified name."""
    found: dict[str, FunctionType] = {}

    def add(value: Any) -> None:
        value = inspect.unwrap(value) if callable(value) else value
        if isinstance(value, classmethod | staticmethod):
            value = value.__func__
        if isinstance(value, property) and value.fget is not None:
            value = value.fget
        if isinstance(value, FunctionType) and value.__code__.co_filename == module.__file__:
            found[value.__qualname__] = value

    for value in vars(module).values():
        add(value)
        if inspect.isclass(value) and value.__module__ == module.__name__:
            for member in vars(value).values():
                add(member)
    return {name: function for name, function in found.items() if "<" not in name}


def tensors_in(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """Floating-point tensors of the accelerator, not empty, in an argument: itself, its items, those of an object."""
    if isinstance(value, Tensor):
        if isinstance(value, OnAccel) and value.is_floating_point() and value.numel():
            yield value
    elif depth and isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, nn.Module):
        yield from tensors_in([*value.parameters()], 1)
    elif depth and hasattr(value, "__dict__"):
        yield from tensors_in([*vars(value).values()], depth)


def make(mistake: str | None, name: str, variables: dict[str, Any]) -> None:
    """Called by the planted code with the function's arguments; does nothing where they hold no tensor."""
    for tensor in tensors_in([*variables.values()], 3):
        with torch.no_grad():
            if mistake == "CPU tensor":
                tensor + torch.zeros(1)  # pyright: ignore[reportUnusedExpression]
            elif mistake == "item":
                tensor.flatten()[0].item()
        reached.add(name)
        return


class _Plant(ast.NodeTransformer):
    def __init__(self, module: str, name: str, mistake: str | None) -> None:
        self.module, self.name, self.path, self.mistake = module, name, [], mistake

    def _visit(self, node: Any) -> Any:
        self.path.append(node.name)
        if ".".join(self.path) == self.name and not isinstance(node, ast.ClassDef):
            make = "__import__('tests.planted', fromlist=['make']).make"
            source = f"{make}({self.mistake!r}, {f'{self.module}:{self.name}'!r}, dict(locals()))"
            planted = ast.copy_location(ast.parse(source).body[0], node.body[0])
            first = 1 if ast.get_docstring(node) is not None else 0
            node.body.insert(first, ast.fix_missing_locations(planted))
        else:
            self.generic_visit(node)
        self.path.pop()
        return node

    visit_FunctionDef = visit_ClassDef = _visit


def _code_of(module: ModuleType, function: FunctionType, mistake: str | None) -> CodeType:
    assert module.__file__ is not None
    tree = _Plant(module.__name__, function.__qualname__, mistake).visit(ast.parse(inspect.getsource(module)))
    pending = [compile(tree, module.__file__, "exec", dont_inherit=True)]
    while pending:
        code = pending.pop()
        if code.co_qualname == function.__qualname__:
            return code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    raise AssertionError(f"{function.__qualname__} is not in {module.__file__}")


@contextmanager
def planted(module: ModuleType, function: FunctionType, mistake: str | None) -> Iterator[None]:
    """Within the block ``function`` begins with the mistake; with None it only tells that it was reached."""
    before = function.__code__
    function.__code__ = _code_of(module, function, mistake)
    try:
        yield
    finally:
        function.__code__ = before
