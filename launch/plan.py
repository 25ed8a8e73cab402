"""``--plan``, and the refusal of runs that do not fit into the memory of their GPUs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import NoReturn

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
    gpu = _gpu(arguments, nodes)
    training, _ = read_training_split(config)
    per_epoch = cached = None
    if training is not None:
        per_epoch = steps_per_epoch(config, training, usable_ranks(config, resources.ranks))
        cached = sum(shard.bytes for shard in training.shards)
    plan = forecast.forecast(config, gpu, resources, per_epoch)
    print(forecast.describe(plan, cached))
    fewest = _on_fewest_nodes(config, gpu, resources)
    if fewest:
        print(
            f"with --min-nodes {resources.min_nodes}: {fewest.num_ranks} ranks, {fewest.total / forecast.GIB:.2f} GB "
            f"on each GPU: {'fits' if fewest.fits else 'does not fit'}"
        )
    for one in filter(None, (fewest, plan)):  # what fits on the fewest nodes fits on all
        if not one.fits:
            print(f"it fits with: {' '.join(forecast.settings_that_fit(one))}")
            return


def refuse_what_cannot_fit(
    arguments: argparse.Namespace, runs: list[Config], resources: Resources, nodes: list[Node]
) -> None:
    """Simulate a step of each run if the GPU is known, and refuse what does not fit into its memory.

    Raises:
        UserError: a run does not fit; settings that fit are named.
    """
    named = [name for name in ("gpu", "gpu_memory_gb", "peak_tflops") if getattr(arguments, name) is not None]
    if named and not resources.gpus:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        raise UserError(f"{options}: for runs on GPUs, and this one has --gpus 0; leave them out")
    if not resources.gpus or not (named or any(node.gpu_type for node in nodes)):
        return
    try:
        gpu = _gpu(arguments, nodes)
    except UserError:
        if named:
            raise
        return  # a type that only the site knows
    for run in {_what_memory_depends_on(run): run for run in runs}.values():
        try:
            plan = forecast.forecast(run, gpu, resources, None)
            plans = [plan, _on_fewest_nodes(run, gpu, resources)]
        except RuntimeError as error:
            print(f"warning: memory was not checked: {error}", file=sys.stderr)
            return
        for one in filter(None, plans):
            if not one.fits:
                _refuse(one)


def _refuse(plan: forecast.Forecast) -> NoReturn:
    fitting = " ".join(forecast.settings_that_fit(plan))
    raise UserError(
        f"{plan.name} needs {plan.total / forecast.GIB:.1f} GB on each, and {forecast.USABLE:.0%} of the "
        f"{plan.gpu.memory_gb:g} GB of {plan.gpu.name} are usable: it fits with {fitting}; --plan shows the parts, "
        "--force submits it as it is"
    )


def _what_memory_depends_on(run: Config) -> str:
    optim = (run.optim.frozen, run.optim.lora_rank, run.optim.ema)
    return repr((run.model, run.stochastic, run.engine, optim, run.data.batch_size, run.data.augment, run.data.lanes))


def _on_fewest_nodes(run: Config, gpu: Gpu, resources: Resources) -> forecast.Forecast | None:
    """With ``--min-nodes``: the run on so many nodes, with more pairs on each GPU."""
    if resources.min_nodes in (None, resources.nodes):
        return None
    return forecast.forecast(run, gpu, dataclasses.replace(resources, nodes=resources.min_nodes), None)


def _gpu(arguments: argparse.Namespace, nodes: list[Node]) -> Gpu:
    kinds = {node.gpu_type for node in nodes if node.gpu_type}
    name = arguments.gpu or (kinds.pop() if len(kinds) == 1 else None)
    return find_gpu(name, arguments.gpu_memory_gb, arguments.peak_tflops, arguments.mfu)
