"""The audit of an evaluation: do its scores know which video belongs to which caption?

``audit(similarity)`` in Python, ``python -m tmass_dist.audit module:function`` on the command line; docs/audit.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmass_dist.audit.checks import audit
    from tmass_dist.audit.result import Audit, Check

__all__ = ["Audit", "Check", "audit", "main"]


def __getattr__(name: str) -> Any:
    # Imported when first used, so that --help imports no torch.
    if name == "audit":
        from tmass_dist.audit.checks import audit

        return audit
    if name in ("Audit", "Check"):
        from tmass_dist.audit import result

        return getattr(result, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The command."""
    from tmass_dist.audit.command import main as command

    command()
