"""The real engine and the real training loop on the simulated accelerator: where the host waits for it, step by step.

DeepSpeed itself runs there, at every ZeRO stage, on two ranks that exchange by gloo (``tests/accelerator.py``).
"""

from __future__ import annotations

import importlib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.accelerator import Event, OnAccel, Wait, accelerator, exchanges, register, use_in_deepspeed
from tests.planted import functions_of, planted, reached
from tests.ranks import on_ranks
from tests.small_model import batch_of, config_of, own_rows, plain_run, small_objective

STEPS = 4
COPY = Wait("to host", "training/engine.py:step")
"""The copy of the verdict. On CUDA it is into pinned memory, and the host goes on."""
READ = Wait("event", "training/engine.py:_wait_for_verdict")
"""The late wait, for the verdict on the step before, when the next backward pass was started."""
RUNS: tuple[tuple[str, int | None], ...] = (
    *((f"engine.zero_stage={stage}", 2) for stage in (0, 1, 2, 3)),
    ("engine.zero_stage=3 engine.micro_batch=2 optim.ema=0.9", None),
)
"""Overrides, and the step in which a gradient is NaN."""


def on_accel(inputs: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """The inputs of a step, copied without waiting."""
    pixels, tokens, noise, keys = inputs
    parts = (pixels, tokens, noise, torch.tensor(keys))
    return tuple(part.to(device, non_blocking=True) for part in parts)


def engine_run(overrides: str, poisoned: int | None) -> dict[str, Any]:
    """Steps of the engine as the loop calls it; in one of them a gradient of the last rank may be NaN."""
    from tmass_dist import distributed
    from tmass_dist.training.engine import Engine

    config = config_of(*overrides.split())
    waits_of_step, finite, losses, is_poisoned = [], [], [], False
    with accelerator() as (device, waits):
        model = small_objective(config).to(device)
        if distributed.rank() == distributed.world_size() - 1:
            bias = model.head.pooling.linear.bias
            bias.register_hook(lambda gradient: gradient * (float("nan") if is_poisoned else 1.0))
        engine = Engine(model, config)
        engine._verdict_copied = Event()
        exchanges.clear()
        for step in range(STEPS):
            inputs = on_accel(own_rows(batch_of(step)), device)
            waits.clear()
            is_poisoned = step == poisoned
            losses.append(engine.backward(*inputs).total)
            if step:
                finite.append(engine.last_step_was_finite())
            engine.step(1.0)
            waits_of_step.append({tuple(wait): number for wait, number in waits.items()})
        finite.append(engine.last_step_was_finite())
        seen = dict(exchanges)
        weights = {name: _host(value).clone() for _, name, value in engine.state(("weight",))}
    return {
        "waits": waits_of_step,
        "finite": finite,
        "losses": [_host(loss).item() for loss in losses],
        "weights": weights,
        "exchanges": seen,
    }


def _host(value: torch.Tensor) -> torch.Tensor:
    return value.host if isinstance(value, OnAccel) else value


def engine_runs() -> list[dict[str, Any]]:
    register()
    use_in_deepspeed()
    return [engine_run(*run) for run in RUNS]


def test_a_step_of_the_engine_waits_for_the_late_verdict_alone(tmp_path: Path) -> None:
    expected = plain_run(config_of(), STEPS)
    for rank in on_ranks(2, engine_runs, tmp_path=tmp_path):
        for run, (overrides, poisoned) in zip(rank, RUNS):
            waits = [Counter({Wait(*wait): number for wait, number in one.items()}) for one in run["waits"]]
            assert waits == [Counter([COPY])] + [Counter([COPY, READ])] * (STEPS - 1), overrides
            assert run["finite"] == [step != poisoned for step in range(STEPS)]
            comparable = STEPS if poisoned is None else poisoned + 1
            assert run["losses"][:comparable] == pytest.approx(expected["losses"][:comparable], rel=1e-5), overrides
            for name, weight in run["weights"].items() if poisoned is None else ():
                torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-4, atol=1e-5)
            # Texts are gathered, and their gradients reduced and scattered, in one tensor each; so are ZeRO's weights.
            assert {"_allgather_base_", "_reduce_scatter_base_", "allreduce_"} <= run["exchanges"].keys()
            assert not {"allgather_", "reduce_scatter_", "gather_"} & run["exchanges"].keys()


PLANTED = ("tmass_dist.training.engine", "tmass_dist.training.zero", "tmass_dist.training.optim")


def waits_of_planted_items(overrides: str) -> tuple[set[str], set[str]]:
    """Functions of ``PLANTED`` with a planted ``.item()`` that met a tensor of the accelerator, and those reported."""
    register()
    use_in_deepspeed()
    from tmass_dist.training.engine import Engine

    config, places = config_of(*overrides.split()), {}
    with ExitStack() as stack:
        device, waits = stack.enter_context(accelerator())
        engine = Engine(small_objective(config).to(device), config)
        for module in map(importlib.import_module, PLANTED):
            for name, function in functions_of(module).items():
                file = module.__name__.removeprefix("tmass_dist.").replace(".", "/")
                places[f"{module.__name__}:{name}"] = f"{file}.py:{function.__name__}"
                stack.enter_context(planted(module, function, "item"))
        waits.clear()
        reached.clear()
        for step in range(2):
            engine.backward(*on_accel(batch_of(step), device))
            engine.last_step_was_finite()
            engine.group_norms()
            engine.step(1.0)
        found = {where for kind, where in waits if kind == "item"}
    return {places[name] for name in reached}, found


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_item_planted_in_the_engine_is_reported(stage: int, tmp_path: Path) -> None:
    overrides = f"engine.zero_stage={stage} optim.ema=0.9"
    [(met, found)] = on_ranks(1, waits_of_planted_items, overrides, tmp_path=tmp_path)
    assert met == found
    parts = ("backward", "_differentiate", "step", "_squared_norms", "last_step_was_finite", "_wait_for_verdict")
    assert found >= {f"training/engine.py:{name}" for name in parts}
    assert found >= {f"training/optim.py:{name}" for name in ("step", "_update", "_fused_adamw", "_unless_skipped")}
    assert found >= {f"training/zero.py:{name}" for name in ("gradients", "waiting_on_the_device")}
