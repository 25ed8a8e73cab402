"""The only module that imports open_clip, or reads its files."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

_kept_libraries: list[Any] = []


def usable_torchvision() -> None:
    """Let torchvision be imported with a CPU build of torch; call it before anything that imports torchvision."""
    import torch

    if torch.version.cuda is None and not _kept_libraries:
        # torchvision from PyPI contains CUDA operators, which a CPU build of torch does not load, and fails.
        # Declaring the two operators that it looks up is enough. The Library object must be kept.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_libraries.append(library)


def open_clip() -> Any:
    """The package open_clip, imported at the first call."""
    usable_torchvision()
    # timm imports wandb for one function, which makes directories in /tmp that stay there if a rank ends at once.
    with _without("wandb"):
        import open_clip as library

    return library


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Imports in this context do not find ``module``, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[module]


class Catalog(NamedTuple):
    """What open_clip knows."""

    architectures: dict[str, dict[str, Any]]
    """Description of each architecture, by name."""
    weights: dict[str, dict[str, dict[str, Any]]]
    """By architecture and tag: where the weights are published, and the normalisation of pixels."""


def catalog() -> Catalog:
    """The architectures and tags of open_clip, with those that were added to the package if it is imported."""
    package = sys.modules.get("open_clip")
    if package is None:
        return _catalog_of_files()
    architectures = {name: package.get_model_config(name) for name in package.list_models()}
    return Catalog(architectures, _weights(package))


@functools.cache
def _catalog_of_files() -> Catalog:
    """The catalog without the import of open_clip, which takes seconds: it imports torch, timm and transformers."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations
    directories = list(spec.submodule_search_locations)
    files = sorted(Path(directories[0], "model_configs").glob("*.json"))
    descriptions = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    required = {"embed_dim", "vision_cfg", "text_cfg"}  # as open_clip does
    architectures = {name: value for name, value in descriptions.items() if required <= value.keys()}
    # The module of the tags alone, in a package of its own that has no __init__.
    package = ModuleType("_open_clip_files")
    package.__path__ = directories
    sys.modules[package.__name__] = package
    # The module of the tags does without safetensors.torch, which imports torch.
    with nullcontext() if "torch" in sys.modules else _without("safetensors.torch"):
        return Catalog(architectures, _weights(importlib.import_module(f"{package.__name__}.pretrained")))


def _weights(module: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """``Catalog.weights`` by the functions of open_clip."""
    weights: dict[str, dict[str, dict[str, Any]]] = {}
    for architecture, tag in module.list_pretrained():
        weights.setdefault(architecture, {})[tag] = module.get_pretrained_cfg(architecture, tag)
    return weights
