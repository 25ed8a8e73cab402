"""The training loop, read top to bottom.

``python -m tmass_dist.train --config demo.yaml [key=value ...]`` (one process), or the same under torchrun, or through
``launch/submit.py``. A second start with the same run directory goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.cli import run_command, writable_dir
from tmass_dist.config import Config, differing_keys, load_config, to_yaml

if TYPE_CHECKING:
    from tmass_dist.data.index import Index
    from tmass_dist.distributed import StopRequest


def check_batch(config: Config, world: int) -> None:
    """Raises: ValueError: the global batch does not divide by the ranks."""
    if config.data.batch_size % world:
        fitting = [n for n in range(1, config.data.batch_size + 1) if config.data.batch_size % n == 0]
        raise ValueError(
            f"data.batch_size={config.data.batch_size} is not divisible by {world} ranks; use one of {fitting} ranks"
        )


def load_splits(config: Config) -> tuple[Index, Index]:
    """The training split, and the one that chooses the checkpoint."""
    from tmass_dist.data.index import load_index

    training = load_index(config.data.train)
    if config.evaluation.selected_on == "test":
        return training, load_index(config.data.test)
    return (
        training.hold_out(config.data.holdout) if config.data.val is None else (training, load_index(config.data.val))
    )


def validation_steps(config: Config, steps_per_epoch: int, num_steps: int) -> set[int]:
    """Steps (from 1) after which the checkpoint is validated; the last one always is."""
    if config.evals_per_epoch is None:
        return {*range(config.eval_every, num_steps + 1, config.eval_every), num_steps}
    # As the published code counts: after batches linspace(0, steps - 1, n + 1), truncated, without the first.
    number = config.evals_per_epoch
    within = [int((steps_per_epoch - 1) / number * k) for k in range(1, number)] + [steps_per_epoch - 1]
    steps = {epoch * steps_per_epoch + batch + 1 for epoch in range(config.epochs) for batch in within}
    return {step for step in steps if step <= num_steps} | {num_steps}


def improves(scores: list[float], window: int) -> bool:
    """Is the mean of the last ``window`` scores above that of every earlier moment?"""
    means = [sum(part) / len(part) for end in range(1, len(scores) + 1) if (part := scores[max(0, end - window) : end])]
    return len(means) == 1 or means[-1] > max(means[:-1])


def check(config: Config, world: int) -> None:
    """What can be known to be wrong before any rank starts.

    Raises:
        ValueError: in one line, what is wrong and what to do.
    """
    check_batch(config, world)
    load_splits(config)
    writable_dir(config.run_dir)
    saved = Path(config.run_dir) / "config.yaml"
    if saved.is_file():
        differing = differing_keys(load_config(str(saved)), config)
        if differing:
            raise ValueError(
                f"{config.run_dir} holds a run with another config ({'; '.join(differing)}); "
                "give the same settings to resume, or another run_dir"
            )


def train(config: Config, stop: StopRequest | None = None) -> bool:
    """Train to the end, or on to the end; every rank calls it.

    Args:
        config: the run.
        stop: asked after every step; when any rank was told to stop, all save and come back.

    Returns:
        Whether the end was reached.
    """
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    from tmass_dist import distributed
    from tmass_dist.data.loader import TrainLoader
    from tmass_dist.data.transforms import augment, resize_centre_crop
    from tmass_dist.engine import checkpoint
    from tmass_dist.engine.optim import AuthorsAdamW, warmup_cosine
    from tmass_dist.engine.zero import start_engine
    from tmass_dist.evaluate import encode, ranks_of
    from tmass_dist.evaluation.ranking import metrics
    from tmass_dist.models.backbone import build_tokenizer
    from tmass_dist.models.tmass import build_model, parameter_groups
    from tmass_dist.monitor import Monitor, peak_memory_gb, start_log
    from tmass_dist.noise import keyed_noise, text_key

    device = distributed.initialise()
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
    model = build_model(config).to(device)
    training, selection = load_splits(config)
    loader = TrainLoader(
        training,
        batch_size=config.data.batch_size,
        rank=rank,
        world_size=world,
        seed=config.seed,
        tokenize=tokenize,
        num_workers=config.data.num_workers,
        num_frames=config.model.num_frames,
        random_frames=config.data.frames == "random",
    )
    num_steps = config.epochs * loader.steps_per_epoch
    num_steps = min(num_steps, config.max_steps or num_steps)
    validations = validation_steps(config, loader.steps_per_epoch, num_steps)
    groups: Any = parameter_groups(model, config)
    base_lrs = [group["lr"] for group in groups]
    if config.optim.kind == "authors":
        optimizer = AuthorsAdamW(groups, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    engine = start_engine(model, optimizer, config)
    step = checkpoint.resume(engine, checkpoints)
    monitor = Monitor(run_dir / "tensorboard", step)
    best_path = checkpoints / "best.json"
    history_path = checkpoints / "validation.json"
    history = json.loads(history_path.read_text()) if history_path.is_file() else []
    history = [point for point in history if point["step"] <= step]
    log.info("%s: step %d of %d, %d ranks, batch %d", run_dir, step, num_steps, world, config.data.batch_size)

    batches = loader.batches(step)
    bar = tqdm(
        total=num_steps, initial=step, desc="train", unit="step", disable=not distributed.is_main(), mininterval=1
    )
    waited_s, logged_at, logged_step = 0.0, time.perf_counter(), step
    model.train()
    while step < num_steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - asked
        # Noise by pair, dropout by rank, both keyed by the step: a resumed run draws what an unbroken one would.
        noise_BD = None
        if model.head.mass is not None and config.stochastic.training == "sampled":
            keys = torch.tensor([text_key(step, *pair) for pair in zip(batch.video_ids, batch.caption_slots)])
            noise_BD = keyed_noise(
                keys,
                model.towers.embed_dim,
                seed=config.seed,
                prior=config.stochastic.prior,
                std=config.stochastic.prior_std,
            ).to(device)
        torch.manual_seed(text_key(config.seed, step, rank) & 0x7FFFFFFF)

        factor = warmup_cosine(step, num_steps, int(config.optim.warmup * num_steps))
        for group, base_lr in zip(engine.optimizer.param_groups, base_lrs):
            group["lr"] = base_lr * factor
        pixels = batch.pixels_BFHWC.to(device, non_blocking=True)
        if config.data.augment:
            crops = [text_key("crop", config.seed, step, *pair) for pair in zip(batch.video_ids, batch.caption_slots)]
            pixels = augment(pixels, crops, model.towers.image_size)
        else:
            pixels = resize_centre_crop(pixels, model.towers.image_size)
        losses = engine(pixels, batch.tokens_BL.to(device), noise_BD)
        engine.backward(losses.total)
        engine.step()
        step += 1
        bar.update()

        if step % config.log_every == 0 or step == num_steps:
            total = losses.total.item()
            if distributed.max_over_ranks(float(total != total)):
                raise ValueError(f"the loss is not a number at step {step}; lower optim.lr and start again")
            elapsed_s = time.perf_counter() - logged_at
            norm = engine.get_global_grad_norm()
            values = {
                "loss/total": total,
                "loss/stochastic": losses.stochastic.item(),
                "loss/support": losses.support.item(),
                "loss/kl": losses.divergence.item(),
                "model/logit_scale": min(model.towers.logit_scale.exp().item(), 100.0),
                "model/mean_radius": losses.mean_radius.item(),
                "speed/videos_per_s": (step - logged_step) * config.data.batch_size / elapsed_s,
                "speed/data_wait": waited_s / elapsed_s,
                "speed/memory_gb": peak_memory_gb(),
            }
            values |= {f"optim/lr_{group['name']}": base * factor for group, base in zip(groups, base_lrs)}
            if norm is not None:
                values["optim/grad_norm"] = float(norm)
            monitor.scalars(values, step)
            rate = values["speed/videos_per_s"]
            left = datetime.timedelta(seconds=round((num_steps - step) * config.data.batch_size / rate))
            log.info("step %d/%d loss %.4f, %.1f videos/s, ETA %s", step, num_steps, total, rate, left)
            waited_s, logged_at, logged_step = 0.0, time.perf_counter(), step

        stopping = stop is not None and stop.agreed()
        if stopping and step not in validations:
            checkpoint.save(engine, checkpoints, step)
        if step in validations:
            model.eval()
            features = encode(model, selection, tokenize, config, device)
            found = metrics(ranks_of(model.head, features, config).t2v_T)
            model.head.to(device)
            model.train()
            split = config.evaluation.selected_on
            tags = {f"{split}/{config.evaluation.protocol}/t2v_{name}": value for name, value in found.items()}
            monitor.scalars(tags, step)
            log.info("step %d: %s t2v R@1 %.1f (%s)", step, split, found["R@1"], config.evaluation.protocol)
            history.append({"step": step, "R@1": found["R@1"]})
            improved = improves([point["R@1"] for point in history], config.evaluation.window)
            if improved and distributed.is_main():
                weights = {
                    name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()
                }
                aside = checkpoints / "best.safetensors.tmp"
                save_file(weights, aside)
                os.replace(aside, checkpoints / "best.safetensors")
                checkpoint.write_json(best_path, {"step": step, "selected_on": split, "R@1": found["R@1"]})
            if distributed.is_main():
                checkpoint.write_json(history_path, history)
            checkpoint.save(engine, checkpoints, step)
            logged_at, logged_step, waited_s = time.perf_counter(), step, 0.0
        if stopping and step < num_steps:
            log.info("asked to stop: saved at step %d of %d; the same command goes on from there", step, num_steps)
            break
    bar.close()
    monitor.close()
    distributed.barrier()
    if step == num_steps:
        log.info("trained: %s", run_dir)
    return step == num_steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tmass_dist.train", description=__doc__)
    parser.add_argument("--config", required=True, help="a page of configs/, or a path")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, as optim.lr=1e-5")
    arguments = parser.parse_intermixed_args()
    from tmass_dist.distributed import StopRequest, check_environment, finish

    config = load_config(arguments.config, arguments.overrides)
    several = check_environment()
    check(config, int(os.environ["WORLD_SIZE"]) if several else 1)
    train(config, StopRequest())
    finish()


if __name__ == "__main__":
    run_command(main)
