"""What every logger of a run's curves does, and the tags of scores."""

from __future__ import annotations

from typing import Any

SCORES = "metrics/"
"""Prefix of the tags of validation and test results."""


def score_tags(split: str, result: dict[str, Any], **directions: dict[str, float]) -> dict[str, float]:
    """Values by tag, such as ``metrics/val/query_conditioned/t2v_R@1``.

    Args:
        split: that was scored.
        result: with ``protocol`` and ``post_processing``, which every tag names (``none`` is left out).
        directions: metrics of ``t2v`` and ``v2t``.
    """
    labels = [split, result["protocol"], *({result["post_processing"]} - {"none"})]
    return {
        f"{SCORES}{'/'.join(labels)}/{direction}_{name}": value
        for direction, metrics in directions.items()
        for name, value in metrics.items()
    }


def has_scores(values: dict[str, Any]) -> bool:
    """Whether there is a validation or test result among values by tag."""
    return any(tag.startswith(SCORES) for tag in values)


class Logger:
    """One destination of a run's curves."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write values by tag."""
        raise NotImplementedError

    def histogram(self, tag: str, numbers: Any, step: int) -> None:
        """Write the distribution of a numpy array."""

    def image(self, tag: str, picture: Any, step: int) -> None:
        """Write a PIL picture."""

    def result(self, values: dict[str, float], step: int) -> None:
        """Write test results by tag; those of an earlier call are replaced."""
        self.scalars(values, step)

    def close(self, *, complete: bool) -> None:
        """Write everything out. ``complete``: the run reached its end."""
