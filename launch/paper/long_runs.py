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
from typing import Any

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
FIRST_RATE = 1.0
"""The factor that every system starts with."""
IMAGE_TOWERS = {"trained": ("engine.bf16=true",), "frozen": ("optim.frozen=[towers.clip.visual]",)}
"""``trained``: all weights, towers in bfloat16; ``frozen``: the image tower keeps its pretrained weights, float32."""


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
    rate: float
    """Factor of both learning rates."""

    @property
    def name(self) -> str:
        """Of its directory."""
        setting = self.setting
        return (
            f"{setting.image_tower}-{setting.videos}-{setting.steps}/{self.system}/seed-{self.seed}-rate-{self.rate:g}"
        )


def missing_runs(done: list[dict[str, Any]], setting: Setting, systems: list[str], seeds: int) -> Iterator[LongRun]:
    """The runs that a setting still lacks, the most informative first.

    First the rates of every system at seed 0, until one is chosen (``chosen_rates``), then all seeds at that rate.
    """
    known = {(row["system"], row["seed"], row["rate"]) for row in done if setting_of(row) == setting}
    chosen, recalls = chosen_rates(done, setting), measured_rates(done, setting)
    runs = [LongRun(setting, system, 0, rate) for system in systems for rate in next_rates(recalls.get(system, {}))]
    runs += [
        LongRun(setting, system, seed, chosen[system])
        for seed in range(seeds)
        for system in systems
        if system in chosen
    ]
    for run in runs:
        if (run.system, run.seed, run.rate) not in known:
            yield run


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a result."""
    return Setting(row["image_tower"], row["videos"], row["steps"])


def measured_rates(done: list[dict[str, Any]], setting: Setting) -> dict[str, dict[float, float]]:
    """The R@1 on the validation split of each system at each rate, with seed 0."""
    recalls: dict[str, dict[float, float]] = {}
    for row in done:
        if setting_of(row) == setting and row["seed"] == 0:
            recalls.setdefault(row["system"], {})[row["rate"]] = row["val_R@1"]
    return recalls


def best_rate(recall_of: dict[float, float]) -> float:
    """The rate with the best R@1."""
    return max(recall_of, key=lambda rate: recall_of[rate])


def next_rates(recall_of: dict[float, float]) -> list[float]:
    """The rates that a system still needs: the first one, then the unmeasured neighbours of the best one."""
    if not recall_of:
        return [FIRST_RATE]
    best = RATES.index(best_rate(recall_of))
    return [rate for rate in RATES[max(0, best - 1) : best + 2] if rate not in recall_of]


def chosen_rates(done: list[dict[str, Any]], setting: Setting) -> dict[str, float]:
    """For each system the rate with the best R@1 on the validation split (seed 0), once its neighbours are measured.

    So no system's rate is at the edge of what was measured, unless it is at the edge of ``RATES``.
    """
    recalls = measured_rates(done, setting)
    return {system: best_rate(recall_of) for system, recall_of in recalls.items() if not next_rates(recall_of)}


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
    overrides += [f"optim.lr={1e-3 * run.rate:g}", f"optim.clip_lr={3e-4 * run.rate:g}"]
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
        "rate": run.rate,
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
