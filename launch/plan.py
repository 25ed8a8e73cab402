"""``--plan``, and the refusal of runs that do not fit into the memory of their GPUs."""

from __future__ import annotations

import argparse
import sys

from launch import forecast
from launch.data_report import read_training_split, steps_per_epoch
from launch.hardware import Gpu, find_gpu
from launch.nodes import Node
from launch.resources import Resources
from tmass_dist.config import Config
from tmass_dist.errors import UserError
from tmass_dist.training.checks import check_batch, usable_ranks


def show_plan(arguments: argparse.Namespace, config: Config, resources: Resources, nodes: list[Node]) -> None:
    """Print the plan, and what makes the run fit if it does not.

    Raises:
        UserError: no GPUs, an unknown GPU, or a run that fits at no setting.
    """
    if not resources.gpus:
        raise UserError("--plan is for GPUs; give --gpus N and --gpu NAME")
    check_batch(config, resources.ranks)  # --min-nodes leaves it to the start of the job; this plan is for all nodes
    plan, cached = _forecast(arguments, config, resources, _gpu(arguments, nodes))
    print(forecast.describe(plan, cached))
    if not plan.fits:
        print(f"it fits with: {' '.join(forecast.settings_that_fit(plan))}")


def refuse_what_cannot_fit(
    arguments: argparse.Namespace, config: Config, resources: Resources, nodes: list[Node]
) -> None:
    """Simulate a step if the GPU is known, and refuse a run whose memory does not fit.

    Raises:
        UserError: it does not fit; settings that fit are named.
    """
    named = arguments.gpu or arguments.gpu_memory_gb
    if named and not resources.gpus:
        raise UserError("--gpu and --gpu-memory-gb are for runs on GPUs, and this one has --gpus 0; leave them out")
    if not resources.gpus or not (named or any(node.gpu_type for node in nodes)):
        return
    try:
        gpu = _gpu(arguments, nodes)
    except UserError:
        if named:
            raise
        return  # a type that only the site knows
    try:
        plan, _ = _forecast(arguments, config, resources, gpu)
    except RuntimeError as error:
        print(f"warning: memory was not checked: {error}", file=sys.stderr)
        return
    if not plan.fits:
        fitting = " ".join(forecast.settings_that_fit(plan))
        raise UserError(
            f"the run needs {plan.total / forecast.GIB:.0f} GB on each GPU and {gpu.name} has {gpu.memory_gb:g} GB: it "
            f"fits with {fitting}; --plan shows the parts, --force submits it as it is"
        )


def _gpu(arguments: argparse.Namespace, nodes: list[Node]) -> Gpu:
    kinds = {node.gpu_type for node in nodes if node.gpu_type}
    name = arguments.gpu or (kinds.pop() if len(kinds) == 1 else None)
    return find_gpu(name, arguments.gpu_memory_gb, arguments.peak_tflops, arguments.mfu)


def _forecast(
    arguments: argparse.Namespace, config: Config, resources: Resources, gpu: Gpu
) -> tuple[forecast.Forecast, int | None]:
    training, _ = read_training_split(config)
    per_epoch = cached = None
    if training is not None:
        per_epoch = steps_per_epoch(config, training, usable_ranks(config, resources.ranks))
        cached = sum(shard.bytes for shard in training.shards)
    return forecast.forecast(config, gpu, resources, per_epoch), cached
