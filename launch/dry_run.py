"""``--dry-run``: a summary of what would be submitted, warnings, then each script and each run's config."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from launch.data_report import read_training_split, steps_per_epoch
from launch.nodes import Node, describe_gpus
from launch.resources import Resources
from launch.steps import Step
from tmass_dist.config import Config, differing_keys, load_config, to_yaml
from tmass_dist.errors import UserError
from tmass_dist.training.checks import absolute

if TYPE_CHECKING:
    from tmass_dist.data.index import Index

_WITHOUT_BF16 = (
    "k80",
    "p4",
    "p40",
    "p100",
    "v100",
    "t4",
    "gtx",
    "1080",
    "2080",
    "titan",
    "rtx5000",
    "rtx6000",
    "rtx8000",
)
"""Types of GPUs, as sites name them, that came before bfloat16."""


def show(
    steps: list[Step], runs: list[Config], resources: Resources, nodes: list[Node], folder: Path, name: str
) -> None:
    """Print everything that a submission would do.

    Args:
        steps: of the submission.
        runs: that are trained; empty for other jobs.
        resources: of a training job.
        nodes: that the job may get; empty where SLURM does not say.
        folder: of the job's logs.
        name: of the job.
    """
    lines, warnings = [_allocation(resources, nodes)], _node_warnings(resources, nodes, runs)
    for run in runs:
        run_lines, run_warnings = _run(run, resources, nodes)
        lines += run_lines
        warnings += run_warnings
    if not runs:
        lines.append(f"directory {folder.parent}")
    for line in lines + [f"warning: {warning}" for warning in dict.fromkeys(warnings)]:
        print(f"# {line}")
    for number, step in enumerate(steps):
        _script(step, steps[number - 1].name if number else None, folder, name)
    for run in runs:
        print(to_yaml(run), end="")


def _allocation(resources: Resources, nodes: list[Node]) -> str:
    """``4 nodes x 8 GPUs = 32 ranks, 12 CPUs a rank; partition gpu has 6 nodes with 8 GPUs (h100), ...``."""
    unit = "GPU" if resources.gpus else "CPU process"
    plural = "" if resources.tasks == 1 else ("s" if resources.gpus else "es")
    least = f"{resources.min_nodes} to " if resources.min_nodes else ""
    line = (
        f"{least}{resources.nodes} node{'s' if resources.nodes > 1 else ''} x {resources.tasks} {unit}{plural} = "
        f"{resources.ranks} rank{'s' if resources.ranks > 1 else ''}, {resources.cpus} CPUs a rank"
    )
    if nodes:
        partition = resources.flags.get("partition", "the default one")
        cpus, memory = min(node.cpus for node in nodes), min(node.memory_mb for node in nodes)
        line += f"; partition {partition}: {describe_gpus(nodes)}, {cpus} CPUs and {memory / 1024:.0f} GB a node"
    return line


def _run(run: Config, resources: Resources, nodes: list[Node]) -> tuple[list[str], list[str]]:
    """Lines of the summary, and warnings."""
    from tmass_dist.training.checks import usable_ranks

    ranks = usable_ranks(run, resources.ranks)
    pairs, warnings = run.data.batch_size // ranks, []
    checked = ["options", "config", "batch against ranks"]
    lines = [f"global batch of {run.data.batch_size} pairs, {pairs} a rank"]
    if pairs == 1 and ranks > 1:
        warnings.append("each rank has one pair: most of a step is spent on exchanges; use fewer ranks or more pairs")
    training, missing = read_training_split(run)
    if training is not None:
        data_lines, data_warnings = _data(run, training, ranks)
        lines += data_lines
        warnings += data_warnings
        checked.append("data")
    else:
        lines.append(f"{run.epochs} epochs; steps unknown without the data")
        warnings.append(f"data: {missing}")
    conflict = _run_dir_conflict(run)
    if conflict:
        warnings.append(conflict)
    else:
        checked.append("run directory")
    lines.append(f"run directory {run.run_dir}")
    lines.append(f"checked: {', '.join(checked)}")
    return lines, warnings


def _data(run: Config, training: Index, num_ranks: int) -> tuple[list[str], list[str]]:
    """What a run will read: the parts of a mixture and the steps; and warnings."""
    from tmass_dist.data.mixture import describe_parts

    lines = [f"data.train: {line}" for line in describe_parts(training)]
    try:
        per_epoch = steps_per_epoch(run, training, num_ranks)
    except UserError as error:
        return lines, [f"data: {error}"]
    steps = min(run.epochs * per_epoch, run.max_steps or run.epochs * per_epoch)
    return [*lines, f"{steps} steps: {run.epochs} epochs of {per_epoch} steps" + _limit(run, steps, per_epoch)], []


def _limit(run: Config, steps: int, per_epoch: int) -> str:
    return f", ended by max_steps={run.max_steps}" if steps < run.epochs * per_epoch else ""


def _run_dir_conflict(run: Config) -> str | None:
    """Why the run could not write there; nothing is created."""
    existing = next(path for path in (Path(run.run_dir), *Path(run.run_dir).parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return f"cannot write to {existing}; choose another run_dir"
    saved = Path(run.run_dir) / "config.yaml"
    try:
        differing = differing_keys(absolute(load_config(str(saved))), run) if saved.is_file() else []
    except UserError as error:
        return str(error)
    return f"{run.run_dir} holds a run with another config ({'; '.join(differing)})" if differing else None


def _node_warnings(resources: Resources, nodes: list[Node], runs: list[Config]) -> list[str]:
    warnings = []
    kinds = " ".join(node.gpu_type for node in nodes)
    has_bf16 = resources.gpus and not any(old in kinds for old in _WITHOUT_BF16)
    if has_bf16 and any(str(run.engine.bf16).lower() in ("false", "off") for run in runs):
        warnings.append("engine.bf16 is off: on GPUs since A100 the towers run in bfloat16 at about twice the speed")
    wanted = max((run.data.num_workers + 1 for run in runs), default=1)
    if resources.cluster == "slurm" and resources.cpus < wanted:
        warnings.append(f"{resources.cpus} CPUs a rank, and data.num_workers + 1 is {wanted}: lower it, or --cpus more")
    return warnings


def _script(step: Step, previous: str | None, folder: Path, name: str) -> None:
    """The exact text for sbatch (the number of the job before is not known yet), and the commands of the tasks."""
    from launch import cluster
    from launch.job import CommandJob

    resources = step.resources
    kind = "GPU" if resources.gpus else "CPU"
    array = f", an array of {len(step.tasks)}" if len(step.tasks) > 1 else ""
    print(f"# {step.name}: {resources.nodes} nodes x {resources.tasks} tasks ({kind}){array}")
    if resources.cluster == "slurm":
        dependency = {"dependency": f"{step.after}:JOB-OF-{previous}"} if previous else {}
        asked = dataclasses.replace(resources, flags=resources.flags | dependency)
        with tempfile.TemporaryDirectory() as temporary:
            executor = cluster.slurm_executor(asked, Path(temporary), folder.parent / "code", name)
            print(cluster.sbatch_text(executor).replace(temporary, str(folder)))
    for command in sorted({" ".join(task.arguments) for task in step.tasks if isinstance(task, CommandJob)}):
        print(f"#   python {command}")
