"""Where the curves of a run go: ``metrics.jsonl`` always, and the loggers of ``log.to``. Only rank 0 opens them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tmass_dist.cli import write_text
from tmass_dist.config import Config, flat, to_yaml
from tmass_dist.errors import UserError

METRICS_FILE = "metrics.jsonl"
"""In the run directory: one JSON object a line, with ``step``, ``time`` (Unix seconds) and the values by tag."""
SCORES = "metrics/"
"""Prefix of the tags of validation and test results."""
ALWAYS_LISTED = (
    "seed",
    "data.batch_size",
    "optim.lr",
    "optim.clip_lr",
    "stochastic.support_weight",
    "stochastic.num_trials",
    "evaluation.protocol",
    "evaluation.post_processing",
    "evaluation.precision",
)
"""Settings that TensorBoard's table of runs lists even if they have their default."""


def check_loggers(config: Config) -> None:
    """Check that the packages of ``log.to`` are installed.

    Raises:
        UserError: one is missing; its extra is named.
    """
    for name in config.log.to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.to has {name}, which is not installed: pip install 'tmass-dist[{name}]'")


def score_tags(split: str, result: dict[str, Any], **directions: dict[str, float]) -> dict[str, float]:
    """Values by tag, such as ``metrics/val/query_conditioned/t2v_R@1``.

    Args:
        split: that was scored.
        result: with ``protocol`` and ``post_processing``, which every tag names (``none`` is left out).
        directions: metrics of ``t2v`` and ``v2t``.
    """
    labels = [split, result["protocol"], *({result["post_processing"]} - {"none"})]
    return {
        f"{SCORES}{'/'.join(labels)}/{direction}_{name}": value
        for direction, metrics in directions.items()
        for name, value in metrics.items()
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a line that is cut off or damaged is left out. Empty if there is no file."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Logger:
    """One destination of a run's curves."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write values by tag."""
        raise NotImplementedError

    def histogram(self, tag: str, numbers: Any, step: int) -> None:
        """Write the distribution of a numpy array."""

    def image(self, tag: str, picture: Any, step: int) -> None:
        """Write a PIL picture."""

    def result(self, values: dict[str, float], step: int) -> None:
        """Write test results by tag; those of an earlier call are replaced."""
        self.scalars(values, step)

    def close(self, *, complete: bool) -> None:
        """Write everything out. ``complete``: the run reached its end."""


def _has_scores(values: dict[str, Any]) -> bool:
    return any(tag.startswith(SCORES) for tag in values)


class MetricsFile(Logger):
    """``metrics.jsonl``. A value that is not finite is written as ``null``.

    A resumed run has the lines of a run that was never stopped: lines after its step are removed, and so is the
    validation of its step if that will be repeated.

    Args:
        path: of the file.
        step: from which the run starts or resumes; None: after its end, all lines are kept.
        repeats_validation: whether the validation of this step will be repeated.
    """

    def __init__(self, path: Path, step: int | None, *, repeats_validation: bool = False) -> None:
        self.path = path
        self._keep(
            lambda line: step is None
            or (line["step"] < step)
            or (line["step"] == step > 0 and not (repeats_validation and _has_scores(line)))
        )

    def _keep(self, condition: Any) -> None:
        if self.path.is_file():
            lines = [line for line in read_metrics(self.path) if condition(line)]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def scalars(self, values: dict[str, float], step: int) -> None:
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), **finite}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def result(self, values: dict[str, float], step: int) -> None:
        prefixes = {tag.rpartition("_")[0] for tag in values}
        self._keep(lambda line: not any(key.rpartition("_")[0] in prefixes for key in line))
        self.scalars(values, step)


class TensorBoard(Logger):
    """Event files in the run directory itself, so that TensorBoard names the run after it.

    Points after the step of a resumed run are replaced. Test results have an event file of their own, which is
    replaced when the run is evaluated again.

    Args:
        run_dir: of the run.
        config: of the run.
        step: from which the run starts or resumes.
        about: meaning of the tags, for the text tab.
    """

    TEST = ".test-results"

    def __init__(self, run_dir: Path, config: Config, step: int, about: dict[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        _move_old_events(run_dir)
        self._writer: Any = SummaryWriter(str(run_dir), purge_step=step + 1 if step else None)
        self._session_end: Any = None
        # The same in every file: TensorBoard reads them once, and a resumed run may have other optional settings.
        split, protocol = config.evaluation.selected_on, config.evaluation.protocol
        scores = [f"{SCORES}{name}/{protocol}" for name in dict.fromkeys((split, "test"))]
        if step == 0:
            self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)
            self._writer.add_text("tags", "\n".join(f"- `{tag}`: {meaning}" for tag, meaning in about.items()), 0)
            self._writer.add_custom_scalars(_layout(scores))
        self._write_settings(config, [f"{score}/t2v_R@1" for score in scores])

    def _write_settings(self, config: Config, metrics: list[str]) -> None:
        """The row of the run in the tab HPARAMS: settings that differ from the defaults, and scores by their tag."""
        from torch.utils.tensorboard.summary import hparams

        defaults = flat(asdict(Config()))
        settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flat(asdict(config)).items()
            if key in ALWAYS_LISTED or (value != defaults[key] and key not in ("run_dir", "log.to", "log.project"))
        }
        experiment, session, self._session_end = hparams(settings, dict.fromkeys(metrics, 0.0))
        self._writer.file_writer.add_summary(experiment)
        self._writer.file_writer.add_summary(session)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def histogram(self, tag: str, numbers: Any, step: int) -> None:
        self._writer.add_histogram(tag, numbers, step)

    def image(self, tag: str, picture: Any, step: int) -> None:
        import numpy as np

        self._writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")

    @classmethod
    def write_result(cls, run_dir: Path, values: dict[str, float], step: int) -> None:
        """Write test results by tag, and remove those of an earlier evaluation."""
        from torch.utils.tensorboard import SummaryWriter

        for path in run_dir.glob(f"events.out.tfevents.*{cls.TEST}"):
            path.unlink()
        with SummaryWriter(str(run_dir), filename_suffix=cls.TEST) as writer:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    def close(self, *, complete: bool) -> None:
        if complete:
            self._writer.file_writer.add_summary(self._session_end)
        self._writer.close()


def _move_old_events(run_dir: Path) -> None:
    """Move the event files that version 0.1 wrote to ``tensorboard/``, which TensorBoard shows as a second run."""
    for path in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
        path.rename(run_dir / path.name)
    with contextlib.suppress(OSError):  # it does not exist, or holds other files
        (run_dir / "tensorboard").rmdir()


def _layout(scores: list[str]) -> dict[str, Any]:
    """Charts of the tab CUSTOM SCALARS."""
    recalls = {
        f"{name.removeprefix(SCORES)} {direction}": ["Multiline", [f"{name}/{direction}_R@{k}$" for k in (1, 5, 10)]]
        for name in scores
        for direction in ("t2v", "v2t")
    }
    return {
        "training": {
            "loss": ["Multiline", ["^loss/"]],
            "learning rate": ["Multiline", ["^optim/lr_"]],
            "similarity": ["Multiline", ["^model/positive_similarity", "^model/hardest_negative_similarity"]],
        },
        "recall": recalls,
    }


class WeightsAndBiases(Logger):
    """A run of wandb with a fixed id, which a resumed run continues. ``WANDB_MODE=offline`` works without a network.

    Args:
        run_dir: of the run.
        config: of the run.
        logged: what earlier starts have logged, by step and whether it is a score. It is not logged again: wandb takes
            steps in increasing order only, and the values are the same.

    Raises:
        UserError: wandb refuses to start, for example because nobody is logged in.
    """

    def __init__(self, run_dir: Path, config: Config, logged: set[tuple[int, bool]]) -> None:
        import wandb
        from wandb.errors import AuthenticationError, UsageError

        try:
            self._run: Any = wandb.init(
                project=config.log.project,
                name=run_dir.name,
                id=_run_id(run_dir),
                resume="allow",
                dir=str(run_dir),
                config=flat(asdict(config)),
                allow_val_change=True,
                settings=wandb.Settings(console="off", silent=True),
            )
        except (AuthenticationError, UsageError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"wandb: {reason} (run `wandb login`, or set WANDB_MODE=offline)") from error
        self._wandb, self._logged = wandb, logged

    def scalars(self, values: dict[str, float], step: int) -> None:
        if (step, _has_scores(values)) not in self._logged:
            self._run.log(values, step=step)

    def histogram(self, tag: str, numbers: Any, step: int) -> None:
        self._run.log({tag: self._wandb.Histogram(numbers)}, step=step)

    def image(self, tag: str, picture: Any, step: int) -> None:
        self._run.log({tag: self._wandb.Image(picture)}, step=step)

    def result(self, values: dict[str, float], step: int) -> None:
        self._run.summary.update(values)

    def close(self, *, complete: bool) -> None:
        self._run.finish()


class Trackio(Logger):
    """A run of trackio, in its local database (``TRACKIO_DIR``); a resumed run continues it.

    Args:
        run_dir: of the run.
        config: of the run.
        logged: as for :class:`WeightsAndBiases`.
    """

    def __init__(self, run_dir: Path, config: Config, logged: set[tuple[int, bool]]) -> None:
        import trackio

        self._logged = logged

        self._run: Any = trackio.init(
            project=config.log.project,
            name=f"{run_dir.name}-{_run_id(run_dir)}",
            config=flat(asdict(config)),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        if (step, _has_scores(values)) not in self._logged:
            self._run.log(values, step=step)

    def result(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, *, complete: bool) -> None:
        self._run.finish()


def _run_id(run_dir: Path) -> str:
    """The id by which wandb and trackio know the run; drawn by its first start and kept in ``run-id``."""
    path = run_dir / "run-id"
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not re.fullmatch(r"[0-9a-f]{8}", text):
        text = secrets.token_hex(4)
        write_text(path, text + "\n")
    return text


def open_loggers(config: Config, step: int, about: dict[str, str], *, repeats_validation: bool = False) -> list[Logger]:
    """The metrics file and the loggers of ``log.to``, from ``step`` on.

    Args:
        config: of the run.
        step: from which the run starts or resumes.
        about: meaning of the tags.
        repeats_validation: whether the validation of this step will be repeated.

    Raises:
        UserError: a logger cannot start.
    """
    run_dir = Path(config.run_dir).absolute()
    makers: dict[str, Any] = {
        "tensorboard": lambda: TensorBoard(run_dir, config, step, about),
        "wandb": lambda: WeightsAndBiases(run_dir, config, logged),
        "trackio": lambda: Trackio(run_dir, config, logged),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    logged = {(line["step"], _has_scores(line)) for line in read_metrics(run_dir / METRICS_FILE)}
    file = MetricsFile(run_dir / METRICS_FILE, step, repeats_validation=repeats_validation)
    return [file, *(makers[name]() for name in config.log.to)]


def log_result(config: Config, values: dict[str, float], step: int) -> None:
    """Add test results to the loggers of a run that has ended.

    Args:
        config: of the run.
        values: by tag.
        step: of the checkpoint.
    """
    run_dir = Path(config.run_dir).absolute()
    loggers: list[Logger] = [MetricsFile(run_dir / METRICS_FILE, None)]
    loggers += [WeightsAndBiases(run_dir, config, set())] if "wandb" in config.log.to else []
    loggers += [Trackio(run_dir, config, set())] if "trackio" in config.log.to else []
    for logger in loggers:
        logger.result(values, step)
        logger.close(complete=True)
    if "tensorboard" in config.log.to:
        TensorBoard.write_result(run_dir, values, step)
