"""The paper's supplementary, table by table: lay out the runs, train what is missing, and write one page.

``python launch/reproduce.py --all --data demo --cluster local --size ci``. Start it again to go on: finished runs stay.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.experiments import DATA, PARTS, PUBLISHED_NOISE, SIZES, SYSTEMS, Size, systems_of  # noqa: E402
from tmass_dist.cli import run_command, writable_dir  # noqa: E402


@dataclass(frozen=True)
class Layout:
    """Where everything of one reproduction lies."""

    data: str
    size_name: str
    seeds: int
    steps: int | None
    out: Path

    @property
    def size(self) -> Size:
        """How much of everything."""
        return SIZES[self.size_name]

    @property
    def base(self) -> Path:
        """Directory of this data set's runs and page."""
        return self.out / f"{self.data}-{self.size_name}"

    def runs(self, system: str) -> list[Path]:
        """A system's run directories, one a seed."""
        return [self.base / system / f"seed-{seed}" for seed in range(self.seeds)]

    def towers(self, seed: int) -> Path:
        """Towers of the embedded benchmark that a seed starts from; seed 0 has the committed ones."""
        return self.base / f"towers-{seed if self.size.own_towers else 0}"

    def of(self, data: str) -> Layout:
        """The same of another data set, beside this one."""
        return replace(self, data=data)

    def overrides(self, system: str, seed: int) -> list[str]:
        """What a run differs in from its data set's page."""
        one = SYSTEMS[system]
        found = [f"seed={seed}", f"run_dir={self.base / system / f'seed-{seed}'}", f"data.batch_size={one.batch_size}"]
        if self.data == "demo":
            found += PUBLISHED_NOISE
            towers = self.towers(seed)
            found += [f"data.{split}={self.base / 'data' / split}" for split in ("train", "val", "test")]
            found += [f"model.architecture={towers / 'demo.json'}", f"model.pretrained={towers / 'demo.safetensors'}"]
        if self.steps is not None:
            steps = self.steps if one.as_many_steps else max(1, self.steps * 32 // one.batch_size)
            found += [f"max_steps={steps}", f"eval_every={max(1, steps // 6)}"]
        if one.captions:
            found.append(f"data.captions=[{self.captions()}]")
        return [*found, *one.overrides]

    def captions(self) -> Path:
        """What a captioner said of the training videos."""
        return self.base / "data" / "captioner.jsonl" if self.data == "demo" else Path("captions.jsonl")

    def missing_data(self) -> str | None:
        """Why this data set cannot be run here, if so."""
        from tmass_dist.config import load_config
        from tmass_dist.train import load_splits

        if self.data == "demo":
            return None
        try:
            load_splits(load_config(f"{self.data}.yaml", []))
        except ValueError as error:
            return str(error)
        return None


def prepare_demo(layout: Layout) -> None:
    """Generate, pack and pretrain what is not there yet."""
    data = writable_dir(layout.base / "data")
    train, val, test = layout.size.videos
    if not (data / "captioner.jsonl").is_file():
        sizes = ["--train", str(train), "--val", str(val), "--test", str(test), "--difficulty", "medium"]
        _run("shards/demo_data.py", "--out", str(data / "videos"), *sizes)
        for split in ("train", "val", "test"):
            source = ["--source", "manifest", "--annotations", str(data / "videos" / "manifest.jsonl")]
            source += ["--videos", str(data / "videos"), "--split", split, "--out", str(data / split)]
            _run("shards/make_shards.py", *source, "--image-size", "32")
        shutil.copy(data / "videos" / "captioner.jsonl", data / "captioner.jsonl.tmp")
        os.replace(data / "captioner.jsonl.tmp", data / "captioner.jsonl")
    if not (layout.towers(0) / "demo.safetensors").is_file():
        shutil.copytree(ROOT / "configs" / "towers", layout.towers(0), dirs_exist_ok=True)
    seeds = [seed for seed in range(layout.seeds) if not (layout.towers(seed) / "demo.safetensors").is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # One thread each: side by side, more would only wait for each other.
        pretrain = ("shards/demo_towers.py", "--out")
        list(pool.map(lambda seed: _run(*pretrain, str(layout.towers(seed)), "--seed", str(seed), threads=1), seeds))


def _run(*arguments: str, threads: int | None = None) -> None:
    """``python`` with ``arguments``, its progress shown.

    Raises:
        ValueError: it failed.
    """
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"{arguments[0]} failed; its words are above")


def train_missing(layout: Layout, systems: list[str], cluster: str, submit: list[str]) -> dict[Path, str]:
    """Submit every run that is neither finished nor under way; local ones side by side, to their ends.

    Returns:
        Run directories that failed, with their last words.
    """
    from tqdm import tqdm

    from launch.measure import is_finished
    from launch.record import live_job

    def is_under_way(run: Path) -> bool:
        return cluster == "slurm" and live_job(run) is not None

    jobs = [
        (run, [f"{layout.data}.yaml", *layout.overrides(system, seed)])
        for seed in range(layout.seeds)
        for system in systems
        for run in [layout.runs(system)[seed]]
        if not is_finished(run) and not is_under_way(run)
    ]
    options = ["--cluster", cluster, *(["--procs", "1"] if cluster == "local" and not submit else []), *submit]
    failed: dict[Path, str] = {}
    side_by_side = (os.cpu_count() or 1) if cluster == "local" and _num_gpus() == 0 else 1
    with ThreadPoolExecutor(side_by_side) as pool, tqdm(total=len(jobs), desc="runs", unit="run") as bar:

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


def _num_gpus() -> int:
    from launch.cluster import num_gpus

    return num_gpus()


def _parts(arguments: argparse.Namespace) -> list[str]:
    if arguments.all:
        return list(PARTS)
    chosen = [f"table {number}" for number in arguments.table]
    chosen += [f"figure {min(number, 3)}" for number in arguments.figure]
    chosen += [f"section {number}" for number in arguments.section] + (["gain"] if arguments.gain else [])
    if not chosen:
        raise ValueError("nothing is asked for: give --all, --table N, --figure N, --section N or --gain")
    return list(dict.fromkeys(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python launch/reproduce.py", description=__doc__)
    parser.add_argument("--all", action="store_true", help="everything")
    parser.add_argument("--table", type=int, action="append", default=[], choices=range(1, 6), metavar="1-5")
    parser.add_argument("--figure", type=int, action="append", default=[], choices=range(1, 11), metavar="1-10")
    parser.add_argument("--section", type=int, action="append", default=[], choices=(2, 3), metavar="2|3")
    parser.add_argument(
        "--gain", action="store_true", help="T-MASS against X-Pool under query_conditioned, and variants"
    )
    parser.add_argument("--data", choices=DATA, default="demo", help="the embedded benchmark, or a real data set")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="local")
    parser.add_argument(
        "--submit", default="", metavar="OPTIONS", help="of launch/submit.py, as '--nodes 4 --time 6:00:00'"
    )
    parser.add_argument("--seeds", type=int, help="of towers and training (ci: 1, full: 3)")
    parser.add_argument("--size", choices=sorted(SIZES), default="ci")
    parser.add_argument("--steps", type=int, help="training steps of batch 32, in place of the size's")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--page-only", action="store_true", help="train nothing; write what is there")
    arguments = parser.parse_args()
    parts, size = _parts(arguments), SIZES[arguments.size]
    for name in ("seeds", "steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; at least 1")
    steps = arguments.steps or (size.steps if arguments.data == "demo" or arguments.size == "ci" else None)
    out = writable_dir(arguments.out).resolve()
    layout = Layout(arguments.data, arguments.size, arguments.seeds or size.seeds, steps, out)
    writable_dir(layout.base)
    systems = systems_of(parts, arguments.data, size.largest_batch)
    absent = layout.missing_data()
    failed: dict[Path, str] = {}
    if absent is None and not arguments.page_only:
        if arguments.data == "demo":
            prepare_demo(layout)
        failed = train_missing(layout, systems, arguments.cluster, shlex.split(arguments.submit))
    from launch.page import write_page

    page = write_page(layout, parts, absent)
    print(f"{page}\n{page.with_suffix('.md')}")
    if failed:
        run, words = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} runs failed; the first, {run}: {words}")
    if arguments.cluster == "slurm" and absent is None:
        print("what was submitted is trained by the cluster; the same command collects it")


if __name__ == "__main__":
    run_command(main)
