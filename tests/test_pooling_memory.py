"""The memory and the traffic of the objective: one rank of a fake process group, forward and backward."""

from typing import Any

import pytest

from benchmarks.points import in_fresh_process
from benchmarks.scale import loss_step

SYSTEMS: dict[str, dict[str, Any]] = {
    "default": {},
    "three samples, the best, the radius of each pair": {"samples": 3, "trials": "best", "training_radius": "pair"},
}


BUDGET_MB = 8.0


@pytest.mark.parametrize("name", SYSTEMS)
def test_memory_stays_within_its_budget_and_traffic_is_linear(name: str) -> None:
    small, large = (in_fresh_process(loss_step, n, BUDGET_MB, SYSTEMS[name], 64) for n in (512, 2048))
    for n, cost in ((512, small), (2048, large)):
        assert 5 * n <= cost.exchanged <= 5 * n + 16
        assert 2 < cost.memory_mb < BUDGET_MB * 2**20 / 1e6
    assert large.memory_mb < 1.2 * small.memory_mb
    whole = in_fresh_process(loss_step, 512, None, SYSTEMS[name], 64)
    assert whole.memory_mb > 1.5 * BUDGET_MB and whole.exchanged == small.exchanged
