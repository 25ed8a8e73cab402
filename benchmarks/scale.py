"""How memory, traffic and time grow with the number of ranks and samples: JSON lines, without a cluster.

``python benchmarks/scale.py [GROUP ...]`` runs all groups of lines, or those named: ``loss``, ``heartbeat``,
``resume``, ``plan``, ``index``, ``order``, ``start``, ``evaluation``. ``docs/scale.md`` explains which quantities are
measured and which are simulated. Each point runs in a process of its own, on one thread; the evaluation uses two such
processes at a time. The lines go to standard output, the progress to standard error.

The loss is that of one rank of a *fake* process group: its collectives have the right shapes and return at once,
without data, so that one process can play a rank of 1,024.
"""

# Shapes: B pairs of a rank, N of the world, F frames, D embedding width.

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks import scale_ranks, scale_samples  # noqa: E402
from benchmarks.points import in_fresh_process, reset_peak, resident_peak_mb, say, say_growth  # noqa: E402
from launch.simulation import StepMeter  # noqa: E402
from tmass_dist.config import ModelConfig, StochasticConfig  # noqa: E402
from tmass_dist.models.head import build_head  # noqa: E402
from tmass_dist.training.objective import global_losses  # noqa: E402

BATCH, NUM_FRAMES, WIDTH, HEAD_MEMORY_MB = 32, 12, 512, 128


@dataclass(frozen=True)
class LossCost:
    """What forward and backward pass of the objective take on one rank."""

    memory_mb: float
    """Peak of live tensors beside the gathered rows and their gradients, MB (10^6 bytes)."""
    exchanged: int
    """Numbers exchanged beyond the gathered rows and their gradients."""
    resident_mb: float
    """Growth of the process's peak resident memory, everything included, MB."""


def loss_step(
    num_pairs: int,
    memory_mb: float | None = HEAD_MEMORY_MB,
    stochastic: dict[str, Any] | None = None,
    width: int = WIDTH,
) -> LossCost:
    """One training step of the head, as one rank of ``num_pairs / BATCH`` of a fake process group.

    Args:
        num_pairs: N.
        memory_mb: ``engine.head_memory_mb``.
        stochastic: settings of :class:`StochasticConfig` other than the defaults.
        width: D.
    """
    settings = StochasticConfig(**(stochastic or {}))
    import torch.testing._internal.distributed.fake_pg as fake

    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=NUM_FRAMES), width).train()
    shapes = ((BATCH, width), (BATCH, NUM_FRAMES, width), (BATCH, settings.samples, width))
    text, frames, noise = (torch.randn(s) for s in shapes)
    text.requires_grad_()
    frames.requires_grad_()
    scale = torch.full((1,), 4.6, requires_grad=True)

    def step(memory_mb: float | None) -> None:
        global_losses(
            head,
            text,
            frames,
            noise,
            scale,
            settings,
            dropout_keys=list(range(BATCH)),
            memory_mb=memory_mb,
        ).total.backward()

    step(1.0)  # alone: libraries load what they need
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=num_pairs // BATCH)
    before = reset_peak()
    with StepMeter() as meter:
        step(memory_mb)
    grown_mb = resident_peak_mb() - before
    dist.destroy_process_group()
    # Texts, samples and support texts, and the gradients of the three. With the radius of each pair, noise is gathered
    # instead of samples, and it has no gradient.
    num_gathered = 4 + (settings.samples if settings.training_radius == "pair" else 2 * settings.samples)
    rows = num_gathered * num_pairs * width
    return LossCost((meter.peak - 4 * rows) / 1e6, sum(meter.exchanged.values()) - rows, grown_mb)


def loss_lines() -> None:
    """``loss-memory`` and ``loss-traffic``: one rank's objective, forward and backward, N from 512 to 32,768."""
    costs: dict[int, LossCost] = {}
    for n in (512, 2048, 8192, 32768):
        costs[n] = cost = in_fresh_process(loss_step, n)
        say("loss-memory", cost.memory_mb, "MB", n, "at most 300 MB at N = 32,768", 300 / cost.memory_mb)
        rows_mb = 6 * 4 * n * WIDTH / 1e6
        reference = f"gathered rows and their gradients, {rows_mb:.4g} MB, plus 300 MB"
        say("loss-resident", cost.resident_mb, "MB", n, reference, (rows_mb + 300) / cost.resident_mb)
        say("loss-traffic", cost.exchanged / n, "N", n, "at most 8 N", 8 * n / cost.exchanged)
    say_growth("loss-memory", {n: cost.memory_mb for n, cost in costs.items()}, 2048)
    say_growth("loss-traffic", {n: cost.exchanged for n, cost in costs.items()}, 2048)


GROUPS: tuple[Callable[[], None], ...] = (
    loss_lines,
    scale_ranks.heartbeat_lines,
    scale_ranks.resume_lines,
    scale_ranks.plan_lines,
    scale_samples.index_lines,
    scale_samples.order_lines,
    scale_samples.start_lines,
    scale_samples.evaluation_lines,
)
"""Groups of lines; each prints a line as soon as it has a value."""


def main() -> None:
    chosen = sys.argv[1:]
    groups = {group.__name__.removesuffix("_lines"): group for group in GROUPS}
    unknown = [name for name in chosen if name not in groups]
    if unknown:
        raise SystemExit(f"no group is called {', '.join(unknown)}; there are {', '.join(groups)}")
    began = time.perf_counter()
    names = [name for name in groups if not chosen or name in chosen]
    for number, name in enumerate(names):
        print(f"{name} ({number + 1} of {len(names)}), {time.perf_counter() - began:.0f} s so far", file=sys.stderr)
        groups[name]()
    print(f"complete after {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
