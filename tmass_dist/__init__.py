"""Training, evaluation and search of text-video retrieval with T-MASS (Wang et al., "Text Is MASS", CVPR 2024).

``TMass`` is a trained model: ``from tmass_dist import TMass``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmass_dist.retrieval.model import TMass as TMass

__version__ = "0.2.0"
__all__ = ["TMass", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported when it is first used (PEP 562), since commands such as `tmass --help` must not import torch.
    if name == "TMass":
        from tmass_dist.retrieval.model import TMass

        return TMass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
