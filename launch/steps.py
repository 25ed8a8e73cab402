"""The steps of a submission, one after the other; each is a job or an array of tasks."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import CommandJob, RankedJob
from launch.resources import Resources
from tmass_dist.config import Config, load_config
from tmass_dist.errors import UserError
from tmass_dist.evaluation.settings import BLOCK_SETTINGS, scoring_overrides
from tmass_dist.training.checks import absolute


@dataclass(frozen=True)
class Step:
    """One job, or an array with a task for each entry of ``tasks``.

    ``after`` is SLURM's condition on the step before: ``afterok`` that it succeeded, ``afterany`` that it ended.
    """

    name: str
    tasks: list[Any]
    resources: Resources
    after: str = "afterok"


def training(config: Config, resources: Resources, folder: Path, *, then: str | None = "evaluate") -> Step:
    """Train, then ``evaluate`` in the same job, or only ``encode`` and leave the scoring to an array, or nothing."""
    do = ("train", then) if then else ("train",)
    return Step("train", [_ranked(config, resources, folder, do)], resources)


def _ranked(config: Config, resources: Resources, folder: Path, do: Any) -> RankedJob:
    threads = max(1, resources.cpus - config.data.num_workers)
    return RankedJob(config, str(folder), do, resources.requeues, threads)


def evaluation(config: Config, resources: Resources, folder: Path, tasks: int, *, encode: bool) -> list[Step]:
    """Encode the test split where that is not done yet, score it by an array of tasks, and write the report.

    A task that scores gets a GPU if the run has GPUs.
    """
    out = Path(config.run_dir) / "evaluation"
    command = ("-m", "tmass_dist.evaluate", "--features", str(out / "features"), "--out", str(out))
    one = resources.one_task()
    steps = [Step("encode", [_ranked(config, resources, folder, ("encode",))], resources)] if encode else []
    # Also features that were encoded before are scored with the settings of this submission.
    blocks = scoring_overrides(config, BLOCK_SETTINGS)
    shares = [CommandJob((*command, "--shard", f"{n}/{tasks}", *blocks), str(folder), one.cpus) for n in range(tasks)]
    report = CommandJob((*command, *scoring_overrides(config)), str(folder), one.cpus)
    return [*steps, Step("score", shares, resources.one_task(gpu=True)), Step("report", [report], one)]


def packing(arguments: list[str], resources: Resources, folder: Path, tasks: int) -> list[Step]:
    """``shards/make_shards.py`` for each entry of ``arguments``: an array packs, then one task writes the index."""
    one = resources.one_task()
    steps = []
    for text in arguments:
        words = shlex.split(text)
        for number, word in enumerate(words[:-1]):
            if word in ("--annotations", "--videos", "--out"):
                words[number + 1] = str(Path(words[number + 1]).resolve())
        command = ("shards/make_shards.py", *words, "--workers", str(resources.cpus))
        if tasks > 1:
            steps.append(_array("pack", command, one, folder, tasks))
        steps.append(Step("index", [CommandJob(command, str(folder), one.cpus)], one))
    return steps


def describing(arguments: list[str], resources: Resources, folder: Path, tasks: int) -> list[Step]:
    """``shards/caption_videos.py DIRECTORY ...`` for each entry of ``arguments``: an array captions, each task on a GPU
    if the run has GPUs, then one task merges the parts."""
    one = resources.one_task()
    steps = []
    for text in arguments:
        directory, *words = shlex.split(text)
        words = [str(Path(word).resolve()) if "/" in word and Path(word).exists() else word for word in words]
        command = ("shards/caption_videos.py", str(Path(directory).resolve()), *words)
        steps.append(_array("describe", command, resources.one_task(gpu=True), folder, tasks))
        steps.append(Step("merge", [CommandJob((*command, "--merge"), str(folder), one.cpus)], one))
    return steps


def _array(name: str, command: tuple[str, ...], one: Resources, folder: Path, tasks: int) -> Step:
    """``command`` with ``--part n/tasks`` for every n."""
    shares = [CommandJob((*command, "--part", f"{n}/{tasks}"), str(folder), one.cpus) for n in range(tasks)]
    return Step(name, shares, one)


def sweep(page: str, overrides: list[str], grid: list[str], base: Path) -> list[Config]:
    """Every combination of ``key=a,b`` settings, each with a run directory named after it.

    Raises:
        UserError: a setting without values, twice, or also given for all runs; or ``base`` is the directory of a run.
    """
    if (base / "config.yaml").is_file():
        raise UserError(f"{base} is the directory of a run; give the sweep another one, as run_dir={base}-sweep")
    axes: dict[str, list[str]] = {}
    fixed = {override.partition("=")[0] for override in overrides} | {"run_dir"}
    for setting in grid:
        key, _, joined = setting.partition("=")
        values = list(dict.fromkeys(value for value in joined.split(",") if value))
        if not values or key in axes:
            raise UserError(f"--sweep {setting}: write key=value,value,... and each key once, as optim.lr=1e-5,3e-5")
        if key in fixed:
            raise UserError(f"--sweep {setting}: {key} is the same for all runs; leave one of them out")
        axes[key] = values
    configs = []
    for chosen in itertools.product(*axes.values()):
        settings = [f"{key}={value}" for key, value in zip(axes, chosen)]
        run_dir = base / ",".join(setting.replace("/", "_") for setting in settings)
        configs.append(absolute(load_config(page, [*overrides, *settings, f"run_dir={run_dir}"])))
    return configs
