"""bfloat16 towers on several ranks: near float32 by a bound that follows from its 8 bits, at every way of exchange."""

from pathlib import Path

import pytest

from tests.ranks import on_ranks
from tests.small_model import batch_of, config_of, own_rows, small_objective
from tmass_dist.config import Config

EXCHANGES = {
    "ZeRO-0": ["engine.zero_stage=0"],
    "ZeRO-1, micro-batches": ["engine.zero_stage=1", "engine.micro_batch=2"],
    "ZeRO-2": ["engine.zero_stage=2"],
    "ZeRO-3, micro-batches": ["engine.zero_stage=3", "engine.micro_batch=2"],
}
BOUND = 3e-2
"""bfloat16 rounds to 8 bits, by up to 2^-9 = 0.2 % of each number. A tower rounds some ten results in a row, and five
steps carry the differences on; if all had one sign, they would add up to 2 %. Measured: 0.3 %."""


def losses_of(configs: list[Config]) -> list[list[float]]:
    """Losses of five steps for each config, on the ranks that there are."""
    from tmass_dist.training.engine import Engine

    found = []
    for config in configs:
        engine = Engine(small_objective(config), config)
        losses = []
        for step in range(5):
            losses.append(engine.backward(*own_rows(batch_of(step))).total.item())
            engine.step(1.0)
        found.append(losses)
    return found


def test_bfloat16_on_two_ranks_is_near_float32_of_one(tmp_path: Path) -> None:
    configs = [config_of("engine.bf16=true", *more) for more in EXCHANGES.values()]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    [[exact]] = on_ranks(1, losses_of, [config_of()], tmp_path=tmp_path / "one")
    for found in on_ranks(2, losses_of, configs, tmp_path=tmp_path / "two"):
        for name, losses in zip(EXCHANGES, found):
            assert losses == pytest.approx(exact, rel=BOUND), name
            assert losses != exact, f"{name} ran in float32"
