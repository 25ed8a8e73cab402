"""The rule for hostile input, in one place: a result, or an error that a user understands; within a time limit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hypothesis import HealthCheck, settings

from tmass_dist.data.video import BadVideoError
from tmass_dist.errors import UserError

TIME_LIMIT_S = 20
"""For one input."""

CASES = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "40")),
    deadline=None,
    database=None,
    derandomize="FUZZ_SEED" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
"""``make fuzz`` sets ``FUZZ_CASES`` and ``FUZZ_SEED``; without a seed the same cases run each time."""


@contextmanager
def time_limit() -> Iterator[None]:
    """End a test that takes longer than ``TIME_LIMIT_S``."""

    def stop(*_: object) -> NoReturn:
        raise AssertionError(f"longer than {TIME_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def result_or_error(work: Callable[[], Any], name: str = "") -> Any:
    """What ``work`` returns, or None after an error of a kind that is meant for users.

    Any other exception, an empty message, or (with ``name``) a message without the name of the file fails the test.
    """
    with time_limit():
        try:
            return work()
        except (UserError, BadVideoError) as error:
            assert str(error) and name in str(error), f"the message does not name {name}: {error}"
            return None
