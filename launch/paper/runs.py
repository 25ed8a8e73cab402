"""Make the embedded benchmark's data and towers, and train the runs that are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.paper.layout import Layout
from launch.resources import local_gpus
from tmass_dist.cli import writable_dir
from tmass_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def prepare_towers(layout: Layout, systems: list[str]) -> None:
    """Copy the committed towers and pretrain those of other seeds, where ``systems`` need them and they are missing."""
    missing = {
        path: seed
        for system in systems
        for seed in range(layout.seeds)
        for path in [layout.towers(system, seed)]
        if not path.is_file()
    }
    for path in [path for path in missing if path.parent == layout.towers("tmass", 0).parent]:
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".json", ".safetensors"):
            shutil.copy(ROOT / "configs" / "towers" / f"{path.stem}{suffix}", path.parent)
        del missing[path]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # They run at the same time, so each gets one thread.
        list(pool.map(lambda path: pretrain_towers(path.parent, missing[path], path.stem), missing))


def pretrain_towers(directory: Path, seed: int, name: str = "demo") -> None:
    """Pretrain a pair of the embedded benchmark's towers, ``NAME.safetensors``, on one thread."""
    _run("shards/demo_towers.py", "--out", str(directory), "--seed", str(seed), "--name", name, threads=1)


def prepare_data(data: Path, videos: tuple[int, int, int]) -> None:
    """Generate and pack so many videos of ``train``, ``val`` and ``test``, unless ``data`` has them already."""
    writable_dir(data)
    train, val, test = videos
    if not (data / "captioner.jsonl").is_file():
        sizes = ["--train", str(train), "--val", str(val), "--test", str(test), "--difficulty", "medium"]
        _run("shards/demo_data.py", "--out", str(data / "videos"), *sizes)
        for split in ("train", "val", "test"):
            source = ["--source", "manifest", "--annotations", str(data / "videos" / "manifest.jsonl")]
            source += ["--videos", str(data / "videos"), "--split", split, "--out", str(data / split)]
            _run("shards/make_shards.py", *source, "--image-size", "32")
        shutil.copy(data / "videos" / "captioner.jsonl", data / "captioner.jsonl.tmp")
        os.replace(data / "captioner.jsonl.tmp", data / "captioner.jsonl")


def _run(*arguments: str, threads: int | None = None) -> None:
    """Run ``python`` with ``arguments``; its progress goes to stderr.

    Raises:
        UserError: the command failed.
    """
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{arguments[0]} failed; its message is above")


def train_missing(layout: Layout, systems: list[str], cluster: str, submit: list[str]) -> dict[Path, str]:
    """Submit every run that is neither finished nor submitted already. Local runs are waited for; on a machine without
    GPUs as many run at a time as it has CPUs.

    Returns:
        Run directories that failed, with the last line of their output.
    """
    from tqdm import tqdm

    from launch.paper.measure import is_finished
    from launch.submitted import live_job

    def is_submitted(run: Path) -> bool:
        return cluster == "slurm" and live_job(run) is not None

    jobs = [
        (run, [f"{layout.data}.yaml", *layout.overrides(system, seed)])
        for seed in range(layout.seeds)
        for system in systems
        for run in [layout.runs(system)[seed]]
        if not is_finished(run) and not is_submitted(run)
    ]
    on_cpus = cluster == "local" and not local_gpus()
    options = ["--cluster", cluster, *(["--procs", "1"] if on_cpus and not submit else []), *submit]
    failed: dict[Path, str] = {}
    num_parallel = (os.cpu_count() or 1) if on_cpus else 1
    with ThreadPoolExecutor(num_parallel) as pool, tqdm(total=len(jobs), desc="runs", unit="run") as bar:

        def start(job: tuple[Path, list[str]]) -> None:
            run, (page, *overrides) = job
            run.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "launch/submit.py", *options, "--config", page, *overrides]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            with (run / "submit.log").open("w", encoding="utf-8") as log:
                done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
            if done.returncode:
                lines = (run / "submit.log").read_text(encoding="utf-8").strip().splitlines()
                failed[run] = lines[-1] if lines else f"exit code {done.returncode}"
            bar.update()

        list(pool.map(start, jobs))
    return failed
