"""Checks before any rank starts: the batch, the splits, the run directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tmass_dist.cli import writable_dir
from tmass_dist.config import Config, differing_keys, load_config
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    from tmass_dist.data.index import Index


def check_batch(config: Config, world: int) -> None:
    """Check that the global batch divides by the ranks.

    Raises:
        UserError: it does not; the numbers of ranks that fit are listed.
    """
    if config.data.batch_size % world:
        divisors = [n for n in range(1, config.data.batch_size + 1) if config.data.batch_size % n == 0]
        raise UserError(
            f"data.batch_size={config.data.batch_size} is not divisible by {world} ranks; use one of {divisors} ranks"
        )


def usable_ranks(config: Config, num_ranks: int) -> int:
    """The largest number up to ``num_ranks`` that divides the global batch and the recorded lanes, if there are any."""
    saved = _saved_config(config)
    lanes = config.data.lanes or (saved and saved.data.lanes) or config.data.batch_size
    return max(n for n in range(1, num_ranks + 1) if config.data.batch_size % n == 0 and lanes % n == 0)


def _saved_config(config: Config) -> Config | None:
    """What the first start of the run wrote; None if this is the first start."""
    path = Path(config.run_dir) / "config.yaml"
    return load_config(str(path)) if path.is_file() else None


def load_splits(config: Config) -> tuple[Index, Index]:
    """The training split, and the split that selects the checkpoint."""
    from tmass_dist.data.index import load_index

    remote = (config.data.cache, config.data.retry_s)
    training = load_index(config.data.train, *remote)
    if config.evaluation.selected_on == "test":
        selection = load_index(config.data.test, *remote)
    elif config.data.val is None:
        training, selection = training.hold_out(config.data.holdout)
    else:
        selection = load_index(config.data.val, *remote)
    for path in config.data.captions:
        training = training.with_captions(path)
    return training, selection


def validation_steps(config: Config, steps_per_epoch: int, num_steps: int) -> set[int]:
    """Steps (from 1) after which the checkpoint is validated; the last one always is."""
    if config.evals_per_epoch is None:
        return {*range(config.eval_every, num_steps + 1, config.eval_every), num_steps}
    # The published code validates after batches linspace(0, steps - 1, n + 1), truncated, without the first.
    number = config.evals_per_epoch
    batches = [int((steps_per_epoch - 1) / number * k) for k in range(1, number)] + [steps_per_epoch - 1]
    steps = {epoch * steps_per_epoch + batch + 1 for epoch in range(config.epochs) for batch in batches}
    return {step for step in steps if step <= num_steps} | {num_steps}


def check(config: Config, world: int) -> Config:
    """Find what can be found to be wrong before any rank starts.

    Returns:
        The config with what the first start of a run decides: ``data.order`` and ``data.lanes``.

    Raises:
        UserError: in one line, what is wrong and what to do.
    """
    from tmass_dist.data.node_cache import check_order
    from tmass_dist.data.order import choose_order

    check_batch(config, world)
    saved = _saved_config(config)
    config = replace(config, data=choose_order(config.data, world, saved.data if saved else None))
    training, _ = load_splits(config)
    check_order(training, config.data, config.seed, world)
    writable_dir(config.run_dir)
    if saved:
        differing = differing_keys(replace(saved, data=choose_order(saved.data, 1, saved.data)), config)
        if differing:
            raise UserError(
                f"{config.run_dir} holds a run with another config ({'; '.join(differing)}); "
                "give the same settings to resume, or another run_dir"
            )
    return config
