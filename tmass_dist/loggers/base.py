"""What every logger of a run's curves does."""

from __future__ import annotations

from typing import Any

from tmass_dist.score_labels import SCORES


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
