"""Check and measure this node's GPUs: ``make gpu-check``, some ten minutes. Writes a markdown section.

First what must hold: every system's step on the GPU equals the CPU's and the host waits nowhere in it, bfloat16 stays
near float32, several NCCL ranks equal one, a killed and a stopped rank end the others with a line that names them. Then
figures beside their goals. A part that fails is reported and the next one runs; the exit code is then 1. Without a GPU
nothing is measured, and the exit code is 0.

``--device cpu --small`` runs the same code on small models on the CPU, where its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GOALS = {
    "mfu": "40 % of the bfloat16 peak in the vendor's data sheet (989 TFLOP/s for H100 and H200)",
    "videos": "on an H200, whose measured peak is 790 TFLOP/s: 940 videos/s for ViT-B/32, 246 for ViT-B/16",
    "communication": "none set",
    "data wait": "under 3 %; it depends on storage, and here the shards were just written",
    "score": "0.2 s for 1,000 x 1,000, 2 s for 10,000 x 10,000",
    "scaling": "95 % to 8 GPUs",
}
LIMIT_S = 20.0
"""``engine.timeout_s`` of the fault tests: a lost rank must end the others well before."""


class Check:
    """The parts and what they found."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = device, small
        self.lines: list[str] = []
        self.failed: list[str] = []

    @property
    def num_ranks(self) -> int:
        import torch

        return torch.cuda.device_count() if self.device == "cuda" else 2

    def part(self, title: str, function: Callable[[Check], list[str]]) -> None:
        """Run one part; its rows, or why it failed, become lines of the section."""
        began = time.perf_counter()
        try:
            rows = function(self)
        except Exception as error:
            self.failed.append(title)
            rows = [f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:500]}"]
        seconds = time.perf_counter() - began
        self.lines += [f"### {title}", "", *rows, ""]
        print("\n".join([f"{title} ({seconds:.0f} s)", *(f"  {row}" for row in rows)]), flush=True)


def placement(check: Check) -> list[str]:
    """Every system's step on the device against the CPU; on a GPU a host wait in it raises."""
    import torch

    from launch.paper.systems import SYSTEMS
    from tests.small_model import batch_of, config_of, small_objective
    from tmass_dist.data.loader import Batch
    from tmass_dist.training.step_inputs import step_inputs

    def losses(overrides: tuple[str, ...], device: torch.device) -> Any:
        config = config_of(*overrides, "engine.bf16=false")
        model = small_objective(config).to(device)
        pixels, tokens, *_ = batch_of(0)
        if device.type == "cuda":
            pixels, tokens = pixels.pin_memory(), tokens.pin_memory()
        ids, zeros = [f"v{n}" for n in range(len(tokens))], [0] * len(tokens)
        batch = Batch(pixels, tokens, ["a"] * len(tokens), ids, zeros, zeros, [])
        with _no_host_waits(device):
            found = model("whole", *step_inputs(batch, 0, model, config, device))
            found.total.backward()
        gradients = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        return found.total.double().cpu(), torch.stack(gradients).norm().cpu()

    worst, systems = 0.0, {system.overrides for system in SYSTEMS.values()}
    for overrides in sorted(systems):
        expected, found = losses(overrides, torch.device("cpu")), losses(overrides, torch.device(check.device))
        worst = max(worst, *(abs(one / other - 1).item() for one, other in zip(found, expected)))
    if worst > 1e-3:
        raise RuntimeError(f"loss or gradient norm differ from the CPU's by {worst:.1e}")
    waits = "no host wait in a step" if check.device == "cuda" else "host waits are not seen on the CPU"
    return [f"{len(systems)} systems: loss and gradient norm within {worst:.1e} of the CPU's; {waits}"]


class _no_host_waits:  # noqa: N801
    """On a GPU an operation that makes the host wait raises within the block."""

    def __init__(self, device: Any) -> None:
        self.on = device.type == "cuda"

    def __enter__(self) -> None:
        import torch

        if self.on:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        import torch

        if self.on:
            torch.cuda.set_sync_debug_mode("default")


def _losses(ranks: int, *overrides: str, steps: int = 5) -> list[list[float]]:
    from benchmarks.gpu_ranks import losses, results, start

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        return results(start(ranks, out, losses, list(overrides), steps), out, 300)


def _greatest(found: list[float], expected: list[float]) -> float:
    return max(abs(one / other - 1) for one, other in zip(found, expected))


def precision(check: Check) -> list[str]:
    """bfloat16 towers against float32."""
    [full], [low] = _losses(1, "engine.bf16=false"), _losses(1, "engine.bf16=true")
    error = _greatest(low, full)
    if error > 5e-2:
        raise RuntimeError(f"losses of bfloat16 differ from float32's by {error:.1e}: {low} and {full}")
    return [f"losses of 5 steps with bfloat16 towers are within {error:.1e} of float32's (bound: 5e-2)"]


def ranks(check: Check) -> list[str]:
    """Several ranks against one, at every ZeRO stage."""
    world = max(n for n in (1, 2, 3, 4, 6) if n <= check.num_ranks)
    if world == 1:
        return ["not measured: one GPU"]
    [one] = _losses(1, "engine.bf16=false")
    rows = []
    for stage in (0, 1, 3) if check.small else (0, 1, 2, 3):
        error = max(
            _greatest(found, one) for found in _losses(world, f"engine.zero_stage={stage}", "engine.bf16=false")
        )
        if error > 1e-4:
            raise RuntimeError(f"{world} ranks at ZeRO-{stage} differ from one by {error:.1e}")
        rows.append(f"- {world} ranks at ZeRO-{stage}: losses of 5 steps within {error:.1e} of one rank's")
    return rows


def faults(check: Check) -> list[str]:
    """A killed and a stopped rank."""
    from benchmarks.gpu_ranks import lose_a_rank

    if check.num_ranks < 2:
        return ["not measured: one GPU"]
    rows = []
    for name, fault in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        with tempfile.TemporaryDirectory() as folder:
            seconds, line = lose_a_rank(min(check.num_ranks, 3), Path(folder), fault, LIMIT_S)
        if line.startswith("NOT NAMED"):
            raise RuntimeError(f"no line of rank 0 names the {name} rank: {line}")
        rows.append(f"- one rank {name}: all others ended after {seconds:.1f} s (limit {LIMIT_S:.0f} s): `{line}`")
    return rows


def _measured(check: Check, world: int, architecture: str, batch: int) -> dict[str, float]:
    """Figures of a whole step at ``batch`` pairs a rank, slowest rank."""
    from benchmarks.gpu_ranks import results, start, step_seconds

    frames = 4 if check.small else 12
    low = ["engine.bf16=true"]
    with tempfile.TemporaryDirectory() as folder:
        found = results(start(world, Path(folder), step_seconds, architecture, batch, frames, low), Path(folder), 400)
    return {name: max(one[name] for one in found) for name in found[0]}


def _architectures(check: Check) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if check.small:
        return ("towers/demo.json",), (4, 8)
    return ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu"), (32, 64, 128, 256, 512)


def speed(check: Check) -> list[str]:
    """Figures of one rank by model and batch, up to the largest batch that fits."""
    from tmass_dist.config import Config
    from tmass_dist.training.monitor import peak_flops

    peak, (architectures, batches) = peak_flops(Config()), _architectures(check)
    rows = [
        "| towers | pairs | s a step | videos/s | TFLOP/s | MFU | peak memory, GB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for architecture in architectures:
        for batch in batches:
            try:
                found = _measured(check, 1, architecture, batch)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                rows.append(f"| {architecture} | {batch} | does not fit | | | | |")
                break
            rate = batch / found["seconds"]
            useful = 3 * found["flops"] * rate
            mfu = f"{100 * useful / peak:.0f} %" if peak else "peak not known"
            numbers = f"{found['seconds']:.3f} | {rate:.0f} | {useful / 1e12:.2f} | {mfu} | {found['memory_gb']:.1f}"
            rows.append(f"| {architecture} | {batch} | {numbers} |")
    return [*rows, "", f"Goals: {GOALS['mfu']}; {GOALS['videos']}."]


def data_wait(check: Check) -> list[str]:
    """The share of a step that waits for the loader, in a run of the training command on shards in local memory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (architecture, *_), batch = _architectures(check)[0], 4 if check.small else 64
    side, frames, workers = ("32", 12, 1) if check.small else ("224", 12, max(1, min(8, (os.cpu_count() or 2) - 1)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        counts = ["--train", str(3 * batch), "--val", "8", "--test", "8"]
        _command("shards/demo_data.py", "--out", f"{out}/videos", *counts)
        for split in ("train", "val"):
            source = ["--annotations", f"{out}/videos/manifest.jsonl", "--videos", f"{out}/videos", "--split", split]
            packed = ["--out", f"{out}/{split}", "--image-size", side]
            _command("shards/make_shards.py", "--source", "manifest", *source, *packed)
        overrides = [
            *(f"run_dir={out}/run", f"data.train={out}/train", f"data.val={out}/val", f"data.batch_size={batch}"),
            *(f"model.architecture={architecture}", "model.pretrained=null", f"model.num_frames={frames}"),
            *(f"data.num_workers={workers}", "max_steps=15", "eval_every=15", "log_every=5"),
        ]
        _command("-m", "tmass_dist.train", "--config", "demo.yaml" if check.small else "msrvtt.yaml", *overrides)
        events = EventAccumulator(f"{out}/run").Reload().Scalars("speed/data_wait")
    share = max(event.value for event in events[1:])  # the first steps start the workers
    row = f"{architecture}, {batch} pairs, {workers} workers: {100 * share:.1f} % of a step waits for data"
    return [row, "", f"Goal: {GOALS['data wait']}."]


def _command(*arguments: str) -> None:
    """Run a command of the project on one rank; raises a RuntimeError with the end of what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])} failed: {(done.stdout + done.stderr)[-400:]}")


def scaling(check: Check) -> list[str]:
    """The same batch a rank on more and more ranks."""
    (architecture, *_), batch = _architectures(check)[0], 4 if check.small else 64
    rows, alone_s = ["| ranks | s a step | weak scaling | exposed communication |", "|--:|--:|--:|--:|"], 0.0
    for world in (n for n in (1, 2, 4, 8) if n <= check.num_ranks):
        found = _measured(check, world, architecture, batch)
        alone_s = alone_s or found["seconds"]
        share = f"{100 * alone_s / found['seconds']:.0f} % | {100 * found['communication']:.1f} %"
        rows.append(f"| {world} | {found['seconds']:.3f} | {share} |")
    return [*rows, "", f"{architecture}, {batch} pairs a rank. Goal: {GOALS['scaling']}."]


def scores(check: Check) -> list[str]:
    """Exact scoring, M = 20."""
    from benchmarks.scoring import ours

    ours(64, 64, check.device)
    rows = []
    for side in (64, 128) if check.small else (1000, 10000):
        began = time.perf_counter()
        ours(side, side, check.device)
        rows.append(f"- {side} texts x {side} videos: {time.perf_counter() - began:.2f} s")
    return [*rows, "", f"Goal: {GOALS['score']}."]


def heading(device: str) -> list[str]:
    """Date, machine and versions."""
    import deepspeed
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}); its figures mean nothing"
    count = torch.cuda.device_count() if device == "cuda" else 0
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else "none"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}, DeepSpeed {deepspeed.__version__}"
    return [f"## GPU check of {datetime.date.today():%Y-%m-%d}: {max(count, 1)} x {name}", "", versions, ""]


PARTS = {
    "Placement": placement,
    "Precision": precision,
    "Several ranks": ranks,
    "A lost rank": faults,
    "A step": speed,
    "Data wait": data_wait,
    "Weak scaling": scaling,
    "Scoring": scores,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small models and batches")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="some parts")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check.md"), help="the markdown section")
    given = parser.parse_args()
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is at hand: nothing was measured")
        return
    from tmass_dist.training.engine import _deepspeed

    _deepspeed()
    check = Check(given.device, given.small)
    check.lines += heading(given.device)
    for title in given.only:
        check.part(title, PARTS[title])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(check.lines), encoding="utf-8")
    print(f"written: {given.out}" + (f"; FAILED: {', '.join(check.failed)}" if check.failed else ""))
    if check.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
