"""Checks before any rank starts: the batch, the splits, the run directory."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.cli import writable_dir
from tmass_dist.config import Config, differing_keys, flat, load_config
from tmass_dist.errors import UserError
from tmass_dist.loggers import check_loggers

if TYPE_CHECKING:
    import logging

    from tmass_dist.data.index import Index
    from tmass_dist.models.tmass import RetrievalModel


def check_batch(config: Config, world: int) -> None:
    """Check that the global batch divides by the ranks, and so do the lanes if they are set.

    Raises:
        UserError: one does not; the numbers of ranks that fit are listed.
    """
    if config.data.batch_size % world:
        divisors = [n for n in range(1, config.data.batch_size + 1) if config.data.batch_size % n == 0]
        raise UserError(
            f"data.batch_size={config.data.batch_size} is not divisible by {world} ranks; use one of {divisors} ranks"
        )
    if config.data.lanes is not None:
        from tmass_dist.data.order import check_lanes

        check_lanes(config.data, world)


def usable_ranks(config: Config, num_ranks: int) -> int:
    """The largest number up to ``num_ranks`` that divides the global batch and the recorded lanes, if there are any."""
    saved = saved_config(config)
    lanes = config.data.lanes or (saved and saved.data.lanes) or config.data.batch_size
    return max(n for n in range(1, num_ranks + 1) if config.data.batch_size % n == 0 and lanes % n == 0)


def absolute(config: Config) -> Config:
    """The config with absolute paths, which are valid wherever a job starts."""
    from tmass_dist.data.remote import is_remote

    def resolved(path: str) -> str:
        return path if is_remote(path) else str(Path(path).resolve())

    paths: Any = {name: resolved(path) for name in ("val", "test") if (path := getattr(config.data, name))}
    paths["train"] = [replace(part, path=resolved(part.path)) for part in config.data.train_parts]
    files = {
        key: str(Path(value).resolve())
        for key in ("architecture", "pretrained")
        if (value := getattr(config.model, key)) and Path(value).is_file()
    }
    captions = tuple(str(Path(path).resolve()) if Path(path).is_file() else path for path in config.data.captions)
    return replace(
        config,
        run_dir=str(Path(config.run_dir).resolve()),
        init_from=str(Path(config.init_from).resolve()) if config.init_from else None,
        data=replace(config.data, captions=captions, **paths),
        model=replace(config.model, **files),
    )


def saved_config(config: Config) -> Config | None:
    """What the first start of the run wrote; None if this is the first start."""
    path = Path(config.run_dir) / "config.yaml"
    return load_config(str(path)) if path.is_file() else None


def load_splits(config: Config, *, check_shards: bool = True) -> tuple[Index, Index]:
    """The training split, and the split that selects the checkpoint.

    Args:
        config: the run.
        check_shards: check that every shard exists and has the right size.

    Raises:
        UserError: a split is missing or damaged, or has fewer frames than the model takes.
    """
    from tmass_dist.data.index import load_index
    from tmass_dist.data.mixture import make_mixture

    def load(directory: str) -> Index:
        index = load_index(directory, config.data.cache, config.data.retry_s, check_shards=check_shards)
        _check_frames(index, config.model.num_frames)
        return index

    parts = config.data.train_parts
    splits = [load(part.path) for part in parts]
    # A list of one split is that split, unless it is read several times.
    is_plain = len(parts) == 1 and parts[0].weight == 1
    training = splits[0] if is_plain else make_mixture(splits, [part.weight for part in parts])
    if config.evaluation.selected_on == "test":
        selection = load(config.data.test)
    elif config.data.val is None:
        training, selection = training.hold_out(config.data.holdout)
    else:
        selection = load(config.data.val)
    for path in config.data.captions:
        training = training.with_captions(path)
    return training, selection


def _check_frames(index: Index, num_frames: int) -> None:
    """The number is 0 where it varies: a short video then repeats its last frame, as the paper does."""
    if 0 < index.num_frames < num_frames:
        raise UserError(
            f"model.num_frames={num_frames} and the shards in {index.directory} hold {index.num_frames} frames of each "
            f"video; set model.num_frames={index.num_frames}, or pack again with --num-frames {num_frames}"
        )


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
    return check_and_load(config, world)[0]


def check_and_load(config: Config, world: int, *, look_at_files: bool = True) -> tuple[Config, tuple[Index, Index]]:
    """:func:`check`, and the splits of :func:`load_splits`.

    Args:
        config: the run.
        world: number of ranks.
        look_at_files: False if another rank of this node checks the shards and the run directory.
    """
    check_batch(config, world)
    check_loggers(config)
    if look_at_files:
        check_weights(config)
    # They import torch, which takes longer than all checks above.
    from tmass_dist.data.node_cache import check_order
    from tmass_dist.data.order import choose_order

    saved = saved_config(config)
    config = replace(config, data=choose_order(config.data, world, saved.data if saved else None))
    splits = load_splits(config, check_shards=look_at_files)
    check_order(splits[0], config.data, config.seed, world)
    if look_at_files:
        writable_dir(config.run_dir)
    if saved:
        saved = replace(saved, data=choose_order(saved.data, 1, saved.data))
        differing = differing_keys(absolute(saved), absolute(config))
        if differing:
            other = _other_run_dir(config, differing)
            raise UserError(
                f"{config.run_dir} holds a run with another config ({'; '.join(differing)}); "
                f"give the same settings to resume, or name another directory, as run_dir={other}"
            )
    return config, splits


def _other_run_dir(config: Config, differing: list[str]) -> str:
    """A directory beside that of the saved run, named after the settings that differ."""
    own = flat(asdict(config))
    keys = [line.partition(":")[0] for line in differing][:2]
    parts = [f"{key.rpartition('.')[2]}-{own[key]}" for key in keys]
    return re.sub(r"[^\w./=-]", "_", f"{config.run_dir}-{'-'.join(part.replace('/', '_') for part in parts)}")


def check_weights(config: Config) -> None:
    """Check that the weights with which the run begins are on this machine; a tag is downloaded to the cache.

    Raises:
        UserError: an unknown architecture or tag, a missing file, or weights that cannot be had without internet.
    """
    from tmass_dist.models.pretrained import check_pretrained

    resumes = False
    if Path(config.run_dir, "checkpoints").is_dir():
        from tmass_dist.training.start import untrained_weights

        resumes = untrained_weights(config.run_dir) is not None
    if config.init_from and not resumes:
        from tmass_dist.models.warm_start import find_source

        find_source(config.init_from)
    check_pretrained(config.model, with_weights=not resumes and not config.init_from)


def check_model(model: RetrievalModel, training: Index, config: Config, log: logging.Logger) -> None:
    """Check what is only known of a model that was built.

    Raises:
        UserError: the towers have BatchNorm.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(
            f"model.architecture={config.model.architecture} has BatchNorm layers, whose statistics would depend on "
            "the number of ranks and are not part of a checkpoint; use a ViT, as ViT-B-32-quickgelu"
        )
    if training.image_size < model.towers.image_size:
        log.warning(
            "the shards in %s hold frames of %d pixels, which are enlarged to the towers' %d; pack again with "
            "--image-size %d for sharper ones",
            training.directory,
            training.image_size,
            model.towers.image_size,
            model.towers.image_size,
        )
