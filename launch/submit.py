"""Submit a training run: ``python launch/submit.py --nodes 4 --config vatex.yaml [key=value ...]``.

``--cluster local`` runs the same job on this machine; ``--dry-run`` prints what would be submitted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import run_command  # noqa: E402
from tmass_dist.config import Config, load_config, to_yaml  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python launch/submit.py", description=__doc__)
    parser.add_argument("--config", required=True, help="a page of configs/, or a path")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, help="GPUs, and so tasks, of a node; default: those of this machine")
    parser.add_argument("--procs", type=int, default=2, help="tasks of a node without GPUs")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of a task")
    parser.add_argument("--time", type=int, default=60 * 24, metavar="MINUTES")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--dry-run", action="store_true", help="print the job and the resolved config, submit nothing")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, as optim.lr=1e-5")
    return parser.parse_args(arguments)


def _num_gpus() -> int:
    """GPUs of this machine, without importing torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def submit(arguments: argparse.Namespace) -> None:
    """Check everything that can be checked here, then submit; local jobs are followed to their end."""
    from launch.job import TrainJob
    from tmass_dist.train import check

    config = load_config(arguments.config, arguments.overrides)
    config = dataclasses.replace(config, run_dir=str(Path(config.run_dir).resolve()), data=_resolved(config))
    if arguments.nodes < 1 or (arguments.cluster == "local" and arguments.nodes != 1):
        raise ValueError(f"--nodes is {arguments.nodes}; a local run has 1 node, a SLURM run at least 1")
    gpus = arguments.gpus if arguments.gpus is not None else _num_gpus()
    tasks = gpus or arguments.procs
    if arguments.dry_run:
        print(f"# {arguments.nodes} nodes x {tasks} tasks ({'GPU' if gpus else 'CPU'}), cluster {arguments.cluster}")
        print(to_yaml(config), end="")
        return
    check(config, arguments.nodes * tasks)
    if arguments.cluster == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("no sbatch on this machine: submit from a SLURM login node, or use --cluster local")

    import submitit

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    os.environ["OMP_NUM_THREADS"] = str(arguments.cpus)
    folder = Path(config.run_dir) / "jobs"
    executor = submitit.AutoExecutor(folder=folder, cluster=arguments.cluster)
    executor.update_parameters(
        name=Path(config.run_dir).name,
        nodes=arguments.nodes,
        tasks_per_node=tasks,
        gpus_per_node=gpus,
        timeout_min=arguments.time,
    )
    if arguments.cluster == "slurm":
        executor.update_parameters(
            cpus_per_task=arguments.cpus,
            slurm_srun_args=[f"--cpus-per-task={arguments.cpus}", "--kill-on-bad-exit=1"],
            slurm_setup=[f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"],
            **{f"slurm_{key}": getattr(arguments, key) for key in ("partition", "account") if getattr(arguments, key)},
        )
    port = _free_port() if arguments.cluster == "local" else 20000 + os.getpid() % 20000
    job = executor.submit(TrainJob(config, port, arguments.cpus))
    print(f"job {job.job_id} in {config.run_dir}")
    print(f"watch: tensorboard --logdir {config.run_dir}/tensorboard")
    if arguments.cluster == "local":
        _follow(job, tasks)


def _resolved(config: Config) -> Any:
    """Data directories as absolute paths: a job may start in another directory."""
    paths = {name: str(Path(getattr(config.data, name)).resolve()) for name in ("train", "val", "test")}
    return dataclasses.replace(config.data, **paths)


def _follow(job: Any, tasks: int) -> None:
    """Show rank 0's output as it comes, and end as the job ends."""
    folder = job.paths.folder
    streams = {folder / f"{job.job_id}_0_log.out": sys.stdout, folder / f"{job.job_id}_0_log.err": sys.stderr}
    positions = dict.fromkeys(streams, 0)

    def pump() -> None:
        for path, stream in streams.items():
            if path.is_file():
                with path.open("rb") as log:
                    log.seek(positions[path])
                    new = log.read()
                positions[path] += len(new)
                text = new.decode("utf-8", "replace")
                stream.write("".join(line for line in text.splitlines(keepends=True) if "submitit" not in line))
                stream.flush()

    try:
        while not job.done():
            pump()
            time.sleep(0.2)
    except KeyboardInterrupt:
        job.cancel()
        raise
    pump()
    ranks = [job.task(number) for number in range(tasks)] if tasks > 1 else [job]
    for number, task in enumerate(ranks):
        if task.exception() is not None:
            raise ValueError(f"rank {number} failed; its log is {folder}/{job.job_id}_{number}_log.err")


if __name__ == "__main__":
    run_command(lambda: submit(parse()))
