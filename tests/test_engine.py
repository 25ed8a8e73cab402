"""The engine: any number of ranks, ZeRO stage and micro-batch gives the steps of one plain torch process."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import on_ranks
from tests.small_model import (
    STEPS,
    VARIANTS,
    WIDTH,
    batch_of,
    config_of,
    own_rows,
    small_objective,
    without_unused_noise,
)
from tmass_dist.config import Config
from tmass_dist.training.columns import PAIR_TENSORS


def plain_run(config: Config, steps: int = STEPS) -> dict[str, Any]:
    """One process, torch alone."""
    from tmass_dist.training.objective import parameter_groups
    from tmass_dist.training.optim import AuthorsAdamW

    model = small_objective(config)
    optimizer = AuthorsAdamW(parameter_groups(model, config.optim), lr=config.optim.lr)
    losses, gradients = [], {}
    for step in range(steps):
        found = model("whole", *without_unused_noise(config, batch_of(step)))
        found.total.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.total.item())
    return {"losses": losses, "gradients": gradients, "weights": {n: p.detach() for n, p in model.named_parameters()}}


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
        assert engine.finite
        if step == 0:
            norms = engine.group_norms()
            gradients = {n: g.clone() for n, p in engine.named.items() if (g := safe_get_full_grad(p)) is not None}
        engine.step(1.0)
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


def _held(stage: int) -> bool:
    """A gradient that is not a number on the last rank only: with hold, nothing changes anywhere."""
    from tmass_dist import distributed
    from tmass_dist.training.engine import Engine

    config = config_of(f"engine.zero_stage={stage}")
    model = small_objective(config)
    last = distributed.rank() == distributed.world_size() - 1

    def poisoned(gradient: Tensor) -> Tensor:
        return gradient * (float("nan") if last and poisoned.on else 1.0)

    poisoned.on = False
    model.head.pooling.linear.bias.register_hook(poisoned)  # before the engine's own, which then sees it
    engine = Engine(model, config)
    states = []
    for step, poison in enumerate([False, True, False]):
        poisoned.on = poison
        engine.backward(*own_rows(batch_of(step)))
        assert engine.finite == (not (poison and last))
        broken = distributed.all_reduce_max([float(not engine.finite)])[0] > 0
        assert broken == poison
        engine.step(1.0, skip_update=broken)
        states.append({f"{k}:{n}": v.clone() for k, n, v in engine.state()})
    unchanged = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moved = all(bool(v.isfinite().all()) for v in states[2].values()) and not torch.equal(
        states[2]["weight:head.pooling.linear.bias"], states[1]["weight:head.pooling.linear.bias"]
    )
    return unchanged and moved


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_of_one_rank_that_is_no_number_moves_no_rank(stage: int, tmp_path: Path) -> None:
    assert on_ranks(2, _held, stage, tmp_path=tmp_path) == [True, True]


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
