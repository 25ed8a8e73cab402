"""How memory and traffic grow with the number of ranks and samples: JSON lines, without a cluster.

``python benchmarks/scale.py [NAME ...]`` runs all lines, or those whose names begin so. ``docs/scale.md`` explains
which quantities are measured and which are simulated. Each point runs in a process of its own, on one thread.

The loss is that of one rank of a *fake* process group: its collectives have the right shapes and return at once,
without data, so that one process can play a rank of 1,024.
"""

# Shapes: B pairs of a rank, N of the world, F frames, D embedding width.

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

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
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    before = resident_peak_mb()
    with StepMeter() as meter:
        step(memory_mb)
    grown_mb = resident_peak_mb() - before
    dist.destroy_process_group()
    # Texts, samples and support texts, and the gradients of the three. With the radius of each pair, noise is gathered
    # instead of samples, and it has no gradient.
    num_gathered = 4 + (settings.samples if settings.training_radius == "pair" else 2 * settings.samples)
    rows = num_gathered * num_pairs * width
    return LossCost((meter.peak - 4 * rows) / 1e6, sum(meter.exchanged.values()) - rows, grown_mb)


def resident_peak_mb() -> float:
    """The most resident memory of this process since the peak was reset, MB; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a new interpreter, so that one point's memory does not count for the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def say(name: str, value: float, unit: str, n: int, reference: str, ratio: float) -> None:
    """Print one line; ``ratio`` above 1 is better than the reference."""
    line = {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "n": n}
    print(json.dumps(line | {"reference": reference, "ratio": float(f"{ratio:.3g}")}), flush=True)


def growth(points: dict[int, float], start: int) -> tuple[float, int]:
    """Exponent of the growth from ``start`` to the largest n: 1 is linear, 2 quadratic; and that n."""
    end = max(points)
    return math.log(points[end] / points[start]) / math.log(end / start), end


def loss_lines() -> Iterator[None]:
    """``loss-memory`` and ``loss-traffic``: one rank's objective, forward and backward, N from 512 to 32,768."""
    costs: dict[int, LossCost] = {}
    for n in (512, 2048, 8192, 32768):
        costs[n] = cost = in_fresh_process(loss_step, n)
        say("loss-memory", cost.memory_mb, "MB", n, "at most 300 MB at N = 32,768", 300 / cost.memory_mb)
        rows_mb = 6 * 4 * n * WIDTH / 1e6
        reference = f"gathered rows and their gradients, {rows_mb:.4g} MB, plus 300 MB"
        say("loss-resident", cost.resident_mb, "MB", n, reference, (rows_mb + 300) / cost.resident_mb)
        say("loss-traffic", cost.exchanged / n, "N", n, "at most 8 N", 8 * n / cost.exchanged)
        yield
    memory, end = growth({n: cost.memory_mb for n, cost in costs.items()}, 2048)
    say("loss-memory-growth", memory, "exponent, n from 2,048", end, "linear: 1.1 at most", 1.1 / memory)
    traffic, end = growth({n: cost.exchanged for n, cost in costs.items()}, 2048)
    say("loss-traffic-growth", traffic, "exponent, n from 2,048", end, "linear: 1.1 at most", 1.1 / traffic)
    yield


LINES: dict[str, Callable[[], Iterator[None]]] = {"loss": loss_lines}
"""Groups of lines by the beginning of their names. A group prints as it goes and yields after each point."""


def main() -> None:
    chosen = sys.argv[1:]
    unknown = [name for name in chosen if not any(name.startswith(group) for group in LINES)]
    if unknown:
        raise SystemExit(f"no lines are called {', '.join(unknown)}; there are {', '.join(LINES)}")
    for group, lines in LINES.items():
        if not chosen or any(name.startswith(group) for name in chosen):
            for _ in lines():
                pass


if __name__ == "__main__":
    main()
