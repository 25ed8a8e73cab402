"""The one door to TensorBoard, and the log of a run: rank 0 writes, the others make the same calls in silence."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.distributed import is_main, world_size

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
    "model/mean_radius": "mean radius R of the own pairs, in units of the text embedding; rank 0's",
    "model/radius": "histogram of the own pairs' mean radii; rank 0's",
    "model/positive_similarity": "mean cosine of the pairs",
    "model/hardest_negative_similarity": "mean cosine of each text's most similar wrong video",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/grad_norm_towers": "of the towers alone; optim/grad_norm_head: of the head",
    "optim/lr_towers": "learning rate of the towers; optim/lr_head: of the head",
    "progress/samples": "pairs seen since the beginning",
    "progress/damaged_videos": "damaged training videos, each replaced by another (quarantine.jsonl)",
    "speed/data_s": "seconds of a step that wait for the loader",
    "speed/encode_s": "seconds of the logged step in the towers, both passes; ZeRO's messages meanwhile included",
    "speed/head_s": "seconds of the logged step in pooling, mass and loss, forward and backward",
    "speed/communication_s": "seconds of the logged step in gathering embeddings and similarities, and in agreeing",
    "speed/optimizer_s": "seconds of the logged step in norms and update; ZeRO's messages meanwhile included",
    "speed/videos_per_s": "videos of the global batch per second",
    "speed/data_wait": "share of a step spent waiting for the loader, 0 to 1",
    "speed/tflops": "useful TFLOP/s of a rank: three forward passes of the towers for each of its pairs",
    "speed/mfu": "that as a share of the GPU's bfloat16 peak; engine.peak_tflops sets it where the GPU is unknown",
    "validation/queries": "the same few texts each time: the right video, and below it the one found first",
    "final": "what the last validation found, beside the settings (tab HPARAMS)",
    "speed/memory_gb": "peak memory of rank 0, GB",
}
"""What each tag means; shown in TensorBoard's text tab."""


class Monitor:
    """Scalars of one run; a resumed run takes up at its step, so that no point is there twice."""

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

    def picture(self, tag: str, picture: Any, step: int) -> None:
        """A PIL picture."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")

    def outcome(self, config: Config, found: dict[str, float]) -> None:
        """The run's settings beside what it reached, for TensorBoard's table of runs."""
        if self._writer is not None and found:
            from dataclasses import asdict

            from tmass_dist.config import flat

            plain = (bool, int, float, str)
            settings = {k: v if isinstance(v, plain) else str(v) for k, v in flat(asdict(config)).items()}
            self._writer.add_hparams(settings, {f"final/{k}": v for k, v in found.items()}, run_name=".")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Meter:
    """What a run says about itself every ``log_every`` steps, and where its time went."""

    def __init__(
        self, monitor: Monitor, log: logging.Logger, config: Config, num_steps: int, flops: Callable[[], float]
    ) -> None:
        """``flops`` counts those of one pair's forward pass through the towers; it is asked once, at the first log."""
        self._count, self._flops, self._peak = flops, 0.0, peak_flops(config)
        self.monitor, self.console, self.config, self.num_steps = monitor, log, config, num_steps
        self.start(0)

    def start(self, step: int) -> None:
        """Count from here: what came before, as a validation, is no training time."""
        self._began, self._since, self._waited = time.perf_counter(), step, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for the loader."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def log(
        self,
        step: int,
        losses: Losses,
        norms: dict[str, float],
        rates: dict[str, float],
        spent: dict[str, float],
        damaged: int,
    ) -> None:
        """Write everything about the steps since the last time.

        ``norms`` and ``rates`` are by parameter group; ``spent`` are seconds of this last step by what it did.
        """
        steps, elapsed_s = max(1, step - self._since), time.perf_counter() - self._began
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
            "progress/damaged_videos": float(damaged),
            "speed/videos_per_s": rate,
            "speed/data_wait": self._waited / elapsed_s,
            "speed/data_s": self._waited / steps,
            "speed/memory_gb": peak_memory_gb(),
        }
        self._flops = self._flops or self._count()
        useful = 3 * self._flops * rate / world_size()  # a backward pass is two forward ones
        values["speed/tflops"] = useful / 1e12
        if self._peak:
            values["speed/mfu"] = useful / self._peak
        values |= {f"speed/{name}_s": seconds for name, seconds in spent.items()}
        values |= {f"optim/lr_{name}": value for name, value in rates.items()}
        values |= {f"optim/grad_norm{'' if name == 'total' else '_' + name}": value for name, value in norms.items()}
        self.monitor.scalars(values, step)
        self.monitor.histogram("model/radius", losses.radius_B, step)
        left = datetime.timedelta(seconds=round((self.num_steps - step) * batch / rate))
        self.console.info("step %d/%d loss %.4f, %.1f videos/s, ETA %s", step, self.num_steps, total, rate, left)
        self.start(step)


def start_log(path: Path) -> logging.Logger:
    """The run's log, in a file and on stderr, from rank 0; the other ranks stay silent below a warning."""
    log = logging.getLogger("tmass_dist")
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if is_main():
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    return log


PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A10": 125, "L4": 121, "V100": 125, "4090": 165}
"""Dense bfloat16 (of the V100: float16) peaks, by the makers' data sheets; the first name that fits."""


def peak_flops(config: Config) -> float | None:
    """What a GPU could do at best, FLOP/s; None where it is not known."""
    import torch

    if config.engine.peak_tflops:
        return config.engine.peak_tflops * 1e12
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)


def forward_flops(model: RetrievalModel, pixels_BFHWC: Tensor, tokens_BL: Tensor) -> float:
    """FLOPs of the towers for the first pair, counted by torch on the real shapes; the head's are left out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    model.train()  # in evaluation torch fuses the attention into one operator, which its counter does not know
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.towers.encode_frames(pixels_BFHWC[:1])
        model.towers.encode_text(tokens_BL[:1])
    model.train(training)
    return float(counter.get_total_flops())


def peak_memory_gb() -> float:
    """Peak memory of this process: the GPU's where there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
