"""Curves, log and speed of a run; every rank makes the same calls, and rank 0 writes."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.distributed import is_main, rank, share_failure, world_size
from tmass_dist.errors import UserError
from tmass_dist.loggers import METRICS_FILE, Logger, open_loggers, read_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from tmass_dist.config import Config
    from tmass_dist.models.tmass import RetrievalModel
    from tmass_dist.training.objective import Losses

TAGS = {
    "loss/total": "the loss that is differentiated, over the global batch: the sum of the weighted terms",
    "loss/stochastic": "symmetric InfoNCE of the sampled texts",
    "loss/support": "symmetric InfoNCE of the support texts; absent without stochastic.support_weight",
    "loss/kl": "divergence of the mass from N(0, I), mean over dimensions; absent without stochastic.kl_weight",
    "metrics": "validation and test results: split, selection split of a test result, protocol, M (samples of a text; "
    "absent without samples), post-processing (dsl and qbnorm are transductive), precision if not float32, direction, "
    "metric. R@K in percent; MdR and MnR are ranks; learnt_tau is the temperature of query scoring",
    "model/logit_scale": "temperature, exp of the learnt logarithm, at most 100",
    "model/mean_radius": "mean radius R of rank 0's pairs, in units of the text embedding; absent without a text mass",
    "model/radius": "histogram of the mean radii of rank 0's pairs; absent without a text mass",
    "model/positive_similarity": "mean cosine of the pairs",
    "model/hardest_negative_similarity": "mean cosine of each text with its most similar wrong video",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/grad_norm_towers": "of the towers; optim/grad_norm_head: of the head",
    "optim/lr_towers": "learning rate of the towers; optim/lr_head: of the head",
    "mixture/NAME/loss": "loss/total (without loss/kl) of the pairs of a part of data.train, mean since the last entry",
    "mixture/NAME/share": "share of the pairs that were of this part since the last entry",
    "progress/samples": "pairs trained on since the first step",
    "progress/damaged_videos": "training videos that do not decode; each is replaced by another (quarantine.jsonl)",
    "speed/data_s": "seconds of a step spent waiting for the loader",
    "speed/encode_s": "seconds of the logged step in the towers, forward and backward, with ZeRO's communication",
    "speed/head_s": "seconds of the logged step in pooling, mass and loss, forward and backward",
    "speed/communication_s": "seconds of the logged step in our own collectives: embeddings, similarities, flags",
    "speed/optimizer_s": "seconds of the logged step in gradient norms and update, with ZeRO's communication",
    "speed/logging_s": "seconds of the logged step in reading the step before and writing the log",
    "speed/videos_per_s": "videos of the global batch per second",
    "speed/data_wait": "share of a step spent waiting for the loader, 0 to 1",
    "speed/tflops": "useful TFLOP/s of a rank: three forward passes of the towers for each of its pairs",
    "speed/mfu": "speed/tflops as a share of the GPU's bfloat16 peak; set engine.peak_tflops for an unknown GPU",
    "speed/memory_gb": "peak memory of rank 0, GB",
    "speed/gpu_hours": "hours times GPUs of all starts so far; speed/cpu_hours: hours times threads of all CPU ranks",
    "metrics/.../queries": "the same few texts at each validation: the correct video, and below it the top-ranked one",
}
"""Meaning of each tag; shown in TensorBoard's text tab."""


class Monitor:
    """The loggers of one start of a run. Every rank makes the same calls, and rank 0 writes.

    Args:
        config: of the run.
        step: from which it starts or resumes.
        repeats_validation: whether the validation of this step will be repeated.

    Raises:
        UserError: a logger cannot start; on every rank.
    """

    def __init__(self, config: Config, step: int, *, repeats_validation: bool = False) -> None:
        self._loggers: list[Logger] = []
        self._used_hours, self._start_s = 0.0, time.perf_counter()
        failure = None
        if is_main():
            # Before the lines after the step are removed: their time was used, too.
            path = Path(config.run_dir) / METRICS_FILE
            self._used_hours = max([0.0, *(line.get(hours_tag()) or 0.0 for line in read_metrics(path))])
            try:
                self._loggers = open_loggers(config, step, TAGS, repeats_validation=repeats_validation)
            except UserError as error:
                failure = error
        share_failure(failure)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.scalars(values, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        numbers = values[values.isfinite()]
        for logger in self._loggers if len(numbers) else []:
            logger.histogram(tag, numbers.float().cpu().numpy(), step)

    def image(self, tag: str, picture: Any, step: int) -> None:
        """A PIL picture."""
        for logger in self._loggers:
            logger.image(tag, picture, step)

    def used_hours(self) -> float:
        """Hours of all starts so far, times GPUs, or times the threads of all ranks on CPUs."""
        import torch

        units = world_size() * (1 if torch.cuda.is_available() else torch.get_num_threads())
        return self._used_hours + (time.perf_counter() - self._start_s) / 3600 * units

    def close(self, *, complete: bool) -> None:
        """Write everything out. ``complete``: the run reached its end."""
        for logger in self._loggers:
            logger.close(complete=complete)


def hours_tag() -> str:
    import torch

    return "speed/gpu_hours" if torch.cuda.is_available() else "speed/cpu_hours"


@dataclass(frozen=True)
class LoggedStep:
    """Speed and rates of a step that will be logged when its results are known."""

    num_steps: int
    """Steps since the last one that was logged."""
    elapsed_s: float
    """Seconds that they took."""
    waited_s: float
    """Seconds of these spent waiting for the loader."""
    rates: dict[str, float]
    """Learning rates by parameter group."""
    phase_seconds: Callable[[], dict[str, float]]
    """Seconds of this one step by phase."""


class Meter:
    """Losses, rates, norms, speed and phase times of a run, written every ``log_every`` steps."""

    def __init__(
        self, monitor: Monitor, log: logging.Logger, config: Config, num_steps: int, count_flops: Callable[[], float]
    ) -> None:
        """``count_flops`` gives the FLOPs of one pair's forward pass through the towers; it is called once."""
        self._count_flops, self._flops, self._peak = count_flops, 0.0, peak_flops(config)
        self.monitor, self.console, self.config, self.num_steps = monitor, log, config, num_steps
        self.start(0)

    def start(self, step: int) -> None:
        """Measure from now on; time before it, as of a validation, is not counted."""
        self._start_s, self._start_step, self._waited_s = time.perf_counter(), step, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as time spent waiting for the loader."""
        start_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start_s

    def measure(self, step: int, rates: dict[str, float], phase_seconds: Callable[[], dict[str, float]]) -> LoggedStep:
        """Measure the speed since the last call, when ``step`` was started on the device; :meth:`log` writes it."""
        elapsed_s = time.perf_counter() - self._start_s
        measured = LoggedStep(max(1, step - self._start_step), elapsed_s, self._waited_s, rates, phase_seconds)
        self.start(step)
        return measured

    def log(
        self,
        step: int,
        losses: Losses,
        norms: dict[str, float],
        logged: LoggedStep,
        num_damaged: int,
        parts: dict[str, float],
    ) -> None:
        """Write the values of a step; waits until the GPU has done that step.

        Args:
            step: number of the step, from 1.
            losses: of the step.
            norms: by parameter group.
            logged: speed and rates.
            num_damaged: damaged videos so far.
            parts: values by tag of the parts of a mixture; see :class:`tmass_dist.training.part_meter.PartMeter`.
        """
        steps, elapsed_s = logged.num_steps, logged.elapsed_s
        batch = self.config.data.batch_size
        rate = steps * batch / elapsed_s
        total = losses.total.item()
        values = {
            "loss/total": total,
            "loss/stochastic": losses.stochastic.item(),
            "model/logit_scale": losses.temperature.item(),
            "model/positive_similarity": losses.positive.item(),
            "model/hardest_negative_similarity": losses.hardest.item(),
            "progress/samples": float(step * batch),
            "progress/damaged_videos": float(num_damaged),
            "speed/videos_per_s": rate,
            "speed/data_wait": logged.waited_s / elapsed_s,
            "speed/data_s": logged.waited_s / steps,
            "speed/memory_gb": peak_memory_gb(),
            hours_tag(): self.monitor.used_hours(),
        }
        stochastic = self.config.stochastic
        samples = self.config.model.draws_samples and stochastic.training == "sampled"
        if samples:
            values["model/mean_radius"] = losses.radius_B.mean().item()
            self.monitor.histogram("model/radius", losses.radius_B, step)
        if samples and stochastic.support_weight:
            values["loss/support"] = losses.support.item()
        if samples and stochastic.kl_weight:
            values["loss/kl"] = losses.divergence.item()
        self._flops = self._flops or self._count_flops()
        useful = 3 * self._flops * rate / world_size()  # a backward pass costs two forward passes
        values["speed/tflops"] = useful / 1e12
        if self._peak:
            values["speed/mfu"] = useful / self._peak
        values |= {f"speed/{name}_s": seconds for name, seconds in logged.phase_seconds().items()}
        values |= {f"optim/lr_{name}": value for name, value in logged.rates.items()}
        values |= {f"optim/grad_norm{'' if name == 'total' else '_' + name}": value for name, value in norms.items()}
        values |= parts
        self.monitor.scalars(values, step)
        remaining = datetime.timedelta(seconds=round((self.num_steps - step) * batch / rate))
        words = [f"step {step}/{self.num_steps} loss {total:.4f}", f"{rate:.1f} videos/s"]
        words += [f"lr {' '.join(f'{name} {value:.2e}' for name, value in logged.rates.items())}"]
        words += [f"{values['speed/memory_gb']:.1f} GB"]
        words += [f"MFU {values['speed/mfu']:.1%}"] if self._peak else []
        self.console.info("%s", ", ".join([*words, f"ETA {remaining}"]))


def start_log(path: Path) -> logging.Logger:
    """The run's log: rank 0 writes to a file and to stderr; the others write warnings, each to its own file."""
    log = logging.getLogger("tmass_dist")
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    own = path if is_main() else path.with_name(f"{path.stem}-rank-{rank():05d}{path.suffix}")
    handlers.append(logging.FileHandler(own, encoding="utf-8", delay=True))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    return log


PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A10": 125, "L4": 121, "V100": 125, "4090": 165}
"""Dense bfloat16 (of the V100: float16) peaks, from the vendors' data sheets; the first name that matches."""


def peak_flops(config: Config) -> float | None:
    """The GPU's peak in FLOP/s; None if it is not known."""
    import torch

    if config.engine.peak_tflops:
        return config.engine.peak_tflops * 1e12
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((tflops * 1e12 for model, tflops in PEAK_TFLOPS.items() if model in name), None)


def forward_flops(model: RetrievalModel, pixels_BFHWC: Tensor, tokens_BL: Tensor) -> float:
    """FLOPs of the towers' forward pass for the first pair, counted by torch; the head is not counted.

    On the ``meta`` device nothing is computed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    training, device = model.training, next(model.parameters()).device
    model.train()  # in evaluation mode torch fuses the attention into an operator that its counter does not know
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.towers.encode_frames(pixels_BFHWC[:1].to(device))
        model.towers.encode_text(tokens_BL[:1].to(device))
    model.train(training)
    return float(counter.get_total_flops())


def peak_memory_gb() -> float:
    """Peak memory of this process: on the GPU if there is one, else its resident memory."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
