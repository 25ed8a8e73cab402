"""What an audit finds: a line for each check, and the verdict on the function."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "leak", "transductive", "fail", "note", "skipped"]


@dataclass(frozen=True)
class Check:
    """One line of the audit."""

    name: str
    verdict: Verdict
    value: float | None
    """The number that the verdict follows from; ``unit`` says what it is."""
    unit: str
    meaning: str


@dataclass(frozen=True)
class Audit:
    """What the audit of one function found."""

    function: str
    noisy: bool
    """Whether equal calls return different scores."""
    checks: tuple[Check, ...]

    @property
    def leak(self) -> bool:
        """Do the scores depend on which video is the right one?"""
        return any(check.verdict == "leak" for check in self.checks)

    @property
    def transductive(self) -> bool:
        """Does the score of a pair depend on the other queries or videos?"""
        return any(check.verdict == "transductive" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The content of ``audit.json``."""
        verdict = {"leak": self.leak, "transductive": self.transductive, "noisy": self.noisy}
        return {"function": self.function, **verdict, "checks": [asdict(check) for check in self.checks]}
