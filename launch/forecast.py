"""``--plan``: memory, exchanges, time and sizes of a run, before it is submitted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.hardware import Gpu
from launch.resources import Resources
from tmass_dist.config import Config, to_yaml
from tmass_dist.errors import UserError
from tmass_dist.training.checks import usable_ranks

GIB = 2**30
USABLE = 0.92
"""Part of a GPU's memory that tensors can use; the rest is for the CUDA context, NCCL and fragmentation."""
BUCKET = 500_000_000
"""Most numbers of a buffer for the reduction of gradients; ``REDUCE_BUCKET`` of :mod:`tmass_dist.training.engine`."""
PERSISTENT_NUMBERS = 100_000
"""Numbers of the largest parameter that ZeRO 3 does not shard, DeepSpeed's ``stage3_param_persistence_threshold``."""
LIVE_WEIGHTS = 1_000_000_000
"""Gathered weights that ZeRO 3 keeps at most, DeepSpeed's default ``stage3_max_live_parameters``."""


@dataclass(frozen=True)
class StepCost:
    """Cost of one step on one rank; bytes, unless a name says otherwise. ZeRO's shards are not part of it."""

    num_parameters: int
    num_trainable: int
    num_in_towers: int
    """Trained numbers of the towers, which have a gradient in the backward pass of each micro-batch."""
    num_groups: int
    """Parameter groups; from ZeRO 1 on the ranks sum the squared gradient norm of each."""
    persistent: int
    """Weights that ZeRO 3 keeps whole on each rank, because they are small."""
    image_size: int
    weights: int
    peak: int
    """Largest sum of live tensors, gradients included and optimiser excluded."""
    peak_without_gradients: int
    """The same without the gradients of the weights, which ZeRO 2 and 3 shard."""
    head_peak: int
    """Of the head and the loss alone, forward and backward, beside the embeddings."""
    flops: int
    """Forward and backward."""
    exchanged: dict[str, int]
    """Numbers by kind of collective, of the loss: those of the gathered, summed or scattered tensor."""


def simulate(config: Config, num_ranks: int, *, num_tokens: int | None = None) -> StepCost:
    """Run :mod:`launch.simulation` in a process of its own.

    Raises:
        RuntimeError: it failed; the last line of its error.
    """
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "config.yaml"
        page.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "launch.simulation", str(page), str(num_ranks)]
        command += [str(num_tokens)] if num_tokens else []
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the simulation of a step failed: {lines[-1]}")
    return StepCost(**json.loads(done.stdout.strip().splitlines()[-1]))


def zero_state(cost: StepCost, stage: int, num_ranks: int, *, ema: bool, overlap: bool = False) -> dict[str, int]:
    """Bytes that a rank holds through a step, by part, at a ZeRO stage.

    Args:
        cost: of the step.
        stage: of ZeRO, 0 to 3.
        num_ranks: that share the state.
        ema: with a running mean of the weights.
        overlap: gradients are reduced during the backward pass, which takes a second buffer at stages 1 and 2.

    Source: Rajbhandari et al., "ZeRO", SC 2020, for float32 weights. DeepSpeed keeps a second copy of a rank's share of
    the weights from stage 1 on, which its optimiser updates. At stage 3 it keeps up to 10^9 gathered weights from the
    forward to the backward pass. Measured against DeepSpeed: docs/scale.md.
    """
    numbers, share = cost.num_trainable, math.ceil(cost.num_trainable / num_ranks)
    moments = 3 if ema else 2
    gradients = 4 * numbers if stage < 2 else 4 * share
    weights = cost.weights + (4 * share - 4 * max(0, numbers - LIVE_WEIGHTS) if stage == 3 else 0)
    optimiser = 4 * moments * numbers if stage == 0 else 4 * (moments + 1) * share
    num_buffers = 0 if stage == 0 else 2 if overlap and stage < 3 else 1
    buffers = 4 * min(BUCKET, numbers) * num_buffers
    return {"weights": weights, "gradients": gradients, "optimiser": optimiser, "buffers": buffers}


def planned_peak(cost: StepCost, stage: int, num_ranks: int, *, ema: bool, overlap: bool = False) -> int:
    """Largest sum of live tensors in a step: during the backward pass, or while the optimiser updates."""
    state = zero_state(cost, stage, num_ranks, ema=ema, overlap=overlap)
    sharded = stage > 1
    step = (cost.peak_without_gradients if sharded else cost.peak) - cost.weights
    backward = state["weights"] + state["optimiser"] + state["buffers"] + step
    backward += state["gradients"] if sharded else 0
    return max(backward, _update_peak(state, stage))


def held_between_steps(cost: StepCost, stage: int, num_ranks: int, *, ema: bool) -> int:
    """Bytes that a rank holds between two steps; at stage 3 gradients and buffers stay, gathered weights do not."""
    state = zero_state(cost, stage, num_ranks, ema=ema)
    if stage < 3:
        return state["weights"] + state["optimiser"]
    share = 4 * math.ceil(cost.num_trainable / num_ranks)
    return cost.persistent + share + state["optimiser"] + state["gradients"] + state["buffers"]


def _update_peak(state: dict[str, int], stage: int) -> int:
    """While the optimiser updates there is a copy of the gradients; stages 1 and 2 have released their buffers."""
    return sum(state.values()) + state["gradients"] - (state["buffers"] if stage < 3 else 0)


@dataclass(frozen=True)
class Forecast:
    """A run's cost on some GPUs."""

    config: Config
    cost: StepCost
    gpu: Gpu
    num_ranks: int
    gpus_per_node: int
    steps_per_epoch: int | None
    """None without the data."""

    @property
    def name(self) -> str:
        """The run and the number of its GPUs, for messages."""
        return f"the run {Path(self.config.run_dir).name} on {self.num_ranks} GPU{'s' * (self.num_ranks > 1)}"

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on each GPU by part, at the moment when their sum is largest."""
        stage = self.config.engine.zero_stage
        state = zero_state(self.cost, stage, self.num_ranks, ema=self.config.optim.ema > 0, overlap=True)
        parts = {name: state[name] for name in ("weights", "optimiser", "gradients")}
        parts["buffers of the reduction"] = state["buffers"]
        if self.total == _update_peak(state, stage):
            parts["buffers of the reduction"] *= stage == 3
            return parts | {"copies of the gradients in the update": state["gradients"]}
        rest = self.total - sum(state.values())
        if stage < 2:  # all gradients exist at the end of the backward pass only; the activations are gone by then
            del parts["gradients"]
            rest += state["gradients"]
        head = min(self.cost.head_peak, rest)
        return parts | {"head and loss": head, "activations of the towers, and their gradients so far": rest - head}

    @property
    def total(self) -> int:
        """Bytes on each GPU at the peak."""
        stage, ema = self.config.engine.zero_stage, self.config.optim.ema > 0
        return planned_peak(self.cost, stage, self.num_ranks, ema=ema, overlap=True)

    @property
    def fits(self) -> bool:
        return self.total <= USABLE * self.gpu.memory_gb * GIB

    @property
    def host_memory(self) -> int:
        """Bytes of a rank's batches in shared memory: two for each decoding process, and two in use."""
        data = self.config.data
        pixels = self.config.model.num_frames * 3 * self.cost.image_size**2
        return (2 * data.num_workers + 2) * data.batch_size // self.num_ranks * pixels

    @property
    def exchanges(self) -> dict[str, int]:
        """Numbers of a step by what is exchanged; each is the size of the gathered or reduced tensor."""
        if self.num_ranks == 1:
            return {}
        loss = {f"loss, {kind}": numbers for kind, numbers in self.cost.exchanged.items()}
        return loss | gradient_exchanges(self.cost, self.config, self.num_ranks)

    @property
    def tflops(self) -> float:
        """Peak of the GPU in the precision of the towers."""
        return self.gpu.peak_tflops if self.config.engine.bf16 else self.gpu.float32_tflops or self.gpu.peak_tflops

    @property
    def compute_s(self) -> float:
        """Seconds of the towers and the head at the assumed part of the peak; recomputation included."""
        return self.cost.flops / (self.tflops * 1e12 * self.gpu.mfu)

    @property
    def exchange_s(self) -> float:
        """Seconds of a step's exchanges in a ring, none of them hidden behind the compute."""
        several = self.num_ranks > self.gpus_per_node
        bandwidth = (self.gpu.network_gb_s if several else self.gpu.node_gb_s) * 1e9
        passes = sum(numbers * (2 if "allreduce" in name else 1) for name, numbers in self.exchanges.items())
        return 4 * passes * (self.num_ranks - 1) / self.num_ranks / bandwidth

    @property
    def num_steps(self) -> int | None:
        """Steps of the run; None if neither the data nor ``max_steps`` says."""
        if self.steps_per_epoch is None:
            return self.config.max_steps
        steps = self.config.epochs * self.steps_per_epoch
        return min(steps, self.config.max_steps or steps)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint: weights, two moments and the running mean, in float32."""
        moments = 3 if self.config.optim.ema else 2
        return self.cost.weights + 4 * moments * self.cost.num_trainable


def gradient_exchanges(cost: StepCost, config: Config, num_ranks: int) -> dict[str, int]:
    """Numbers of a step that ZeRO exchanges; DeepSpeed pads them to whole shares. Measured: docs/scale.md.

    With micro-batches from ZeRO 2 on, no rank can keep all gradients, so those of each micro-batch are reduced. At
    ZeRO 3 each micro-batch gathers the weights without a graph, forward and backward; those that are kept whole are
    gathered about three times a step. This is the one estimate: what DeepSpeed fetches ahead in vain is not counted.
    """
    stage, numbers = config.engine.zero_stage, cost.num_trainable
    if stage == 0:
        return {"gradients, allreduce": numbers}
    local = config.data.batch_size // num_ranks
    num_micro = -(-local // (config.engine.micro_batch or local))
    gradients = numbers + (num_micro - 1) * cost.num_in_towers if stage > 1 else numbers
    weights = numbers
    if stage == 3 and num_micro > 1:
        kept = min(numbers, cost.persistent // 4)
        weights = 3 * kept + 3 * num_micro * (numbers - kept)
    elif stage == 3 and numbers > LIVE_WEIGHTS:
        weights = 2 * numbers
    kind = "reduce_scatter" if stage == 3 else "allreduce"
    norms = {"gradient norms, allreduce": cost.num_groups}
    return {f"gradients, {kind}": gradients, "weights, allgather": weights} | norms


def forecast(config: Config, gpu: Gpu, resources: Resources, steps_per_epoch: int | None) -> Forecast:
    """Simulate a step with bfloat16 as the GPU has it, on as many of the ranks as the batch allows."""
    ranks = usable_ranks(config, resources.ranks)
    bf16 = config.engine.bf16 in (True, "auto") and gpu.has_bf16
    engine = dataclasses.replace(config.engine, bf16=bf16)
    exact = dataclasses.replace(config, engine=engine)
    return Forecast(exact, simulate(exact, ranks), gpu, ranks, resources.gpus, steps_per_epoch)


def settings_that_fit(plan: Forecast) -> list[str]:
    """Overrides with which a run fits that does not fit as it is: the cheapest of our means first.

    A setting that does not lower the peak is left out. Where the peak moves from the update of the optimiser to the
    backward pass, a setting that was of no use before is tried again.

    Raises:
        UserError: it cannot fit at any setting; the message says how much the least needs.
    """
    own = dataclasses.replace(plan.config.engine, zero_stage=0)
    costs = {own: plan.cost}  # of every stage: ZeRO's shards are no part of it
    best, chosen, lowered = plan, {}, True
    while lowered:
        lowered = False
        for change in _means(best):
            engine = dataclasses.replace(best.config.engine, **change)
            config = dataclasses.replace(best.config, engine=engine)
            key = dataclasses.replace(engine, zero_stage=0)
            if key not in costs:
                costs[key] = simulate(config, plan.num_ranks)
            tried = dataclasses.replace(best, config=config, cost=costs[key])
            if tried.total >= best.total:
                continue
            best, chosen, lowered = tried, chosen | change, True
            if best.fits:
                return _overrides(chosen)
    needed = math.ceil(10 * best.total / GIB / USABLE) / 10
    raise UserError(
        f"{plan.name} cannot fit into {plan.gpu.memory_gb:g} GB: the least is {needed:g} GB, with "
        f"{' '.join(_overrides(chosen)) or 'the settings that it has'}; use more ranks, a smaller model or a smaller "
        "batch"
    )


def _means(plan: Forecast) -> list[dict[str, Any]]:
    """Changes of ``engine`` that may lower the memory, the cheapest first."""
    engine, local = plan.config.engine, plan.config.data.batch_size // plan.num_ranks
    alone = plan.num_ranks == 1
    stages = [0] if alone and engine.zero_stage else [] if alone else range(engine.zero_stage + 1, 4)
    cheap, dear = ([{"zero_stage": stage} for stage in stages if (stage == 3) == is_dear] for is_dear in (False, True))
    head = min(engine.head_memory_mb or 512, 512)
    tiles = [{"head_memory_mb": head}] if plan.cost.head_peak > GIB and head != engine.head_memory_mb else []
    again = [] if engine.checkpoint_activations else [{"checkpoint_activations": True}]
    micro = [{"micro_batch": n} for n in (max(2, local // 4), 1) if n < min(engine.micro_batch or local, local)]
    return [*cheap, *tiles, *again, *micro, *dear]


def _overrides(engine: dict[str, Any]) -> list[str]:
    return [f"engine.{key}={str(value).lower()}" for key, value in engine.items()]


def describe(plan: Forecast, cached: int | None) -> str:
    """The plan as text.

    Args:
        plan: of the run.
        cached: bytes of the training shards; None without the data.
    """
    gpu, engine = plan.gpu, plan.config.engine
    tower = "bfloat16" if engine.bf16 else "float32"
    usable = USABLE * gpu.memory_gb
    lines = [
        f"plan: {plan.num_ranks} x {gpu.name} ({gpu.memory_gb:g} GB, {gpu.peak_tflops:g} TFLOP/s), "
        f"ZeRO {engine.zero_stage}, towers in {tower}, micro_batch {engine.micro_batch or 'all'}, "
        f"activation checkpointing {'on' if engine.checkpoint_activations else 'off'}",
        f"memory of a GPU, {usable:.1f} GB usable ({USABLE:.0%}):",
        *(f"  {size / GIB:9.2f} GB  {name}" for name, size in plan.memory.items() if size),
        f"  {plan.total / GIB:9.2f} GB  in all: {'fits' if plan.fits else 'does not fit'}",
        f"memory of a rank on the host: {plan.host_memory / GIB:.2f} GB of batches",
        f"a step: {plan.cost.flops / 1e12:.2f} TFLOP a rank; exchanged numbers:",
        *(f"  {numbers / 1e6:9.2f} M   {name}" for name, numbers in plan.exchanges.items()),
    ]
    step_s = plan.compute_s + plan.exchange_s
    link = gpu.network_gb_s if plan.num_ranks > plan.gpus_per_node else gpu.node_gb_s
    lines.append(
        f"step time: {step_s:.3f} s = {plan.compute_s:.3f} s compute ({gpu.mfu:.0%} of {plan.tflops:g} TFLOP/s) "
        f"+ {plan.exchange_s:.3f} s exchange ({link:g} GB/s a GPU, not overlapped); without data loading and validation"
    )
    steps = plan.num_steps
    if steps is None:
        lines.append("run time: unknown without the data or max_steps")
    else:
        hours = steps * step_s / 3600
        lines.append(f"run time: {steps} steps, {hours:.2f} hours, {hours * plan.num_ranks:.1f} GPU-hours")
    kept = plan.checkpoint * (engine.keep + 1) + plan.cost.weights
    lines.append(
        f"on disk: {plan.checkpoint / 1e9:.2f} GB a checkpoint, at most {kept / 1e9:.2f} GB in the run directory"
    )
    if cached is not None:
        lines.append(
            f"training shards: {cached / 1e9:.2f} GB"
            + (f", cached in {plan.config.data.cache}" if plan.config.data.cache else "")
        )
    return "\n".join(lines)
