"""The one door to TensorBoard, and the log of a run: rank 0 writes, the others make the same calls in silence."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from tmass_dist.distributed import is_main

TAGS = {
    "loss/total": "stochastic + support_weight * support, over the global batch",
    "loss/stochastic": "symmetric InfoNCE of the sampled texts",
    "loss/support": "symmetric InfoNCE of the support texts",
    "loss/kl": "divergence of the mass from N(0, I), mean over dimensions; 0 without stochastic.kl_weight",
    "model/logit_scale": "temperature, exp of the learnt logarithm, at most 100",
    "model/mean_radius": "mean radius R of the own pairs, in units of the text embedding",
    "optim/grad_norm": "global gradient norm before clipping",
    "speed/videos_per_s": "videos of the global batch per second",
    "speed/data_wait": "share of a step spent waiting for the loader, 0 to 1",
    "speed/memory_gb": "peak memory of rank 0, GB",
}
"""What each tag means; shown in TensorBoard's text tab."""


class Monitor:
    """Scalars of one run; a resumed run takes up at its step, so that no point is there twice."""

    def __init__(self, directory: Path, step: int) -> None:
        self._writer: Any = None
        if is_main():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory), purge_step=step or None)
            if step == 0:
                rows = "\n".join(f"- `{tag}`: {meaning}" for tag, meaning in TAGS.items())
                self._writer.add_text("about", rows, 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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


def peak_memory_gb() -> float:
    """Peak memory of this process: the GPU's where there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
