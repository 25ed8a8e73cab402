"""Training from the first step, or from the last checkpoint, to the end."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tmass_dist import distributed
from tmass_dist.cli import read_json, write_json, write_text
from tmass_dist.config import Config, to_yaml
from tmass_dist.data.loader import TrainLoader
from tmass_dist.data.mixture import describe_parts
from tmass_dist.data.quarantine import Quarantine
from tmass_dist.errors import UserError
from tmass_dist.models.backbone import build_tokenizer
from tmass_dist.phase_timer import PHASE_TIMER
from tmass_dist.precision import uses_bf16
from tmass_dist.score_labels import label_words
from tmass_dist.training import checkpoint
from tmass_dist.training.checks import check_and_load, check_model, validation_steps
from tmass_dist.training.engine import Engine
from tmass_dist.training.monitor import LoggedStep, Meter, Monitor, forward_flops, hours_tag, start_log
from tmass_dist.training.nonfinite import report_nonfinite
from tmass_dist.training.optim import warmup_cosine
from tmass_dist.training.part_meter import PartMeter
from tmass_dist.training.profiler import StepProfiler
from tmass_dist.training.run_lock import RunLock
from tmass_dist.training.start import starting_model
from tmass_dist.training.step_inputs import step_inputs
from tmass_dist.training.validation import Validator
from tmass_dist.training.watchdog import Watchdog

if TYPE_CHECKING:
    import logging

    from tmass_dist.data.index import Index
    from tmass_dist.data.loader import Batch
    from tmass_dist.distributed import StopRequest
    from tmass_dist.training.objective import Losses


COMPLETE = "complete.json"
"""In the directory of a run that has reached its end, and its last validation."""


def train(config: Config, stop: StopRequest | None = None) -> bool:
    """Train to the end; continues from the newest complete checkpoint of the run. Every rank calls it.

    Args:
        config: the run.
        stop: checked after every step and within a validation; when any rank was asked to stop, all save and return.

    Returns:
        Whether the end was reached.

    Raises:
        UserError: the settings, the data or the run directory do not allow the run.
    """
    failure, loader, splits = None, None, None
    try:
        world_size = distributed.environment_rank()[1]
        config, splits = check_and_load(config, world_size, look_at_files=distributed.is_first_of_node())
        if config.data.cache_gb is None:
            # Before CUDA, NCCL and their threads, which a fork does not copy safely.
            loader = _start_loader(config, splits[0], None)
    except Exception as error:
        failure = error
    with ExitStack() as stack:
        if loader is not None:
            stack.enter_context(closing(loader))  # its processes end, whatever fails from here on
        device = distributed.initialise(config.engine.timeout_s)
        distributed.share_failure(failure)
        assert splits is not None
        if loader is None:  # the cache of a node needs to know its ranks
            loader = stack.enter_context(closing(_start_loader(config, splits[0], distributed.node_ranks())))
        run_dir = Path(config.run_dir)
        stack.enter_context(RunLock(run_dir))
        if distributed.is_main():
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        log = start_log(run_dir / "train.log")
        run = _TrainingRun(config, device, log, loader, splits, stop)
        stack.enter_context(logging_redirect_tqdm([log]))
        return run.run()


def _start_loader(config: Config, training: Index, node_ranks: list[int] | None) -> TrainLoader:
    rank, world_size = distributed.environment_rank()
    loader = TrainLoader(
        training,
        config.data,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        tokenize=build_tokenizer(config.model.architecture),
        num_frames=config.model.num_frames,
        timeout_s=config.engine.timeout_s,
        node_ranks=node_ranks,
    )
    loader.start_workers()
    return loader


@dataclass
class _Step:
    """A step whose update was started, and whose result was not read yet."""

    number: int
    """From 1."""
    batch: Batch
    losses: Losses
    logged: LoggedStep | None


class _TrainingRun:
    """One start of a run: what it trains with, and the step that it has reached."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        log: logging.Logger,
        loader: TrainLoader,
        splits: tuple[Index, Index],
        stop: StopRequest | None,
    ) -> None:
        self.config, self.device, self.log, self.loader, self.stop = config, device, log, loader, stop
        self.run_dir = Path(config.run_dir)
        self.watchdog = Watchdog(config.engine.timeout_s)
        torch.manual_seed(config.seed)
        self.model = starting_model(config, device, log)
        training, selection = splits
        check_model(self.model, training, config, log)
        for line in describe_parts(training):
            log.info("data.train: %s", line)
        self.num_steps = config.epochs * self.loader.steps_per_epoch
        self.num_steps = min(self.num_steps, config.max_steps or self.num_steps)
        self.num_warmup_steps = int(config.optim.warmup * self.num_steps)
        self.validations = validation_steps(config, self.loader.steps_per_epoch, self.num_steps)
        profiled = config.engine.profile_range()
        if profiled and profiled[1] > self.num_steps:
            raise UserError(
                f"engine.profile_steps is {config.engine.profile_steps!r}: the run has {self.num_steps} steps"
            )
        tokenize = build_tokenizer(config.model.architecture)
        self.validator = Validator(selection, tokenize, config, device, self._progress)
        self.engine = Engine(self.model, config)
        self.step = checkpoint.resume(self.engine, self.run_dir / "checkpoints", log)
        self.saver = checkpoint.Saver(self.engine, self.run_dir / "checkpoints", config.engine.keep)
        self.validator.resume(self.step)
        self.quarantine = Quarantine(self.run_dir / "quarantine.jsonl", len(training), config.data.max_bad)
        self.monitor = Monitor(config, self.step, repeats_validation=not self.validator.has_validated(self.step))
        self.profiler = StepProfiler(self.run_dir, profiled, log) if profiled and distributed.is_main() else None
        self._pair_inputs: list[torch.Tensor] = []  # the last step's pixels and tokens
        shape_only = self.engine.shape_only
        self.meter = Meter(
            self.monitor, log, config, self.num_steps, lambda: forward_flops(shape_only, *self._pair_inputs)
        )
        self._start_s = time.perf_counter()
        self.part_meter = PartMeter(training, device)
        self._stopping = False
        self._previous: _Step | None = None
        self._flags: tuple[Callable[[], list[float]], list[tuple[str, str]]] | None = None
        self._config_is_written = False

    def run(self) -> bool:
        """Train until the end or until any rank was asked to stop; returns whether the end was reached."""
        world_size, batch_size = distributed.world_size(), self.config.data.batch_size
        start = (self.run_dir, self.step, self.num_steps, world_size, batch_size)
        self.log.info("%s: step %d of %d, %d ranks, batch %d", *start)
        lanes = f" ({self.config.data.lanes} lanes)" if self.config.data.lanes else ""
        num_pairs = self.loader.steps_per_epoch * batch_size + self.loader.left_out
        self.log.info(
            "data.order=%s%s: %d of %d pairs fill no batch and are left out of each epoch",
            self.config.data.order,
            lanes,
            self.loader.left_out,
            num_pairs,
        )
        precision = "bfloat16" if uses_bf16(self.config.engine, self.device) else "float32"
        self.log.info("towers in %s on %s", precision, self.device.type)
        # On a terminal only (None); only rank 0.
        disable = None if distributed.is_main() else True
        bar = tqdm(total=self.num_steps, initial=self.step, desc="train", unit="step", disable=disable, mininterval=1)
        if self.step < self.num_steps and distributed.is_main():
            (self.run_dir / COMPLETE).unlink(missing_ok=True)
        self.model.train()
        self.meter.start(self.step)
        save_every = self.config.engine.save_every
        with self.watchdog, closing(bar), closing(self.loader.batches(self.step)) as batches:
            if self._must_validate_first():
                self._validate()
            while not (self._is_at_the_end() or self._stopping):
                self.watchdog.begin_step(self.step)
                if self.profiler is not None:
                    self.profiler.begin_step(self.step + 1)
                self._train_step(batches)
                if self.profiler is not None and self.profiler.end_step(self.step):
                    self.meter.start(self.step)
                bar.update()
                self._write_config()
                is_saved = save_every is not None and self.step % save_every == 0
                if is_saved or self.step in self.validations or self._stopping:
                    self._save_and_validate()
            self.saver.finish()
            if self.profiler is not None:
                self.profiler.close(self.step)
        return self._close()

    def _is_at_the_end(self) -> bool:
        """Whether all steps are done, or ``patience`` ends the training before."""
        return self.step == self.num_steps or (
            self.step > 0 and self.validator.has_validated(self.step) and self.validator.is_exhausted()
        )

    def _must_validate_first(self) -> bool:
        """Whether an earlier start saved this step and was stopped before its validation, or ``eval_at_start``."""
        if self.step == 0:
            return self.config.eval_at_start
        return self.step in self.validations and not self.validator.has_validated(self.step)

    def _train_step(self, batches: Iterator[Batch]) -> None:
        is_logged = (self.step + 1) % self.config.log_every == 0 or self.step + 1 == self.num_steps
        with self.meter.waiting():
            batch = next(batches)
        inputs = step_inputs(batch, self.step, self.model, self.config, self.device)
        self._pair_inputs = list(inputs[:2])
        if is_logged:
            PHASE_TIMER.start("encode")
        losses = self.engine.backward(*inputs)
        # The results of the step before are read only now, while the GPU works on this one.
        PHASE_TIMER.switch("logging")
        if not self._read_previous():
            self.engine.step(0.0, discard=True)
            self._diagnose_previous()
            inputs = step_inputs(batch, self.step, self.model, self.config, self.device)
            losses = self.engine.backward(*inputs)
        self._previous = None
        self._read_flags()
        PHASE_TIMER.switch("optimizer")
        factor = warmup_cosine(self.step, self.num_steps, self.num_warmup_steps)
        self.engine.step(factor)
        self.step += 1
        self._start_flags(batch.damaged)
        logged = None
        if is_logged:
            rates = {name: base * factor for name, base in self.engine.base_lrs.items()}
            logged = self.meter.measure(self.step, rates, PHASE_TIMER.stop())
        self._previous = _Step(self.step, batch, losses, logged)

    def _read_previous(self) -> bool:
        """Log the step before if it is to be logged; returns whether it updated the weights."""
        previous = self._previous
        if previous is None:
            return True
        is_finite = self.engine.last_step_was_finite()
        if is_finite:
            self.part_meter.add(previous.batch.parts, previous.losses.pair_loss_B)
        if previous.logged is not None:
            norms = self.engine.group_norms() if is_finite else {}
            num_damaged = len(self.quarantine.reasons)
            parts = self.part_meter.read()
            self.meter.log(previous.number, previous.losses, norms, previous.logged, num_damaged, parts)
        return is_finite

    def _diagnose_previous(self) -> None:
        """Repeat the backward pass of the step before, to find the ranks whose gradients are not finite."""
        previous = self._previous
        assert previous is not None
        inputs = step_inputs(previous.batch, previous.number - 1, self.model, self.config, self.device)
        names = self.engine.nonfinite_gradients(*inputs)
        self.saver.finish()
        loss = previous.losses.total.item()
        report_nonfinite(self.run_dir, previous.number, previous.batch, loss, names, self.config, self.log)

    def _start_flags(self, damaged: list[tuple[str, str]]) -> None:
        """One exchange a step, read in the next one: was a rank asked to stop, does a rank still write a checkpoint,
        did a rank find a damaged video?"""
        new = self.quarantine.unknown(damaged)
        flags = [self._stop_requested(), self.saver.busy, bool(new)]
        self._flags = (distributed.start_all_reduce_max([float(flag) for flag in flags]), new)

    def _read_flags(self) -> None:
        if self._flags is None:
            return
        wait, damaged = self._flags
        self._flags = None
        any_stop, any_writing, any_damaged = wait()
        if any_damaged:
            for line in self.quarantine.add(damaged):
                self.log.warning("step %d: %s", self.step, line)
        if self.saver.pending and not any_writing:
            self.saver.finish()
        self._stopping = self._stopping or any_stop > 0

    def _stop_requested(self) -> bool:
        return self.stop is not None and self.stop.requested

    def _progress(self) -> bool:
        """Called within a validation; returns whether to leave it."""
        self.watchdog.progress()
        return self._stop_requested()

    def _save_and_validate(self) -> None:
        """Save first: a validation that is interrupted is done by the next start, even if the process was killed."""
        if not self._read_previous():
            self._diagnose_previous()
        self._previous = None
        self._read_flags()
        self.saver.begin(self.step)
        if self.step in self.validations:
            self.watchdog.progress()
            self.saver.finish()  # training would go on while it is written, but nothing completes it in a validation
            self._validate()
        self.meter.start(self.step)

    def _validate(self) -> None:
        self.watchdog.progress()
        any_stop = distributed.all_reduce_max([float(self._stop_requested())])[0] > 0
        self._stopping = self._stopping or any_stop
        if not self._stopping:
            self._stopping = not self.validator.validate(self.step, self.engine, self.monitor, self.log)

    def _write_config(self) -> None:
        """Once a step was done: a start that failed before that leaves the directory to other settings."""
        if not self._config_is_written and distributed.is_main():
            write_text(self.run_dir / "config.yaml", to_yaml(self.config))
        self._config_is_written = True

    def _close(self) -> bool:
        is_complete = self._is_at_the_end() and self.validator.has_validated(self.step)
        if is_complete and self.step < self.num_steps:
            line = "patience=%s: training ends at step %d of %d, because so many validations brought no new best"
            self.log.info(line, self.config.patience, self.step, self.num_steps)
        self.monitor.close(complete=is_complete)
        distributed.barrier()
        if is_complete:
            self.log.info("training is complete: %s", self.run_dir)
            self.log.info("%s", self._summary())
            if distributed.is_main():
                write_json(self.run_dir / COMPLETE, {"step": self.step})
        else:
            line = "asked to stop: saved at step %d of %d; run the same command again to continue"
            self.log.info(line, self.step, self.num_steps)
        return is_complete

    def _summary(self) -> str:
        """Time of this start, hours of all starts, and the selected checkpoint."""
        elapsed = datetime.timedelta(seconds=round(time.perf_counter() - self._start_s))
        unit = hours_tag().removeprefix("speed/").replace("_", "-").replace("gpu", "GPU").replace("cpu", "CPU")
        best = read_json(self.run_dir / "checkpoints" / "best.json", dict) or {}
        score = "no best.json"
        if {"selected_on", "R@1", "step"} <= best.keys():
            labels = ", ".join(label_words({**best, "selected_on": None}))
            score = f"best {best['selected_on']} t2v R@1 {best['R@1']:.1f} ({labels}) at step {best['step']}"
        return f"this start took {elapsed}, {self.monitor.used_hours():.3g} {unit} in all starts, {score}"
