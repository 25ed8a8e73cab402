"""Training from the first step, or from the last checkpoint, to the end."""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from tmass_dist import distributed
from tmass_dist.config import Config, to_yaml
from tmass_dist.data.loader import TrainLoader
from tmass_dist.data.quarantine import Quarantine
from tmass_dist.models.backbone import build_tokenizer
from tmass_dist.phase_timer import PHASE_TIMER
from tmass_dist.training import checkpoint, objective
from tmass_dist.training.checks import check, load_splits, validation_steps
from tmass_dist.training.engine import Engine
from tmass_dist.training.monitor import Meter, Monitor, forward_flops, start_log
from tmass_dist.training.nonfinite import report_nonfinite
from tmass_dist.training.optim import warmup_cosine
from tmass_dist.training.step_inputs import step_inputs
from tmass_dist.training.validation import Validator
from tmass_dist.training.watchdog import Watchdog

if TYPE_CHECKING:
    import logging

    from tmass_dist.data.loader import Batch
    from tmass_dist.distributed import StopRequest
    from tmass_dist.training.objective import Losses


def train(config: Config, stop: StopRequest | None = None) -> bool:
    """Train to the end; continues from the newest complete checkpoint of the run. Every rank calls it.

    Args:
        config: the run.
        stop: checked after every step; when any rank was asked to stop, all ranks save and return.

    Returns:
        Whether the end was reached.
    """
    device = distributed.initialise(config.engine.timeout_s)
    config = check(config, distributed.world_size())
    distributed.barrier()  # every rank has compared the saved config before rank 0 writes it
    run_dir = Path(config.run_dir)
    if distributed.is_main():
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    distributed.barrier()
    return _TrainingRun(config, device, start_log(run_dir / "train.log")).run(stop)


class _TrainingRun:
    """One start of a run: what it trains with, and the step that it has reached."""

    def __init__(self, config: Config, device: torch.device, log: logging.Logger) -> None:
        self.config, self.device, self.log = config, device, log
        self.run_dir = Path(config.run_dir)
        torch.manual_seed(config.seed)
        tokenize = build_tokenizer(config.model.architecture)
        self.model = objective.build_objective(config).to(device)
        training, selection = load_splits(config)
        self.loader = TrainLoader(
            training,
            config.data,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            seed=config.seed,
            tokenize=tokenize,
            num_frames=config.model.num_frames,
            timeout_s=config.engine.timeout_s,
            node_ranks=distributed.node_ranks(),
        )
        self.num_steps = config.epochs * self.loader.steps_per_epoch
        self.num_steps = min(self.num_steps, config.max_steps or self.num_steps)
        self.num_warmup_steps = int(config.optim.warmup * self.num_steps)
        self.validations = validation_steps(config, self.loader.steps_per_epoch, self.num_steps)
        # The copy is made before the engine takes the model: ZeRO-3 replaces its weights by shards.
        self.validator = Validator(copy.deepcopy(self.model), selection, tokenize, config, device)
        self.engine = Engine(self.model, config)
        self.step = checkpoint.resume(self.engine, self.run_dir / "checkpoints", log)
        self.saver = checkpoint.Saver(self.engine, self.run_dir / "checkpoints", config.engine.keep)
        self.validator.resume(self.step)
        self.quarantine = Quarantine(self.run_dir / "quarantine.jsonl", len(training), config.data.max_bad)
        self.monitor = Monitor(self.run_dir / "tensorboard", self.step)
        self._pair_shapes: list[torch.Tensor] = []  # pixels and tokens of the last step, to count the towers' FLOPs
        self.meter = Meter(
            self.monitor, log, config, self.num_steps, lambda: forward_flops(self.validator.model, *self._pair_shapes)
        )

    def run(self, stop: StopRequest | None) -> bool:
        """Train until the end or until any rank was asked to stop; returns whether the end was reached."""
        self.log.info(
            "%s: step %d of %d, %d ranks, batch %d",
            self.run_dir,
            self.step,
            self.num_steps,
            distributed.world_size(),
            self.config.data.batch_size,
        )
        lanes = f" ({self.config.data.lanes} lanes)" if self.config.data.lanes else ""
        num_pairs = self.loader.steps_per_epoch * self.config.data.batch_size + self.loader.left_out
        self.log.info(
            "data.order=%s%s: %d of %d pairs fill no batch and are left out of each epoch",
            self.config.data.order,
            lanes,
            self.loader.left_out,
            num_pairs,
        )
        hidden = not distributed.is_main()
        bar = tqdm(total=self.num_steps, initial=self.step, desc="train", unit="step", disable=hidden, mininterval=1)
        self.model.train()
        self.meter.start(self.step)
        stopping = False
        with Watchdog(self.config.engine.timeout_s) as watchdog, closing(self.loader.batches(self.step)) as batches:
            while self.step < self.num_steps and not stopping:
                watchdog.beat(self.step)
                with self.meter.waiting():
                    batch = next(batches)
                stopping = self._train_step(batch, stop is not None and stop.requested)
                bar.update()
                if self.step in self.validations:
                    self.validator.validate(self.step, self.engine, self.monitor, self.log)
                if self.step in self.validations or stopping:
                    self.saver.begin(self.step)
                    self.meter.start(self.step)
            self.saver.finish()
        bar.close()
        return self._close()

    def _train_step(self, batch: Batch, stop_requested: bool) -> bool:
        """One optimisation step; returns whether any rank was asked to stop."""
        is_logged = (self.step + 1) % self.config.log_every == 0 or self.step + 1 == self.num_steps
        inputs = step_inputs(batch, self.step, self.model, self.config, self.device)
        self._pair_shapes = list(inputs[:2])
        if is_logged:
            PHASE_TIMER.start("encode")
        losses = self.engine.backward(*inputs)
        PHASE_TIMER.switch("optimizer")
        stopping, is_nonfinite = self._agree(batch, losses, stop_requested)
        factor = warmup_cosine(self.step, self.num_steps, self.num_warmup_steps)
        norms = self.engine.group_norms() if is_logged and not is_nonfinite else {}
        self.engine.step(factor, skip_update=is_nonfinite)
        self.step += 1
        if is_logged:
            rates = {name: base * factor for name, base in self.engine.base_lrs.items()}
            phase_seconds = PHASE_TIMER.stop()
            self.meter.log(self.step, losses, norms, rates, phase_seconds, len(self.quarantine.reasons))
        return stopping

    def _agree(self, batch: Batch, losses: Losses, stop_requested: bool) -> tuple[bool, bool]:
        """One exchange a step: was a rank asked to stop, is a gradient not finite, does a rank still write a
        checkpoint, did a rank find a damaged video? Returns the first two."""
        new_damaged = self.quarantine.unknown(batch.damaged)
        flags = [stop_requested, not self.engine.finite, self.saver.busy, bool(new_damaged)]
        any_stop, any_nonfinite, any_writing, any_damaged = distributed.all_reduce_max([float(flag) for flag in flags])
        if any_damaged:
            for line in self.quarantine.add(new_damaged):
                self.log.warning("step %d: %s", self.step + 1, line)
        if any_nonfinite:
            self.saver.finish()
            self._report_nonfinite(batch, losses)
        if self.saver.pending and not any_writing:
            self.saver.finish()
        return any_stop > 0, any_nonfinite > 0

    def _report_nonfinite(self, batch: Batch, losses: Losses) -> None:
        loss, is_own = losses.total.item(), not self.engine.finite
        report_nonfinite(self.run_dir, self.step + 1, batch, loss, is_own, self.config, self.log)

    def _close(self) -> bool:
        is_complete = self.step == self.num_steps
        if is_complete:
            self.monitor.final_metrics(self.config, self.validator.last_metrics)
        self.monitor.close()
        distributed.barrier()
        if is_complete:
            self.log.info("training is complete: %s", self.run_dir)
        else:
            line = "asked to stop: saved at step %d of %d; run the same command again to continue"
            self.log.info(line, self.step, self.num_steps)
        return is_complete
