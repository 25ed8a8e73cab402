"""TensorBoard and the log of a run; every rank makes the same calls, and rank 0 writes."""

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

from tmass_dist.distributed import is_main, rank, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from tmass_dist.config import Config
    from tmass_dist.models.tmass import RetrievalModel
    from tmass_dist.training.objective import Losses

TAGS = {
    "loss/total": "stochastic + support_weight * support, over the global batch",
    "loss/stochastic": "symmetric InfoNCE of the sampled texts",
    "loss/support": "symmetric InfoNCE of the support texts",
    "loss/kl": "divergence of the mass from N(0, I), mean over dimensions; 0 without stochastic.kl_weight",
    "model/logit_scale": "temperature, exp of the learnt logarithm, at most 100",
    "model/mean_radius": "mean radius R of rank 0's pairs, in units of the text embedding",
    "model/radius": "histogram of the mean radii of rank 0's pairs",
    "model/positive_similarity": "mean cosine of the pairs",
    "model/hardest_negative_similarity": "mean cosine of each text with its most similar wrong video",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/grad_norm_towers": "of the towers; optim/grad_norm_head: of the head",
    "optim/lr_towers": "learning rate of the towers; optim/lr_head: of the head",
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
    "validation/queries": "the same few texts at each validation: the correct video, and below it the top-ranked one",
    "final": "metrics of the last validation, with the settings (tab HPARAMS)",
    "speed/memory_gb": "peak memory of rank 0, GB",
}
"""Meaning of each tag; shown in TensorBoard's text tab."""


class Monitor:
    """Scalars of one run; a resumed run replaces the points after its step, so that none is there twice."""

    def __init__(self, directory: Path, step: int) -> None:
        self._writer: Any = None
        if is_main():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)
            if step == 0:
                rows = "\n".join(f"- `{tag}`: {meaning}" for tag, meaning in TAGS.items())
                self._writer.add_text("about", rows, 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        numbers = values[values.isfinite()]
        if self._writer is not None and len(numbers):
            self._writer.add_histogram(tag, numbers.float().cpu().numpy(), step)

    def image(self, tag: str, picture: Any, step: int) -> None:
        """A PIL picture."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")

    def final_metrics(self, config: Config, metrics: dict[str, float]) -> None:
        """The run's settings and its last metrics, for TensorBoard's table of runs."""
        if self._writer is not None and metrics:
            from dataclasses import asdict

            from tmass_dist.config import flat

            allowed = (bool, int, float, str)
            settings = {k: v if isinstance(v, allowed) else str(v) for k, v in flat(asdict(config)).items()}
            self._writer.add_hparams(settings, {f"final/{k}": v for k, v in metrics.items()}, run_name=".")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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

    def log(self, step: int, losses: Losses, norms: dict[str, float], logged: LoggedStep, num_damaged: int) -> None:
        """Write the values of a step; ``norms`` are by parameter group. Waits until the GPU has done that step."""
        steps, elapsed_s = logged.num_steps, logged.elapsed_s
        batch = self.config.data.batch_size
        rate = steps * batch / elapsed_s
        total = losses.total.item()
        values = {
            "loss/total": total,
            "loss/stochastic": losses.stochastic.item(),
            "loss/support": losses.support.item(),
            "loss/kl": losses.divergence.item(),
            "model/logit_scale": losses.temperature.item(),
            "model/mean_radius": losses.radius_B.mean().item(),
            "model/positive_similarity": losses.positive.item(),
            "model/hardest_negative_similarity": losses.hardest.item(),
            "progress/samples": float(step * batch),
            "progress/damaged_videos": float(num_damaged),
            "speed/logging_s": "seconds of the logged step in reading the step before and writing the log",
            "speed/videos_per_s": rate,
            "speed/data_wait": logged.waited_s / elapsed_s,
            "speed/data_s": logged.waited_s / steps,
            "speed/memory_gb": peak_memory_gb(),
        }
        self._flops = self._flops or self._count_flops()
        useful = 3 * self._flops * rate / world_size()  # a backward pass costs two forward passes
        values["speed/tflops"] = useful / 1e12
        if self._peak:
            values["speed/mfu"] = useful / self._peak
        values |= {f"speed/{name}_s": seconds for name, seconds in logged.phase_seconds().items()}
        values |= {f"optim/lr_{name}": value for name, value in logged.rates.items()}
        values |= {f"optim/grad_norm{'' if name == 'total' else '_' + name}": value for name, value in norms.items()}
        self.monitor.scalars(values, step)
        self.monitor.histogram("model/radius", losses.radius_B, step)
        remaining = datetime.timedelta(seconds=round((self.num_steps - step) * batch / rate))
        self.console.info("step %d/%d loss %.4f, %.1f videos/s, ETA %s", step, self.num_steps, total, rate, remaining)


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
