"""Submit a run: ``python launch/submit.py --nodes 4 --config vatex.yaml [key=value ...]``.

``--cluster local`` runs the same job on this machine; ``--dry-run`` prints the sbatch text and the resolved config.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import cluster, plan  # noqa: E402
from launch.job import CommandJob  # noqa: E402
from launch.submitted import refuse_live  # noqa: E402
from tmass_dist.cli import program, run_command, write_json  # noqa: E402
from tmass_dist.config import Config, load_config, to_yaml  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402

FLAGS = ("partition", "account", "qos", "constraint", "exclude", "mem")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program("python launch/submit.py"), description=__doc__)
    parser.add_argument("--config", help="a page of configs/, or a path")
    parser.add_argument(
        "--job",
        choices=("train", "evaluate", "shards", "captions", "all"),
        default="train",
        help="train (and evaluate in the same job; the default); evaluate a run, pack shards or caption videos by an "
        "array; or all: pack if needed, train, score by an array, report",
    )
    parser.add_argument("--tasks", type=int, default=4, help="tasks of an array that packs, captions or scores (4)")
    parser.add_argument("--pack", action="append", default=[], metavar="ARGS", help="of make_shards.py; once a split")
    parser.add_argument(
        "--describe", action="append", default=[], metavar="ARGS", help="of caption_videos.py; once a split"
    )
    parser.add_argument("--sweep", nargs="+", metavar="KEY=A,B", help="a run of each combination, and a table")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--site", metavar="NAME", help="defaults of configs/clusters/NAME.yaml for the options below")
    parser.add_argument("--nodes", type=int)
    parser.add_argument(
        "--min-nodes", type=int, help="start with fewer nodes, down to so many; goes on with any number"
    )
    parser.add_argument("--gpus", type=int, help="GPUs, and so tasks, of a node; default: those of this machine")
    parser.add_argument("--procs", type=int, help="tasks of a node without GPUs (2)")
    parser.add_argument("--cpus", type=int, help="CPUs of a task (1)")
    parser.add_argument("--time", help="minutes, HH:MM:SS or D-HH:MM:SS (one day)")
    for flag in FLAGS:
        parser.add_argument(f"--{flag}")
    parser.add_argument("--requeues", type=int, help="how often the job may start again (3)")
    parser.add_argument("--save-before", type=int, metavar="SECONDS", help="save so long before the time limit (90)")
    parser.add_argument("--name", help="job name; default: that of the run directory")
    parser.add_argument("--run-dir", help="the same as run_dir=...")
    parser.add_argument("--wait", action="store_true", help="come back when the SLURM job has ended, by its state")
    parser.add_argument("--dry-run", action="store_true", help="print the job and the resolved config, submit nothing")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, as optim.lr=1e-5")
    return parser.parse_intermixed_args(arguments)


def _resources(arguments: argparse.Namespace) -> cluster.Resources:
    """The options, over the site's defaults, over ours.

    Raises:
        UserError: a number that cannot be, an unknown site or site key, GPUs where there are none.
    """
    known = {"nodes", "min_nodes", "gpus", "procs", "cpus", "time", "requeues", "save_before", *FLAGS}
    given = {key: getattr(arguments, key) for key in known if getattr(arguments, key) is not None}
    if arguments.site:
        given = _site(arguments.site, known) | given
    gpus = int(given.get("gpus", cluster.num_gpus()))
    if arguments.cluster == "local" and gpus > cluster.num_gpus():
        raise UserError(f"--gpus is {gpus} and this machine has {cluster.num_gpus()}")
    numbers = {key: int(given[key]) for key in ("nodes", "min_nodes", "procs", "cpus", "requeues") if key in given}
    for key, value in numbers.items():
        if value < (key != "requeues"):
            raise UserError(f"--{key.replace('_', '-')} is {value}; at least {int(key != 'requeues')}")
    if numbers.get("min_nodes", 1) > numbers.get("nodes", 1):
        raise UserError(f"--min-nodes is {numbers['min_nodes']}, more than --nodes {numbers.get('nodes', 1)}")
    if arguments.tasks < 1:
        raise UserError(f"--tasks is {arguments.tasks}; at least 1")
    if arguments.cluster == "local" and numbers.get("nodes", 1) != 1:
        raise UserError(f"--nodes is {numbers['nodes']}; a local run has 1 node")
    return cluster.Resources(
        cluster=arguments.cluster,
        gpus=gpus,
        minutes=cluster.minutes_of(str(given.get("time", "1-00"))),
        save_before_s=int(given.get("save_before", 90)),
        flags={flag: str(given[flag]) for flag in FLAGS if flag in given},
        **numbers,
    )


def _site(name: str, known: set[str]) -> dict[str, Any]:
    import yaml

    pages = {page.stem: page for page in (ROOT / "configs" / "clusters").glob("*.yaml")}
    if name not in pages:
        raise UserError(f"no configs/clusters/{name}.yaml; there are {', '.join(sorted(pages)) or 'none'}")
    page = yaml.safe_load(pages[name].read_text(encoding="utf-8")) or {}
    unknown = set(page) - known
    if unknown:
        raise UserError(f"{pages[name]}: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return page


def _snapshot(run_dir: Path) -> Path:
    """The code as submitted, in the run directory, so that a requeued job runs what was meant."""
    snapshot, aside = run_dir / "code", run_dir / "code.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    for package in ("tmass_dist", "launch", "shards", "configs"):
        shutil.copytree(ROOT / package, aside / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(snapshot, ignore_errors=True)
    aside.rename(snapshot)
    return snapshot


def _plan(arguments: argparse.Namespace, resources: cluster.Resources) -> tuple[Path, list[Config], list[plan.Step]]:
    """The directory that the submission belongs to, the runs in it, and what is to be done, in order."""
    overrides = arguments.overrides + ([f"run_dir={arguments.run_dir}"] if arguments.run_dir else [])
    page = arguments.config
    if page is None and arguments.job == "evaluate" and arguments.run_dir:
        page = str(Path(arguments.run_dir) / "config.yaml")
    if page is None:
        raise UserError("--config is needed: a page of configs/, or a path")
    config = plan.absolute(load_config(page, overrides))
    base = Path(config.run_dir)
    folder = base / "jobs"
    if arguments.job == "shards":
        if not arguments.pack:
            raise UserError('--job shards needs --pack "--source ... --videos ... --split ... --out ...", once a split')
        return base, [], plan.packing(arguments.pack, resources, folder, arguments.tasks)
    if arguments.job == "captions":
        if not arguments.describe:
            raise UserError('--job captions needs --describe "DIRECTORY --model ...", once a split')
        return base, [], plan.describing(arguments.describe, resources, folder, arguments.tasks)
    if arguments.job == "evaluate":
        return base, [], plan.evaluation(config, resources, folder, arguments.tasks, encode=True)
    if arguments.sweep:
        runs = plan.sweep(page, overrides, arguments.sweep, base)
        trained = [plan.training(run, resources, folder) for run in runs]
        array = plan.Step("train", [task for step in trained for task in step.tasks], resources)
        compare = CommandJob(("launch/compare.py", str(base), "--out", str(base)), str(folder))
        return base, runs, [array, plan.Step("compare", [compare], resources.one_task(), "afterany")]
    if arguments.job == "all":
        splits = filter(None, (config.data.train, config.data.val, config.data.test))
        ready = all(Path(path, "index.safetensors").is_file() for path in splits)
        packs = plan.packing([] if ready else arguments.pack, resources, folder, arguments.tasks)
        trained = plan.training(config, resources, folder, then="encode")
        after = plan.evaluation(config, resources, folder, arguments.tasks, encode=False)
        return base, [config] if not packs else [], [*packs, trained, *after]
    return base, [config], [plan.training(config, resources, folder)]


def submit(arguments: argparse.Namespace) -> None:
    """Check everything that can be checked here, then submit; local jobs are followed to their end."""
    from tmass_dist.training.checks import check, check_batch

    resources = _resources(arguments)
    base, runs, steps = _plan(arguments, resources)
    world = resources.nodes * resources.tasks
    for run in runs:
        if resources.min_nodes is None:
            check_batch(run, world)
    folder, name = base / "jobs", arguments.name or base.name
    if arguments.dry_run:
        _show_plan(steps, runs, folder, name)
        return
    if resources.cluster == "slurm":
        cluster.require_slurm()
        refuse_live(base)
    for run in runs:
        check(run, 1 if resources.min_nodes else world)
    folder.mkdir(parents=True, exist_ok=True)
    for note in folder.glob(f"{cluster.FINAL_ERROR}-*.txt"):
        note.unlink()
    if resources.cluster == "local":
        _run_here(steps, folder, base)
        return
    jobs: list[dict[str, str]] = []
    code = _snapshot(base)
    for step in steps:
        flags = step.resources.flags | ({"dependency": f"{step.after}:{jobs[-1]['id']}"} if jobs else {})
        executor = cluster.slurm_executor(dataclasses.replace(step.resources, flags=flags), folder, code, name)
        job_id = cluster.submit(executor, step.tasks)[0].job_id.split("_")[0]
        jobs.append({"step": step.name, "id": job_id, "tasks": str(len(step.tasks))})
        write_json(folder / "jobs.json", {"name": name, "jobs": jobs})
    print(f"job {jobs[0]['id']} in {base}")
    for job in jobs[1:]:
        print(f"then {job['step']}: job {job['id']}, {job['tasks']} tasks")
    print(f"log: {folder}/{jobs[0]['id']}_0_log.err")
    print(f"watch: tensorboard --logdir {base}")
    print(f"status: python launch/status.py {base}")
    print(f"cancel: python launch/cancel.py {base}", flush=True)
    if arguments.wait:
        for job in jobs:
            state = cluster.wait(job["id"])
            print(f"{job['step']}, job {job['id']}: {state}")
        if state != "COMPLETED":
            raise UserError(f"job {jobs[-1]['id']} ended {state}; its logs are in {folder}")


def _run_here(steps: list[plan.Step], folder: Path, base: Path) -> None:
    for step in steps:
        for task in step.tasks:
            [job] = cluster.submit(cluster.local_executor(step.resources, folder, ROOT), [task])
            print(f"{step.name}: job {job.job_id} in {base}, log {folder}/{job.job_id}_0_log.err", flush=True)
            cluster.follow(job, step.resources.tasks)
    print(f"\nresults: {base}")
    print(f"curves: {Path(sys.executable).parent}/tensorboard --logdir {base}")


def _show_plan(steps: list[plan.Step], runs: list[Config], folder: Path, name: str) -> None:
    """The exact sbatch text of each step (its dependency's number is not known yet), and each run's config."""
    import tempfile

    for number, step in enumerate(steps):
        resources = step.resources
        kind = "GPU" if resources.gpus else "CPU"
        array = f", an array of {len(step.tasks)}" if len(step.tasks) > 1 else ""
        print(f"# {step.name}: {resources.nodes} nodes x {resources.tasks} tasks ({kind}){array}")
        if resources.cluster == "slurm":
            before = {"dependency": f"{step.after}:JOB-OF-{steps[number - 1].name}"} if number else {}
            flags = resources.flags | before
            with tempfile.TemporaryDirectory() as nowhere:
                executor = cluster.slurm_executor(
                    dataclasses.replace(resources, flags=flags), Path(nowhere), folder.parent / "code", name
                )
                print(cluster.sbatch_text(executor).replace(nowhere, str(folder)))
        commands = {" ".join(task.arguments) for task in step.tasks if isinstance(task, CommandJob)}
        for command in sorted(commands):
            print(f"#   python {command}")
    for run in runs:
        print(to_yaml(run), end="")


def main() -> None:
    submit(parse())


if __name__ == "__main__":
    run_command(main)
