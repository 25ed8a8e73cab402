"""The model with which a start of a run begins: pretrained, of another run (``init_from``), or of this run's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tmass_dist.cli import write_text
from tmass_dist.config import Config
from tmass_dist.data.remote import sha256_of
from tmass_dist.distributed import all_gather_objects, broadcast_from, is_main, share_failure
from tmass_dist.models.loading import read_weights
from tmass_dist.models.warm_start import start_from
from tmass_dist.training import objective
from tmass_dist.training.checkpoint import saved_steps
from tmass_dist.training.objective import Objective
from tmass_dist.training.sharded import parameters_without_memory

if TYPE_CHECKING:
    import logging

UNTRAINED = "untrained.safetensors"
"""The weights that a run does not train (``optim.frozen``, ...): checkpoints hold only those that it trains."""


def untrained_weights(run_dir: str | Path) -> Path | None:
    """The file of untrained weights of a run that has a checkpoint; None if it is missing or damaged.

    With it a run resumes from its own directory alone. Version 0.1 did not write it.
    """
    directory = Path(run_dir) / "checkpoints"
    path = directory / UNTRAINED
    try:
        is_whole = path.with_suffix(".sha256").read_text(encoding="utf-8") == sha256_of(path)
    except OSError:
        return None
    return path if is_whole and saved_steps(directory) else None


def starting_model(config: Config, device: torch.device, log: logging.Logger) -> Objective:
    """The model on ``device``, the same on every rank; every rank calls it.

    With ZeRO 3 rank 0 has it on the CPU, and the others have its shapes only, until the engine shards it.

    Raises:
        UserError: weights that are missing, damaged or of another architecture.
    """
    path = all_gather_objects(untrained_weights(config.run_dir) if is_main() else None)[0]
    is_sharded = config.engine.zero_stage == 3
    model, failure = None, None
    try:
        if is_sharded and not is_main():
            with parameters_without_memory():
                model = objective.build_objective(config, without_weights=True)
        elif path is not None:
            model = objective.build_objective(config, without_weights=True)
            _load_untrained(model, path)
        elif config.init_from:
            model = objective.build_objective(
                config, without_weights=True, fill=lambda plain: log.info(start_from(plain, config))
            )
        else:
            model = objective.build_objective(config)
    except Exception as error:
        failure = error
    share_failure(failure)
    assert model is not None
    if is_sharded:
        torch.manual_seed(config.seed)  # parameters without memory have drawn fewer random numbers
    else:
        model.to(device)
    if path is None:
        if config.init_from and not is_sharded:
            # The other run may have written better weights while the ranks were reading.
            for value in model.state_dict().values():
                broadcast_from(0, value)
        if is_main():
            _write_untrained(model, Path(config.run_dir) / "checkpoints")
    return model


def _untrained(model: Objective) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if not value.requires_grad}


def _load_untrained(model: Objective, path: Path) -> None:
    weights = read_weights(path)
    with torch.no_grad():
        for name, parameter in _untrained(model).items():
            parameter.copy_(weights[name])


def _write_untrained(model: Objective, directory: Path) -> None:
    from safetensors.torch import save_file

    path = directory / UNTRAINED
    path.with_suffix(".sha256").unlink(missing_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in _untrained(model).items()}, path)
    write_text(path.with_suffix(".sha256"), sha256_of(path))
