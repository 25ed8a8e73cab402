"""The options of ``launch/submit.py``, and the resources that follow from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.nodes import Node, describe_gpus, nodes_of
from launch.resources import Resources, local_gpus, mebibytes_of, minutes_of
from tmass_dist.cli import program
from tmass_dist.errors import UserError

FLAGS = ("partition", "account", "qos", "constraint", "exclude", "mem")
"""Options that are passed on to sbatch as they are."""
_NUMBERS = {
    "nodes": 1,
    "min_nodes": 1,
    "gpus": 0,
    "procs": 1,
    "cpus": 1,
    "requeues": 0,
    "requeue_pause": 0,
    "save_before": 1,
}
"""Least value of each number."""
_SITE_KEYS = {*_NUMBERS, "time", "task_mem", *FLAGS}
_SLURM_ONLY = {
    "min_nodes",
    "requeues",
    "requeue_pause",
    "save_before",
    "time",
    "task_mem",
    "site",
    "wait",
    "name",
    *FLAGS,
}
_JOBS_OF = {
    "tasks": ("evaluate", "shards", "captions", "all"),
    "pack": ("shards", "all"),
    "describe": ("captions",),
    "sweep": ("train",),
    "tune": ("train",),
    "train_only": ("train",),
    "plan": ("train", "all"),
}
"""Jobs that an option applies to."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("python launch/submit.py"),
        description="Submit a run: python launch/submit.py --nodes 4 --config vatex.yaml [key=value ...]",
    )
    parser.add_argument("--config", help="a page of configs/, or a path")
    parser.add_argument(
        "--job",
        choices=("train", "evaluate", "shards", "captions", "all"),
        default="train",
        help="train (and evaluate in the same job; the default); evaluate a run; pack shards or caption videos by an "
        "array; or all: pack if needed, train, score by an array, report",
    )
    parser.add_argument("--tasks", type=int, help="tasks of an array that packs, captions or scores (4)")
    parser.add_argument(
        "--pack", action="append", default=[], metavar="ARGS", help="arguments of make_shards.py; once for each split"
    )
    parser.add_argument(
        "--describe", action="append", default=[], metavar="ARGS", help="arguments of caption_videos.py; once a split"
    )
    parser.add_argument("--sweep", nargs="+", metavar="KEY=A,B", help="a run of each combination, and a table")
    parser.add_argument(
        "--tune", nargs="+", metavar="KEY=LOW..HIGH", help="search by Optuna; also KEY=log:LOW..HIGH and KEY=A,B,..."
    )
    parser.add_argument("--trials", type=int, help="of --tune: trials of the study, with those of earlier starts")
    parser.add_argument("--parallel", type=int, help="of --tune: trials at a time (1)")
    parser.add_argument(
        "--prune", action="store_true", help="of --tune: stop trials whose validation is below the median"
    )
    parser.add_argument("--train-only", action="store_true", help="do not evaluate the test split after training")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--site", metavar="NAME", help="defaults of configs/clusters/NAME.yaml for the options below")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--min-nodes", type=int, help="start with fewer nodes, and resume with any number down to this")
    parser.add_argument(
        "--gpus", type=int, help="GPUs of a node, a task for each; 0: CPUs. Default: what SLURM says of the partition"
    )
    parser.add_argument("--procs", type=int, help="tasks of a node with --gpus 0 (2)")
    parser.add_argument(
        "--cpus", type=int, help="CPUs of a task. Default: its share of the node, else data.num_workers + 1"
    )
    parser.add_argument("--time", help="minutes, HH:MM:SS or D-HH:MM:SS (one day)")
    for flag in FLAGS:
        parser.add_argument(f"--{flag}")
    parser.add_argument("--task-mem", help="memory of a task of an array. Default: a task's part of --mem")
    parser.add_argument("--requeues", type=int, help="how often the job may start again (3)")
    parser.add_argument(
        "--requeue-pause", type=int, metavar="SECONDS", help="pause after a first failure; it grows fourfold (30)"
    )
    parser.add_argument("--save-before", type=int, metavar="SECONDS", help="save so long before the time limit (90)")
    parser.add_argument("--name", help="job name; default: that of the run directory")
    parser.add_argument("--run-dir", help="the same as run_dir=...")
    parser.add_argument("--wait", action="store_true", help="return when the SLURM job has ended")
    parser.add_argument(
        "--dry-run", action="store_true", help="print a summary, the scripts and the resolved config; submit nothing"
    )
    parser.add_argument("--plan", action="store_true", help="print memory, exchanges, time and sizes; submit nothing")
    parser.add_argument("--gpu", metavar="NAME", help="of --plan: h100, a100, ...; default: what SLURM says")
    parser.add_argument(
        "--gpu-memory-gb", type=float, metavar="GB", help="of --plan: memory of a GPU that is not known"
    )
    parser.add_argument("--peak-tflops", type=float, help="of --plan: dense bfloat16 peak of a GPU that is not known")
    parser.add_argument("--mfu", type=float, help="of --plan: part of the peak that the towers reach (0.4)")
    parser.add_argument(
        "--force", action="store_true", help="submit even if the run does not fit into the GPU's memory"
    )
    parser.add_argument("overrides", nargs="*", help="dotted overrides, as optim.lr=1e-5")
    parsed = parser.parse_intermixed_args(arguments)
    _move_single_values(parsed)
    _refuse_options_without_effect(parsed)
    if parsed.tasks is not None and parsed.tasks < 1:
        raise UserError(f"--tasks is {parsed.tasks}; at least 1")
    parsed.tasks = parsed.tasks or 4
    return parsed


def _move_single_values(arguments: argparse.Namespace) -> None:
    """Make overrides of the settings after ``--sweep`` or ``--tune`` that have one value, such as ``run_dir=PATH``."""
    for name in ("sweep", "tune"):
        settings = getattr(arguments, name)
        if settings:
            single = [one for one in settings if "=" in one and "," not in one and ".." not in one.partition("=")[2]]
            arguments.overrides += single
            setattr(arguments, name, [one for one in settings if one not in single])
            if not getattr(arguments, name):
                raise UserError(f"--{name} {' '.join(single)}: no setting has several values")


def _refuse_options_without_effect(arguments: argparse.Namespace) -> None:
    """Raises: UserError: an option that the chosen job or cluster would ignore."""
    for name, jobs in _JOBS_OF.items():
        if getattr(arguments, name) not in (None, False, []) and arguments.job not in jobs:
            raise UserError(
                f"--{name.replace('_', '-')} is for --job {' or '.join(jobs)}, and the job is {arguments.job}"
            )
    _check_tune(arguments)
    for name in ("gpu", "gpu_memory_gb", "peak_tflops", "mfu"):
        if getattr(arguments, name) is not None and arguments.job not in _JOBS_OF["plan"]:
            raise UserError(f"--{name.replace('_', '-')} is for --job train or all, and the job is {arguments.job}")
    for name in ("dry_run", "force", "sweep"):
        if arguments.plan and getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} is not for --plan, which plans one run and submits nothing")
    if arguments.mfu is not None and not arguments.plan:
        raise UserError("--mfu is for --plan: without it only the memory is checked")
    if arguments.cluster == "local":
        for name in sorted(_SLURM_ONLY):
            if getattr(arguments, name) not in (None, False):
                raise UserError(f"--{name.replace('_', '-')} is for SLURM; leave it out with --cluster local")


def _check_tune(arguments: argparse.Namespace) -> None:
    """Check the options of ``--tune``, and set the default of ``--parallel``.

    Raises:
        UserError: one is missing, out of range, or given without ``--tune``.
    """
    for name in ("trials", "parallel", "prune"):
        if getattr(arguments, name) not in (None, False) and not arguments.tune:
            raise UserError(f"--{name} is for --tune")
        if name != "prune" and (getattr(arguments, name) if getattr(arguments, name) is not None else 1) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; at least 1")
    if arguments.tune:
        for name in ("sweep", "wait", "name", "dry_run", "plan", "train_only"):
            if getattr(arguments, name):
                raise UserError(f"--{name.replace('_', '-')} is not for --tune; leave one of them out")
        if arguments.trials is None:
            raise UserError("--tune needs --trials N")
    arguments.parallel = arguments.parallel or 1


def forwarded_options(arguments: argparse.Namespace) -> list[str]:
    """The options that say what a job asks for, as words of a command line."""
    names = ["cluster", "site", "nodes", "min_nodes", "gpus", "procs", "cpus", "time", *FLAGS, "task_mem", "requeues"]
    names += ["requeue_pause", "save_before", "gpu", "gpu_memory_gb", "peak_tflops"]
    words = ["--force"] if arguments.force else []
    for name in names:
        if getattr(arguments, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return words


def read_resources(arguments: argparse.Namespace, num_workers: int, sites: Path) -> tuple[Resources, list[Node]]:
    """Resources from the options, else from the site's page, else from SLURM, else our defaults.

    Args:
        arguments: of :func:`parse`.
        num_workers: decoding processes of a rank; each needs a CPU.
        sites: directory of the sites' pages.

    Returns:
        The resources, and the nodes that the job may get, empty where SLURM does not say.

    Raises:
        UserError: an impossible number, an unknown site, key, partition or feature, more GPUs than a node has, or
            nobody says how many GPUs a node has.
    """
    settings = {key: getattr(arguments, key) for key in _SITE_KEYS if getattr(arguments, key) is not None}
    if arguments.site:
        settings = _site_defaults(sites, arguments.site) | settings
    numbers = {key: _number(key, settings[key], least) for key, least in _NUMBERS.items() if key in settings}
    if numbers.get("min_nodes", 1) > numbers.get("nodes", 1):
        raise UserError(f"--min-nodes is {numbers['min_nodes']}, more than --nodes {numbers.get('nodes', 1)}")
    flags = {flag: str(settings[flag]) for flag in FLAGS if flag in settings}
    for size in (flags.get("mem"), settings.get("task_mem")):
        mebibytes_of(str(size or 0))
    nodes: list[Node] = []
    if arguments.cluster == "local":
        gpus = _gpus_here(numbers)
    elif arguments.job == "shards":
        if arguments.gpus:
            raise UserError(f"--gpus is {arguments.gpus}; packing shards uses no GPU, leave it out")
        gpus, numbers["procs"] = 0, numbers.get("procs", 1)
    else:
        nodes = nodes_of(flags.get("partition"), flags.get("constraint")) or []
        gpus = numbers["gpus"] if "gpus" in numbers else _gpus_of(nodes, flags.get("partition"))
        nodes = _check_gpus(gpus, nodes, numbers, flags.get("partition"))
    if gpus and "procs" in numbers:
        raise UserError(f"--procs is for nodes without GPUs, and a node has {gpus}; add --gpus 0, or leave it out")
    tasks = gpus or numbers.get("procs", Resources.procs)
    resources = Resources(
        cluster=arguments.cluster,
        nodes=numbers.get("nodes", 1),
        min_nodes=numbers.get("min_nodes"),
        gpus=gpus,
        procs=numbers.get("procs", Resources.procs),
        cpus=numbers.get("cpus") or _cpus_of_a_task(arguments.cluster, tasks, num_workers, nodes),
        minutes=minutes_of(str(settings.get("time", "1-00"))),
        requeues=numbers.get("requeues", Resources.requeues),
        requeue_pause_s=numbers.get("requeue_pause", Resources.requeue_pause_s),
        save_before_s=numbers.get("save_before", Resources.save_before_s),
        task_mem=str(settings["task_mem"]) if "task_mem" in settings else None,
        flags=flags,
    )
    return resources, nodes


def _number(key: str, value: Any, least: int) -> int:
    option = f"--{key.replace('_', '-')}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{option} is {value!r}; it is a whole number")
    if value < least:
        raise UserError(f"{option} is {value}; at least {least}")
    return value


def _site_defaults(sites: Path, name: str) -> dict[str, Any]:
    import yaml

    pages = {page.stem: page for page in sites.glob("*.yaml")}
    if name not in pages:
        raise UserError(f"no configs/clusters/{name}.yaml; there are {', '.join(sorted(pages)) or 'none'}")
    try:
        page = yaml.safe_load(pages[name].read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{pages[name]} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(page, dict):
        raise UserError(f"{pages[name]} must hold keys and values, as `gpus: 8`")
    unknown = {str(key) for key in page} - _SITE_KEYS
    if unknown:
        known = ", ".join(sorted(_SITE_KEYS))
        raise UserError(f"{pages[name]}: unknown {', '.join(sorted(unknown))}; known: {known}")
    return page


def _gpus_here(numbers: dict[str, int]) -> int:
    """GPUs of a local run."""
    if numbers.get("nodes", 1) != 1:
        raise UserError(f"--nodes is {numbers['nodes']}; a local run has 1 node")
    present = len(local_gpus())
    gpus = numbers.get("gpus", present)
    if gpus > present:
        raise UserError(f"--gpus is {gpus} and this machine has {present}")
    return gpus


def _gpus_of(nodes: list[Node], partition: str | None) -> int:
    """GPUs of every node, as SLURM says.

    Raises:
        UserError: it does not say, says none, or the nodes differ; the line asks for ``--gpus N``.
    """
    name = f"partition {partition}" if partition else "the default partition"
    counts = {node.gpus for node in nodes}
    if not counts:
        raise UserError(
            "how many GPUs has a node? SLURM does not say on this machine: give --gpus N (--gpus 0: train on CPUs)"
        )
    if counts == {0}:
        raise UserError(f"the nodes of {name} have no GPUs: give another --partition, or --gpus 0 to train on CPUs")
    if len(counts) > 1:
        raise UserError(
            f"the nodes of {name} differ: {describe_gpus(nodes)}; choose with --gpus N, --constraint or --partition"
        )
    return counts.pop()


def _check_gpus(gpus: int, nodes: list[Node], numbers: dict[str, int], partition: str | None) -> list[Node]:
    """The nodes that have enough GPUs.

    Raises:
        UserError: there are fewer than the job asks for.
    """
    enough = [node for node in nodes if node.gpus >= gpus]
    needed = numbers.get("min_nodes") or numbers.get("nodes", 1)
    if nodes and gpus and len(enough) < needed:
        name = f"partition {partition}" if partition else "the default partition"
        raise UserError(f"--gpus {gpus} on {needed} node{'s' if needed > 1 else ''}: {name} has {describe_gpus(nodes)}")
    return enough


def _cpus_of_a_task(cluster: str, tasks: int, num_workers: int, nodes: list[Node]) -> int:
    """A task's share of the smallest node; where SLURM does not say, a CPU for each decoding process and one more."""
    if cluster == "local":
        return 1
    if not nodes:
        return num_workers + 1
    return max(1, min(node.cpus // max(tasks, node.gpus) for node in nodes))
