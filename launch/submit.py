"""Submit a run: ``python launch/submit.py --nodes 4 --config vatex.yaml [key=value ...]``.

``--cluster local`` runs the same job on this machine; ``--dry-run`` prints the sbatch text and the resolved config.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import cluster  # noqa: E402
from tmass_dist.cli import run_command  # noqa: E402
from tmass_dist.config import Config, load_config, to_yaml  # noqa: E402

FLAGS = ("partition", "account", "qos", "constraint", "exclude", "mem")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python launch/submit.py", description=__doc__)
    parser.add_argument("--config", required=True, help="a page of configs/, or a path")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--site", metavar="NAME", help="defaults of configs/clusters/NAME.yaml for the options below")
    parser.add_argument("--nodes", type=int)
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
        ValueError: a number that cannot be, an unknown site or site key, GPUs where there are none.
    """
    known = {"nodes", "gpus", "procs", "cpus", "time", "requeues", "save_before", *FLAGS}
    given = {key: getattr(arguments, key) for key in known if getattr(arguments, key) is not None}
    if arguments.site:
        given = _site(arguments.site, known) | given
    gpus = int(given.get("gpus", cluster.num_gpus()))
    if arguments.cluster == "local" and gpus > cluster.num_gpus():
        raise ValueError(f"--gpus is {gpus} and this machine has {cluster.num_gpus()}")
    numbers = {key: int(given[key]) for key in ("nodes", "procs", "cpus", "requeues") if key in given}
    for key, value in numbers.items():
        if value < (key != "requeues"):
            raise ValueError(f"--{key} is {value}; at least {int(key != 'requeues')}")
    if arguments.cluster == "local" and numbers.get("nodes", 1) != 1:
        raise ValueError(f"--nodes is {numbers['nodes']}; a local run has 1 node")
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
        raise ValueError(f"no configs/clusters/{name}.yaml; there are {', '.join(sorted(pages)) or 'none'}")
    page = yaml.safe_load(pages[name].read_text(encoding="utf-8")) or {}
    unknown = set(page) - known
    if unknown:
        raise ValueError(f"{pages[name]}: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return page


def _absolute(config: Config) -> Config:
    """Paths that hold wherever the job starts."""
    given = {name: getattr(config.data, name) for name in ("train", "val", "test")}
    paths: Any = {name: str(Path(path).resolve()) for name, path in given.items() if path}
    files = {
        key: str(Path(value).resolve())
        for key in ("architecture", "pretrained")
        if (value := getattr(config.model, key)) and Path(value).is_file()
    }
    return dataclasses.replace(
        config,
        run_dir=str(Path(config.run_dir).resolve()),
        data=dataclasses.replace(config.data, **paths),
        model=dataclasses.replace(config.model, **files),
    )


def _snapshot(run_dir: Path) -> Path:
    """The code as submitted, in the run directory, so that a requeued job runs what was meant."""
    snapshot, aside = run_dir / "code", run_dir / "code.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    for package in ("tmass_dist", "launch", "shards", "configs"):
        shutil.copytree(ROOT / package, aside / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(snapshot, ignore_errors=True)
    aside.rename(snapshot)
    return snapshot


def _refuse_live(jobs: Path) -> None:
    """Raises: ValueError: a job that still runs or waits writes to this run directory."""
    record = jobs / "job.json"
    if record.is_file():
        job_id = json.loads(record.read_text(encoding="utf-8"))["job_id"]
        state = cluster.slurm_state(job_id)
        if cluster.is_alive(state):
            raise ValueError(f"{jobs.parent} is in use by job {job_id} ({state}); cancel it, or take another run_dir")


def submit(arguments: argparse.Namespace) -> None:
    """Check everything that can be checked here, then submit; local jobs are followed to their end."""
    from launch.job import TrainJob
    from tmass_dist.engine.checkpoint import write_json
    from tmass_dist.train import check, check_batch

    overrides = arguments.overrides + ([f"run_dir={arguments.run_dir}"] if arguments.run_dir else [])
    config = _absolute(load_config(arguments.config, overrides))
    resources = _resources(arguments)
    world = resources.nodes * resources.tasks
    check_batch(config, world)
    run_dir = Path(config.run_dir)
    jobs, name = run_dir / "jobs", arguments.name or run_dir.name
    if arguments.dry_run:
        print(f"# {resources.nodes} nodes x {resources.tasks} tasks ({'GPU' if resources.gpus else 'CPU'})")
        if resources.cluster == "slurm":
            import tempfile

            with tempfile.TemporaryDirectory() as nowhere:
                text = cluster.sbatch_text(cluster.slurm_executor(resources, Path(nowhere), run_dir / "code", name))
            print(text.replace(nowhere, str(jobs)))
        print(to_yaml(config), end="")
        return
    if resources.cluster == "slurm":
        cluster.require_slurm()
        _refuse_live(jobs)
    check(config, world)
    (jobs / cluster.FINAL_ERROR).unlink(missing_ok=True)
    task = TrainJob(config, resources.requeues, resources.cpus)
    if resources.cluster == "local":
        job = cluster.submit(cluster.local_executor(resources, jobs, ROOT), task)
    else:
        job = cluster.submit(cluster.slurm_executor(resources, jobs, _snapshot(run_dir), name), task)
        write_json(jobs / "job.json", {"job_id": job.job_id, "name": name})
    print(f"job {job.job_id} in {config.run_dir}")
    print(f"log: {jobs}/{job.job_id}_0_log.err")
    print(f"watch: tensorboard --logdir {config.run_dir}/tensorboard", flush=True)
    if resources.cluster == "local":
        cluster.follow(job, resources.tasks)
        print(f"\nmetrics: {config.run_dir}/evaluation/metrics.json")
        print(f"curves: {Path(sys.executable).parent}/tensorboard --logdir {config.run_dir}/tensorboard")
        return
    print(f"status: python launch/status.py {config.run_dir}")
    print(f"cancel: python launch/cancel.py {config.run_dir}", flush=True)
    if arguments.wait:
        state = cluster.wait(job.job_id)
        print(f"job {job.job_id}: {state}")
        if state != "COMPLETED":
            raise ValueError(f"job {job.job_id} ended {state}; its logs are in {jobs}")


if __name__ == "__main__":
    run_command(lambda: submit(parse()))
