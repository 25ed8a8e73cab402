"""ZeRO-3 builds no whole model on ranks other than 0, and the result is that of whole models, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.ranks import on_ranks
from tests.small_model import batch_of, config_of, own_rows, small_objective, without_unused_noise
from tmass_dist.config import Config
from tmass_dist.training.sharded import allocate, parameters_without_memory, shape_of


def _steps(engine: Any, config: Config) -> list[float]:
    """The losses of two steps."""
    losses = []
    for step in range(2):
        losses.append(engine.backward(*without_unused_noise(config, own_rows(batch_of(step)))).total.item())
        engine.step(1.0)
    return losses


def _result(engine: Any, config: Config) -> dict[str, Any]:
    start = {name: value.clone() for _, name, value in engine.state(("weight",))}
    start |= {name: value.clone() for name, value in engine.untrained_weights()}
    start |= {name: value.clone() for name, value in engine.model.named_buffers()}
    losses = _steps(engine, config)
    end = {f"{key}:{name}": value.clone() for key, name, value in engine.state()}
    return {"start": start, "losses": losses, "end": end}


def _sharded_and_whole(cases: list[list[str]], run_dir: str) -> list[dict[str, Any]]:
    """For each case the result of the sharded start, of whole models, and whether this rank's parameters had memory."""
    from tmass_dist.models.warm_start import start_from
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective
    from tmass_dist.training.start import starting_model

    results = []
    for number, case in enumerate(cases):
        folder = Path(run_dir, str(number), "checkpoints")
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of("engine.zero_stage=3", f"run_dir={folder.parent}", *case)
        torch.manual_seed(config.seed)
        model = starting_model(config, torch.device("cpu"), logging.getLogger("quiet"))
        has_memory = [not parameter.is_meta for parameter in model.parameters()]
        sharded = _result(Engine(model, config), config)
        torch.manual_seed(config.seed)
        fill = (lambda plain, config=config: start_from(plain, config)) if config.init_from else None
        whole = _result(Engine(build_objective(config, fill=fill), config), config)  # pyright: ignore[reportArgumentType]
        results.append({"sharded": sharded, "whole": whole, "has_memory": any(has_memory), "is_whole": all(has_memory)})
    return results


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sharded_start_is_a_whole_one_bit_for_bit(num_ranks: int, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = small_objective(config_of())
    save_file(other.state_dict(), tmp_path / "source.safetensors")
    save_file(other.towers.clip.state_dict(), tmp_path / "towers.safetensors")
    cases = {
        "random": [],
        "init_from": [f"init_from={tmp_path}/source.safetensors"],
        "pretrained": [f"model.pretrained={tmp_path}/towers.safetensors"],
        "frozen": [f"model.pretrained={tmp_path}/towers.safetensors", "optim.frozen=[towers.]"],
        "mean of weights": ["optim.ema=0.9"],
        "kl": ["model.radius=variational", "stochastic.kl_weight=0.1", "stochastic.support_weight=0"],
        "mean": ["model.pooling=mean", "model.radius=none"],
    }
    ranks = on_ranks(num_ranks, _sharded_and_whole, list(cases.values()), str(tmp_path / "runs"), tmp_path=tmp_path)
    for rank, results in enumerate(ranks):
        for name, result in zip(cases, results):
            where = f"{name}, rank {rank}"
            sharded, whole = result["sharded"], result["whole"]
            assert result["is_whole"] if rank == 0 else not result["has_memory"], where
            assert sharded["losses"] == whole["losses"], where
            for when in ("start", "end"):
                assert sharded[when].keys() == whole[when].keys(), where
                differing = [key for key, value in whole[when].items() if not torch.equal(value, sharded[when][key])]
                assert not differing, f"{where}, {when}: {differing[:3]} differ"
    loaded, start = other.state_dict(), ranks[-1][1]["sharded"]["start"]
    assert all(torch.equal(value, start[name]) for name, value in loaded.items())


def _lent(stage: int, ema: float) -> dict[str, Any]:
    """Two steps, a lent model, two more steps; and the same without the lent model."""
    from tmass_dist.training.engine import Engine

    config = config_of(f"engine.zero_stage={stage}", f"optim.ema={ema}", "optim.frozen=[towers.clip.visual.conv1]")
    results: dict[str, Any] = {}
    for kind in ("lent", "plain"):
        torch.manual_seed(0)
        engine = Engine(small_objective(config), config)
        losses = _steps(engine, config)
        if kind == "lent":
            key = "ema" if ema else "weight"
            expected = {name: value.clone() for _, name, value in engine.state((key,))} | {
                name: value.clone() for name, value in engine.untrained_weights()
            }
            with engine.lent_model() as model:
                values = {name: value.detach().clone() for name, value in model.named_parameters()}
                results["is_itself"] = model is engine.model
            results["expected"], results["values"] = expected, values
        results[kind] = [*losses, *_steps(engine, config)]
        results[f"{kind}-state"] = {f"{key}:{name}": value.clone() for key, name, value in engine.state()}
    return results


@pytest.mark.parametrize(("stage", "ema"), [(0, 0.9), (1, 0.9), (2, 0.0), (2, 0.9), (3, 0.0), (3, 0.9)])
def test_a_lent_model_has_the_weights_or_their_mean_and_changes_nothing(stage: int, ema: float, tmp_path: Path) -> None:
    for rank in on_ranks(2, _lent, stage, ema, tmp_path=tmp_path):
        assert rank["is_itself"] == (stage < 3)  # no second copy
        assert rank["values"].keys() == rank["expected"].keys()
        assert all(torch.equal(value, rank["expected"][name]) for name, value in rank["values"].items())
        assert rank["lent"] == rank["plain"]
        assert all(torch.equal(value, rank["plain-state"][name]) for name, value in rank["lent-state"].items())


def test_parameters_without_memory_keep_shapes_buffers_and_flags() -> None:
    class Parts(torch.nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.tied = self.layer.weight
            self.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)
            self.register_buffer("table", torch.arange(4.0))

    with parameters_without_memory():
        model = Parts()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.table.tolist() == [0, 1, 2, 3] and not model.scale.requires_grad
    assert not torch.nn.Linear(2, 2).weight.is_meta  # the context is over
    shape = shape_of(Parts())
    assert (
        all(tensor.is_meta for tensor in (*shape.parameters(), *shape.buffers())) and shape.tied is shape.layer.weight
    )
    allocate(shape, torch.device("cpu"))
    assert shape.tied is shape.layer.weight and shape.layer.weight.shape == (2, 3) and not shape.scale.requires_grad
