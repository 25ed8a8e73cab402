"""Submit a run: ``python launch/submit.py --nodes 4 --config vatex.yaml [key=value ...]``.

``--cluster local`` runs the same job on this machine; ``--dry-run`` prints a summary, the scripts and the config.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import slurm, steps  # noqa: E402
from launch.failures import FINAL_ERROR  # noqa: E402
from launch.job import CommandJob  # noqa: E402
from launch.nodes import Node  # noqa: E402
from launch.options import parse, read_resources  # noqa: E402
from launch.resources import Resources  # noqa: E402
from launch.submitted import refuse_live  # noqa: E402
from tmass_dist.cli import run_command, write_json  # noqa: E402
from tmass_dist.config import Config, load_config  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402
from tmass_dist.revision import COMMIT_FILE, revision  # noqa: E402
from tmass_dist.training.checks import absolute  # noqa: E402


def submit(arguments: argparse.Namespace) -> None:
    """Check everything that can be checked here, then submit; a local job is followed to its end."""
    from tmass_dist.training.checks import check, check_batch

    page, config = _read_config(arguments)
    resources, nodes = read_resources(arguments, config.data.num_workers, ROOT / "configs" / "clusters")
    base = Path(config.run_dir)
    runs, plan = _plan(arguments, page, config, resources)
    trained = [config] if arguments.job == "all" else runs  # with data that may have to be packed first
    for run in trained:
        if resources.min_nodes is None:
            check_batch(run, resources.ranks)
    folder, name = base / "jobs", arguments.name or base.name
    if arguments.tune:
        _tune(arguments, page, config, resources)
        return
    if arguments.plan:
        from launch.plan import show_plan

        show_plan(arguments, config, resources, nodes)
        return
    if arguments.dry_run:
        from launch.dry_run import show

        if arguments.gpu is not None or arguments.gpu_memory_gb is not None:  # else it only takes time
            _refuse_what_cannot_fit(arguments, trained, resources, nodes)
        show(plan, runs, resources, nodes, folder, name)
        return
    if resources.cluster == "slurm":
        slurm.require_slurm()
    refuse_live(base)
    for run in runs:
        check(run, 1 if resources.min_nodes else resources.ranks)
    _refuse_what_cannot_fit(arguments, trained, resources, nodes)
    folder.mkdir(parents=True, exist_ok=True)
    for note in folder.glob(f"{FINAL_ERROR}-*.txt"):
        note.unlink()
    # TensorBoard names a run by its path below this directory.
    curves = base if arguments.sweep else base.parent
    if resources.cluster == "local":
        _submit_locally(plan, folder, base, curves)
    else:
        _submit_to_slurm(plan, folder, base, curves, name, wait=arguments.wait)


def _refuse_what_cannot_fit(
    arguments: argparse.Namespace, trained: list[Config], resources: Resources, nodes: list[Node]
) -> None:
    if trained and not arguments.force:
        from launch.plan import refuse_what_cannot_fit

        refuse_what_cannot_fit(arguments, trained, resources, nodes)


def _tune(arguments: argparse.Namespace, page: str, config: Config, resources: Resources) -> None:
    from launch.space import parse_space
    from launch.tune import Tuner
    from tmass_dist.training.checks import check

    space = parse_space(arguments.tune, page, _overrides(arguments))
    if resources.cluster == "slurm":
        slurm.require_slurm()
    tuner = Tuner(arguments, page, _overrides(arguments), config, resources, space)
    check(config, 1 if resources.min_nodes else resources.ranks)
    tuner.run()


def _read_config(arguments: argparse.Namespace) -> tuple[str, Config]:
    """The page, and the config with its overrides and absolute paths.

    Raises:
        UserError: no page is given, or it is not valid.
    """
    page = arguments.config
    if page is None and arguments.job == "evaluate" and arguments.run_dir:
        page = str(Path(arguments.run_dir) / "config.yaml")
    if page is None:
        raise UserError("--config is needed: a page of configs/, or a path")
    return page, absolute(load_config(page, _overrides(arguments)))


def _overrides(arguments: argparse.Namespace) -> list[str]:
    return arguments.overrides + ([f"run_dir={arguments.run_dir}"] if arguments.run_dir else [])


def _plan(
    arguments: argparse.Namespace, page: str, config: Config, resources: Resources
) -> tuple[list[Config], list[steps.Step]]:
    """The runs that are trained, and the steps of the submission in their order."""
    base = Path(config.run_dir)
    folder = base / "jobs"
    if arguments.job == "shards":
        if not arguments.pack:
            raise UserError('--job shards needs --pack "--source ... --videos ... --split ... --out ...", once a split')
        return [], steps.packing(arguments.pack, resources, folder, arguments.tasks)
    if arguments.job == "captions":
        if not arguments.describe:
            raise UserError('--job captions needs --describe "DIRECTORY --model ...", once a split')
        return [], steps.describing(arguments.describe, resources, folder, arguments.tasks)
    if arguments.job == "evaluate":
        return [], steps.evaluation(config, resources, folder, arguments.tasks, encode=True)
    if arguments.sweep:
        runs = steps.sweep(page, _overrides(arguments), arguments.sweep, base)
        trained = [steps.training(run, resources, folder) for run in runs]
        array = steps.Step("train", [task for step in trained for task in step.tasks], resources)
        compare = CommandJob(("launch/compare.py", str(base), "--out", str(base)), str(folder))
        return runs, [array, steps.Step("compare", [compare], resources.one_task(), "afterany")]
    if arguments.job == "all":
        train = [part.path for part in config.data.train_parts]
        splits = filter(None, (*train, config.data.val, config.data.test))
        ready = all(Path(path, "index.safetensors").is_file() for path in splits)
        packs = steps.packing([] if ready else arguments.pack, resources, folder, arguments.tasks)
        trained = steps.training(config, resources, folder, then="encode")
        after = steps.evaluation(config, resources, folder, arguments.tasks, encode=False)
        return [config] if not packs else [], [*packs, trained, *after]
    then = None if arguments.train_only else "evaluate"
    return [config], [steps.training(config, resources, folder, then=then)]


def _copy_code(run_dir: Path) -> Path:
    """Copy the code into the run directory, so that a requeued job runs what was submitted."""
    copy, temporary = run_dir / "code", run_dir / "code.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for package in ("tmass_dist", "launch", "shards", "configs"):
        shutil.copytree(ROOT / package, temporary / package, ignore=shutil.ignore_patterns("__pycache__"))
    if commit := revision().partition(", commit ")[2]:
        (temporary / COMMIT_FILE).write_text(f"{commit}\n", encoding="utf-8")
    shutil.rmtree(copy, ignore_errors=True)
    temporary.rename(copy)
    return copy


def _submit_to_slurm(plan: list[steps.Step], folder: Path, base: Path, curves: Path, name: str, *, wait: bool) -> None:
    """Submit a job for each step, and print how to follow them.

    Raises:
        UserError: sbatch refuses, or with ``wait`` the last job did not complete.
    """
    from launch import cluster

    jobs: list[dict[str, str]] = []
    code = _copy_code(base)
    (folder / "local.json").unlink(missing_ok=True)
    for step in plan:
        flags = step.resources.flags | ({"dependency": f"{step.after}:{jobs[-1]['id']}"} if jobs else {})
        executor = cluster.slurm_executor(dataclasses.replace(step.resources, flags=flags), folder, code, name)
        job_id = cluster.submit(executor, step.tasks)[0].job_id.split("_")[0]
        jobs.append({"step": step.name, "id": job_id, "tasks": str(len(step.tasks))})
        write_json(folder / "jobs.json", {"name": name, "jobs": jobs})
    print(f"job {jobs[0]['id']} in {base}")
    for job in jobs[1:]:
        print(f"then {job['step']}: job {job['id']}, {job['tasks']} tasks")
    print(f"log: {folder}/{jobs[0]['id']}_0_log.err")
    print(f"watch: tensorboard --logdir {curves}")
    print(f"status: python launch/status.py {base}")
    print(f"cancel: python launch/cancel.py {base}", flush=True)
    if wait:
        for job in jobs:
            state = slurm.wait(job["id"])
            print(f"{job['step']}, job {job['id']}: {state}")
        if state != "COMPLETED":
            raise UserError(f"job {jobs[-1]['id']} ended {state}; its logs are in {folder}")


def _submit_locally(plan: list[steps.Step], folder: Path, base: Path, curves: Path) -> None:
    """Run every task of every step here, one after the other."""
    from launch.local import run_local

    (folder / "jobs.json").unlink(missing_ok=True)
    tasks = [(step, task) for step in plan for task in step.tasks]
    for number, (step, task) in enumerate(tasks):
        job_id = f"local-{os.getpid()}-{number}"
        print(f"{step.name}: job {job_id} in {base}, log {folder}/{job_id}_0_log.err", flush=True)
        run_local(task, step.resources, folder, ROOT, job_id, base)
    print(f"\nresults: {base}")
    print(f"curves: {Path(sys.executable).parent}/tensorboard --logdir {curves}")


def main() -> None:
    submit(parse())


if __name__ == "__main__":
    run_command(main)
