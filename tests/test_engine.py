"""The engine: any number of ranks, ZeRO stage and micro-batch gives the steps of one plain torch process."""

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import on_ranks
from tests.small_model import (
    STEPS,
    VARIANTS,
    WIDTH,
    batch_of,
    config_of,
    own_rows,
    plain_run,
    small_objective,
    without_unused_noise,
)
from tmass_dist.config import Config
from tmass_dist.training.columns import PAIR_TENSORS


def engine_run(config: Config, tiled: bool, steps: int = STEPS) -> dict[str, Any]:
    """The same through DeepSpeed, on the ranks that there are; ``tiled`` pools some videos and texts at a time."""
    from deepspeed.utils import safe_get_full_grad

    from tmass_dist.training.engine import Engine

    model = small_objective(config)
    if tiled:
        model.memory_mb = 5 * WIDTH * 4 * PAIR_TENSORS / 2**20  # 5 pairs
    engine = Engine(model, config)
    losses, gradients, norms = [], {}, {}
    for step in range(steps):
        found = engine.backward(*without_unused_noise(config, own_rows(batch_of(step))))
        if step == 0:
            gradients = {n: g.clone() for n, p in engine.named.items() if (g := safe_get_full_grad(p)) is not None}
        engine.step(1.0)
        assert engine.last_step_was_finite()
        norms = norms or engine.group_norms()
        losses.append(found.total.item())
    weights = {name: value.clone() for _, name, value in engine.state(("weight",))}
    return {"losses": losses, "gradients": gradients, "weights": weights, "norms": norms}


def _many(runs: list[tuple[Config, bool]]) -> list[dict[str, Any]]:
    return [engine_run(*run) for run in runs]


Case = tuple[str, int, int | None, bool]
CASES: list[Case] = [
    (variant, stage, micro, (number + number // 4) % 2 == 1)
    for number, (variant, stage, micro) in enumerate(product(VARIANTS, (0, 1, 2, 3), (None, 2)))
]
"""Variant, ZeRO stage, micro-batch, pooling in tiles. Every combination of the first three, and every two settings."""
PAIRWISE = [case for n, case in enumerate(CASES) if (n + n // 2 + n // 8) % 2 == 0]
"""Half of them, in which every two settings still meet."""
MATRIX = [
    pytest.param(1, PAIRWISE, id="1-pairwise"),
    pytest.param(2, PAIRWISE, id="2-pairwise"),
    *(pytest.param(world, CASES, marks=pytest.mark.slow, id=f"{world}-all") for world in (1, 2, 3, 4)),
]


@pytest.mark.parametrize(("world", "cases"), MATRIX)
def test_every_world_stage_and_micro_batch_is_one_process(world: int, cases: list[Case], tmp_path: Path) -> None:
    expected = {variant: plain_run(config_of(*more)) for variant, more in VARIANTS.items()}
    runs = [
        (
            replace(c := config_of(*VARIANTS[variant]), engine=replace(c.engine, zero_stage=stage, micro_batch=micro)),
            tiled,
        )
        for variant, stage, micro, tiled in cases
    ]
    found = on_ranks(world, _many, runs, tmp_path=tmp_path)
    for rank in found:
        for (variant, stage, micro, tiled), run in zip(cases, rank):
            where = f"{variant}, ZeRO-{stage}, micro-batch {micro}, {'tiles' if tiled else 'whole'}, {world} ranks"
            one = expected[variant]
            torch.testing.assert_close(run["losses"], one["losses"], rtol=1e-6, atol=0, msg=f"{where}: losses")
            assert run["weights"].keys() == run["gradients"].keys() == one["gradients"].keys(), where
            for kind in ("gradients", "weights"):
                whole = torch.stack([value.norm() for value in one[kind].values()]).norm()
                gaps = {name: ((v - one[kind][name]).norm() / whole).item() for name, v in run[kind].items()}
                worst = max(gaps, key=lambda name: gaps[name])
                assert gaps[worst] < 1e-6, f"{where}: {kind} of {worst} differ by {gaps[worst]:.1e}"
            total = torch.stack([g.norm() for g in one["gradients"].values()]).norm().item()
            assert run["norms"]["total"] == pytest.approx(total, rel=1e-5), where


def _poisoned_run(stage: int, ema: float) -> tuple[list[str], bool]:
    """A step whose gradient is NaN on the last rank: the names that each rank finds, and whether it left no trace."""
    from tmass_dist import distributed
    from tmass_dist.training.engine import Engine

    states = []
    for poisoned_step in (None, 1):
        config = config_of(f"engine.zero_stage={stage}", f"optim.ema={ema}")
        model = small_objective(config)
        is_poisoned = False
        if distributed.rank() == distributed.world_size() - 1:
            bias = model.head.pooling.linear.bias
            bias.register_hook(lambda gradient: gradient * (float("nan") if is_poisoned else 1.0))  # noqa: B023
        engine, names = Engine(model, config), []
        for step in (0, 1, 2) if poisoned_step else (0, 2):
            is_poisoned = step == poisoned_step
            engine.backward(*own_rows(batch_of(step)))
            engine.step(1.0)
            assert engine.last_step_was_finite() == (not is_poisoned)
            if is_poisoned:
                names = engine.nonfinite_gradients(*own_rows(batch_of(step)))
        assert engine.optimizer.num_updates == 2
        states.append({f"{key}:{name}": value.clone() for key, name, value in engine.state()})
    equal = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return names, equal


@pytest.mark.parametrize(("stage", "ema"), [(0, 0.9), (1, 0.9), (2, 0.0), (3, 0.9)])
def test_a_step_whose_gradient_is_nan_on_one_rank_leaves_no_trace(stage: int, ema: float, tmp_path: Path) -> None:
    """The weights after it are bit for bit those of a run without that step, and the rank and parameter are named."""
    first, last = on_ranks(2, _poisoned_run, stage, ema, tmp_path=tmp_path)
    assert first == ([], True) and last == (["head.pooling.linear.bias"], True)


def _losses_of(configs: list[Config]) -> list[list[float]]:
    from tmass_dist.training.engine import Engine

    losses = []
    for config in configs:
        model = small_objective(config)
        engine = Engine(model, config)
        run = []
        for step in range(5):
            found = engine.backward(*batch_of(step))
            assert found.total.dtype == torch.float32
            engine.step(1.0)
            run.append(found.total.item())
        assert all(value.dtype == torch.float32 for _, _, value in engine.state())
        losses.append(run)
    return losses


def test_bfloat16_is_near_and_recomputed_activations_are_equal(tmp_path: Path) -> None:
    options = [[], ["engine.checkpoint_activations=true"], ["engine.bf16=true"]]
    [[plain, recomputed, bf16]] = on_ranks(1, _losses_of, [config_of(*more) for more in options], tmp_path=tmp_path)
    assert recomputed == pytest.approx(plain, rel=1e-6)
    assert bf16 == pytest.approx(plain, rel=3e-2) and bf16[0] != plain[0]


def _compiled_run() -> tuple[list[float], int]:
    """The losses, and how many graphs were compiled."""
    from torch._dynamo.utils import counters

    [losses] = _losses_of([config_of("engine.compile=true")])
    return losses, counters["stats"]["unique_graphs"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_a_compiled_tower_trains_the_same(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    [[plain]] = on_ranks(1, _losses_of, [config_of()], tmp_path=tmp_path / "plain")
    [(compiled, num_graphs)] = on_ranks(1, _compiled_run, tmp_path=tmp_path)
    assert num_graphs >= 1 and compiled == pytest.approx(plain, rel=1e-5)
