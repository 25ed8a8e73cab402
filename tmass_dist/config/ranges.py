"""The check of a setting's range, used by every section."""

from __future__ import annotations

from tmass_dist.errors import UserError


def require(condition: bool, key: str, value: object, reason: str) -> None:
    """Raise a UserError that names the setting, its value and the reason if ``condition`` is false."""
    if not condition:
        raise UserError(f"{key} is {value!r}: {reason}")
