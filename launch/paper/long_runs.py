"""The long comparison on the embedded benchmark: which runs it has, one run, and its result as a line of JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.paper.runs import ROOT, prepare_data, pretrain_towers
from launch.paper.systems import PUBLISHED_NOISE, SYSTEMS
from tmass_dist.cli import write_text
from tmass_dist.errors import UserError
from tmass_dist.score_labels import LABELS

COMPARED = (
    "xpool",
    "best-frame",
    "query-scored",
    "mass-query-scored",
    "tmass",
    "centred",
    "xpool-best-frame",
    "late-interaction",
    "weighted-interaction",
    "expected",
    "temperature",
)
"""Keys of ``SYSTEMS``; the first is what the others are compared with."""
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Factors of both learning rates of ``demo.yaml``, ascending; each system's own is chosen on the validation split."""
HEAD_RATES = {"same": 1.0, "third": 1 / 3}
"""A further factor of the head's rate: some heads need a lower rate than the towers."""
WITHOUT_HEAD = ("best-frame", "late-interaction")
"""Systems whose head has no weights, and so no rate of its own."""
FIRST_RATE = {"same": 1.0, "third": 3.0}
"""The factor that every system starts with: the head has the rate of ``demo.yaml``."""
IMAGE_TOWERS = {"trained": ("engine.bf16=true",), "frozen": ("optim.frozen=[towers.clip.visual]",)}
"""``trained``: all weights, towers in bfloat16; ``frozen``: the image tower keeps its pretrained weights, float32."""


class Rates(NamedTuple):
    """Learning rates, as factors of those of ``demo.yaml``."""

    towers: float
    """An element of ``RATES``."""
    head: str = "same"
    """A key of ``HEAD_RATES``."""

    def __str__(self) -> str:
        return f"{self.towers:g}" + ("" if self.head == "same" else f" (head: a {self.head} of it)")


@dataclass(frozen=True, order=True)
class Setting:
    """What the compared systems share."""

    image_tower: str
    """A key of ``IMAGE_TOWERS``."""
    videos: int
    """Training videos; there are 60 videos to validate and 240 to test."""
    steps: int


@dataclass(frozen=True)
class LongRun:
    """One run of the comparison."""

    setting: Setting
    system: str
    seed: int
    """Of the training, and of the pretraining of the towers."""
    rates: Rates

    @property
    def name(self) -> str:
        """Of its directory."""
        setting, rates = self.setting, self.rates
        head = "" if rates.head == "same" else f"-head-{rates.head}"
        return (
            f"{setting.image_tower}-{setting.videos}-{setting.steps}/"
            f"{self.system}/seed-{self.seed}-rate-{rates.towers:g}{head}"
        )


def missing_runs(
    done: list[dict[str, Any]], setting: Setting, systems: list[str], seeds: int, head: str = "same"
) -> Iterator[LongRun]:
    """The runs that a setting still lacks, the most informative first.

    First the rates of every system at seed 0, until one is chosen (``chosen_rates``), then all seeds at that rate.

    Args:
        done: the results so far.
        setting: which runs.
        systems: keys of ``COMPARED``.
        seeds: number of seeds, from 0.
        head: a key of ``HEAD_RATES``: the rates that are tried.
    """
    known = {(row["system"], row["seed"], rates_of(row)) for row in done if setting_of(row) == setting}
    chosen, recalls = chosen_rates(done, setting), measured_rates(done, setting)
    runs = [
        LongRun(setting, system, 0, rates) for system in systems for rates in next_rates(recalls.get(system, {}), head)
    ]
    runs += [
        LongRun(setting, system, seed, chosen[system])
        for seed in range(seeds)
        for system in systems
        if system in chosen
    ]
    for run in runs:
        if (run.system, run.seed, run.rates) not in known:
            yield run


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a result."""
    return Setting(row["image_tower"], row["videos"], row["steps"])


def rates_of(row: dict[str, Any]) -> Rates:
    """The learning rates of a result."""
    return Rates(row["rate"], row.get("head_rate", "same"))


def measured_rates(done: list[dict[str, Any]], setting: Setting) -> dict[str, dict[Rates, float]]:
    """The R@1 on the validation split of each system at each pair of rates, with seed 0."""
    recalls: dict[str, dict[Rates, float]] = {}
    for row in done:
        if setting_of(row) == setting and row["seed"] == 0:
            recalls.setdefault(row["system"], {})[rates_of(row)] = row["val_R@1"]
    return recalls


def best_rates(recall_of: dict[Rates, float]) -> Rates:
    """The rates with the best R@1."""
    return max(recall_of, key=lambda rates: recall_of[rates])


def next_rates(recall_of: dict[Rates, float], head: str) -> list[Rates]:
    """The rates that a system still needs: the first one, then the unmeasured neighbours of the best one.

    Args:
        recall_of: those measured.
        head: a key of ``HEAD_RATES``; only rates with it count.
    """
    alike = {rates: recall for rates, recall in recall_of.items() if rates.head == head}
    if not alike:
        return [Rates(FIRST_RATE[head], head)]
    best = RATES.index(best_rates(alike).towers)
    near = [Rates(towers, head) for towers in RATES[max(0, best - 1) : best + 2]]
    return [rates for rates in near if rates not in alike]


def chosen_rates(done: list[dict[str, Any]], setting: Setting) -> dict[str, Rates]:
    """For each system the rates with the best R@1 on the validation split (seed 0), once their neighbours are measured.

    So no system's rate is at the edge of what was measured, unless it is at the edge of ``RATES``.
    """
    best = {system: (best_rates(recall_of), recall_of) for system, recall_of in measured_rates(done, setting).items()}
    return {system: rates for system, (rates, recall_of) in best.items() if not next_rates(recall_of, rates.head)}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results so far; an incomplete last line, of a process that was killed, is left out.

    Raises:
        UserError: another line is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number} is damaged: {error}") from error
    return rows


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Add a line; an incomplete last line is removed first."""
    rows = [*read_results(path), row]
    write_text(path, "".join(json.dumps(one) + "\n" for one in rows))


def run_one(run: LongRun, out: Path) -> dict[str, Any]:
    """Train and evaluate one run below ``out``, and return its result.

    Raises:
        UserError: a command failed; its output is in ``log.txt`` of the run.
    """
    setting, directory = run.setting, out / run.name
    data, towers = out / f"data-{setting.videos}", out / f"towers-{run.seed}"
    prepare_data(data, (setting.videos, 60, 240))
    if not (towers / "demo.safetensors").is_file():
        pretrain_towers(towers, run.seed)
    overrides = [f"seed={run.seed}", f"run_dir={directory}", f"max_steps={setting.steps}"]
    overrides += [f"eval_every={max(1, setting.steps // 6)}", "log_every=100", "evaluation.baselines=features"]
    overrides += [f"data.{split}={data / split}" for split in ("train", "val", "test")]
    overrides += [f"model.architecture={towers / 'demo.json'}", f"model.pretrained={towers / 'demo.safetensors'}"]
    towers_rate, head_rate = run.rates.towers, run.rates.towers * HEAD_RATES[run.rates.head]
    overrides += [f"optim.lr={1e-3 * head_rate:g}", f"optim.clip_lr={3e-4 * towers_rate:g}"]
    overrides += [*PUBLISHED_NOISE, *IMAGE_TOWERS[setting.image_tower], *SYSTEMS[run.system].overrides]
    directory.mkdir(parents=True, exist_ok=True)
    began = time.time()
    for command in (["train", "--config", "demo.yaml", *overrides], ["evaluate", "--run", str(directory)]):
        with (directory / "log.txt").open("a", encoding="utf-8") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, "-m", f"tmass_dist.{command[0]}", *command[1:]],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise UserError(
                f"{command[0]} of {run.name} failed with exit code {done.returncode}: {directory / 'log.txt'}"
            )
    for checkpoint in (directory / "checkpoints").glob("step-*"):
        shutil.rmtree(checkpoint)
    return result_of(run, directory) | {"minutes": round((time.time() - began) / 60, 1)}


def result_of(run: LongRun, directory: Path) -> dict[str, Any]:
    """The result of a finished run."""
    from tmass_dist import __version__
    from tmass_dist.evaluation.baselines import frame_baselines
    from tmass_dist.evaluation.report import read_ranks
    from tmass_dist.evaluation.stored import StoredSplit

    metrics = json.loads((directory / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    best = json.loads((directory / "checkpoints" / "best.json").read_text(encoding="utf-8"))
    validations = json.loads((directory / "checkpoints" / "validation.json").read_text(encoding="utf-8"))
    ranks, _ = read_ranks(directory / "evaluation")
    stored = StoredSplit(directory / "evaluation" / "features", [])
    baselines = frame_baselines(stored.features, stored.query_scoring_tau)
    return {
        **asdict(run.setting),
        "system": run.system,
        "seed": run.seed,
        "rate": run.rates.towers,
        "head_rate": run.rates.head,
        "version": __version__,
        **{key: metrics[key] for key in LABELS if metrics.get(key) is not None},
        "selected_step": best["step"],
        "val_R@1": best["R@1"],
        "validations": {str(point["step"]): point["R@1"] for point in validations},
        "t2v": metrics["t2v"],
        "v2t": metrics["v2t"],
        "baselines": {name: row["t2v"]["R@1"] for name, row in metrics["baselines"].items()},
        "calibration": metrics["calibration"],
        "hits": {name: hits_of(one.t2v_T, one.owner_T) for name, one in {"result": ranks, **baselines}.items()},
    }


def hits_of(rank_T: Any, owner_T: Any) -> str:
    """How many captions of each video were ranked first, as a digit for each video."""
    hits_V = np.bincount(owner_T.numpy(), weights=(rank_T <= 1).numpy())
    assert hits_V.max() <= 9, "a digit holds at most 9 captions"
    return "".join(str(int(hits)) for hits in hits_V)
