"""The training loop, read top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.config import Config, to_yaml
from tmass_dist.errors import UserError
from tmass_dist.training.checks import check, load_splits, validation_steps

if TYPE_CHECKING:
    import logging

    import torch

    from tmass_dist.data.loader import Batch
    from tmass_dist.distributed import StopRequest
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import Objective


def step_inputs(batch: Batch, step: int, model: Objective, config: Config, device: torch.device) -> tuple[Any, ...]:
    """What ``Engine.backward`` takes: pixels, tokens, noise and dropout keys of this rank's pairs.

    Every draw is keyed by seed, step and pair: the same on any number of ranks, and after any interruption.
    """
    import torch

    from tmass_dist.data.transforms import augment, resize_centre_crop
    from tmass_dist.noise import keyed_noise, text_key

    pairs = list(zip(batch.video_ids, batch.caption_slots))
    noise_BD = None
    if model.head.mass is not None and config.stochastic.training == "sampled":
        noise_BD = keyed_noise(
            torch.tensor([text_key(step, *pair) for pair in pairs]),
            config.stochastic.samples * model.towers.embed_dim,
            seed=config.seed,
            prior=config.stochastic.prior,
            std=config.stochastic.prior_std,
        ).to(device)
        noise_BD = noise_BD.unflatten(1, (config.stochastic.samples, -1))
    pixels = batch.pixels_BFHWC.to(device, non_blocking=True)
    if config.data.augment:
        crops = [text_key("crop", config.seed, step, *pair) for pair in pairs]
        pixels = augment(pixels, crops, model.towers.image_size)
    else:
        pixels = resize_centre_crop(pixels, model.towers.image_size)
    dropout_keys = [text_key("dropout", config.seed, step, *pair) for pair in pairs]
    return pixels, batch.tokens_BL.to(device), noise_BD, dropout_keys


def report_broken(
    run_dir: Path, step: int, batch: Batch, loss: float, engine: Engine, config: Config, log: logging.Logger
) -> None:
    """A loss or gradient is not a number: write down whose, and stop or go on as the config says; every rank calls it.

    Raises:
        UserError: with ``engine.nonfinite=stop``.
    """
    from tmass_dist import distributed
    from tmass_dist.cli import write_json

    pairs = [f"{video} caption {slot}" for video, slot in zip(batch.video_ids, batch.caption_slots)]
    mine = {"rank": distributed.rank(), "loss": str(loss), "pairs": pairs}
    broken = [found for found in distributed.gather_objects(None if engine.finite else mine) if found]
    path = run_dir / "nonfinite" / f"step-{step:08d}.json"
    if distributed.is_main():
        path.parent.mkdir(exist_ok=True)
        write_json(path, broken)
    ranks = ", ".join(str(found["rank"]) for found in broken)
    line = (
        f"step {step}: the loss or a gradient of rank {ranks} is not a number; no rank updated; the pairs are in {path}"
    )
    if config.engine.nonfinite == "stop":
        raise UserError(f"{line}; lower optim.lr, look at the pairs, or set engine.nonfinite=skip")
    log.warning("%s; skipped", line)


def train(config: Config, stop: StopRequest | None = None) -> bool:
    """Train to the end, or on to the end; every rank calls it.

    Args:
        config: the run.
        stop: asked after every step; when any rank was told to stop, all save and come back.

    Returns:
        Whether the end was reached.
    """
    import copy
    from contextlib import closing

    import torch
    from tqdm import tqdm

    from tmass_dist import distributed
    from tmass_dist.data.loader import TrainLoader
    from tmass_dist.data.quarantine import Quarantine
    from tmass_dist.models.backbone import build_tokenizer
    from tmass_dist.phase_timer import PHASE_TIMER
    from tmass_dist.training import checkpoint
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.monitor import Meter, Monitor, forward_flops, start_log
    from tmass_dist.training.objective import build_objective
    from tmass_dist.training.optim import warmup_cosine
    from tmass_dist.training.validation import Validator
    from tmass_dist.training.watchdog import Watchdog

    device = distributed.initialise(config.engine.timeout_s)
    rank, world = distributed.rank(), distributed.world_size()
    check(config, world)
    distributed.barrier()  # every rank has compared the saved config before rank 0 writes it
    run_dir = Path(config.run_dir)
    checkpoints = run_dir / "checkpoints"
    if distributed.is_main():
        checkpoints.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    distributed.barrier()
    log = start_log(run_dir / "train.log")

    torch.manual_seed(config.seed)
    tokenize = build_tokenizer(config.model.architecture)
    model = build_objective(config).to(device)
    training, selection = load_splits(config)
    loader = TrainLoader(
        training,
        config.data,
        rank=rank,
        world_size=world,
        seed=config.seed,
        tokenize=tokenize,
        num_frames=config.model.num_frames,
        timeout_s=config.engine.timeout_s,
    )
    num_steps = config.epochs * loader.steps_per_epoch
    num_steps = min(num_steps, config.max_steps or num_steps)
    validations = validation_steps(config, loader.steps_per_epoch, num_steps)
    validator = Validator(copy.deepcopy(model), selection, tokenize, config, device)
    engine = Engine(model, config)
    step = checkpoint.resume(engine, checkpoints, log)
    saver = checkpoint.Saver(engine, checkpoints, config.engine.keep)
    validator.resume(step)
    quarantine = Quarantine(run_dir / "quarantine.jsonl", len(training), config.data.max_bad)
    monitor = Monitor(run_dir / "tensorboard", step)
    shapes: list[torch.Tensor] = []  # a pair's pixels and tokens, to count the towers' work
    meter = Meter(monitor, log, config, num_steps, lambda: forward_flops(validator.model, *shapes))
    log.info("%s: step %d of %d, %d ranks, batch %d", run_dir, step, num_steps, world, config.data.batch_size)

    bar = tqdm(
        total=num_steps, initial=step, desc="train", unit="step", disable=not distributed.is_main(), mininterval=1
    )
    model.train()
    stopping = False
    meter.start(step)
    with Watchdog(config.engine.timeout_s) as watch, closing(loader.batches(step)) as batches:
        while step < num_steps and not stopping:
            watch.beat(step)
            logged = (step + 1) % config.log_every == 0 or step + 1 == num_steps
            with meter.waiting():
                batch = next(batches)
            inputs = step_inputs(batch, step, model, config, device)
            shapes[:] = inputs[:2]
            if logged:
                PHASE_TIMER.start("encode")
            losses = engine.backward(*inputs)
            PHASE_TIMER.switch("optimizer")
            # One exchange a step: was anybody asked to stop, is any number broken, is anybody still writing, did
            # anybody find a damaged video?
            new = quarantine.unknown(batch.damaged)
            asked, broken, writing, damaged = distributed.max_over_ranks(
                [float(stop is not None and stop.asked), float(not engine.finite), float(saver.busy), float(bool(new))]
            )
            if damaged:
                for line in quarantine.add(new):
                    log.warning("step %d: %s", step + 1, line)
            stopping = asked > 0
            if broken:
                saver.finish()
                report_broken(run_dir, step + 1, batch, losses.total.item(), engine, config, log)
            if saver.pending and not writing:
                saver.finish()
            factor = warmup_cosine(step, num_steps, int(config.optim.warmup * num_steps))
            norms = engine.group_norms() if logged and not broken else {}
            engine.step(factor, hold=broken > 0)
            step += 1
            bar.update()
            if logged:
                rates = {name: base * factor for name, base in engine.base_lrs.items()}
                meter.log(step, losses, norms, rates, PHASE_TIMER.stop(), len(quarantine.reasons))
            if step in validations:
                validator.validate(step, engine, monitor, log)
            if step in validations or stopping:
                saver.begin(step)
                meter.start(step)
        saver.finish()
    if step < num_steps:
        log.info("asked to stop: saved at step %d of %d; the same command goes on from there", step, num_steps)
    bar.close()
    if step == num_steps:
        monitor.outcome(config, validator.found)
    monitor.close()
    distributed.barrier()
    if step == num_steps:
        log.info("trained: %s", run_dir)
    return step == num_steps
