"""The only module that imports open_clip."""

from __future__ import annotations

from typing import Any

import torch

_kept_libraries: list[Any] = []


def usable_torchvision() -> None:
    """Let torchvision be imported with a CPU build of torch; call it before anything that imports torchvision."""
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
    import open_clip as library

    return library
