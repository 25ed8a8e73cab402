"""Where the curves of a run go: ``metrics.jsonl`` always, and the loggers of ``log.to``. Only rank 0 opens them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tmass_dist.config import Config
from tmass_dist.errors import UserError
from tmass_dist.loggers.base import Logger, has_scores
from tmass_dist.loggers.metrics_file import METRICS_FILE, MetricsFile, read_metrics
from tmass_dist.loggers.tensorboard import TensorBoard
from tmass_dist.loggers.trackers import Trackio, WeightsAndBiases

__all__ = [
    "METRICS_FILE",
    "Logger",
    "MetricsFile",
    "check_loggers",
    "log_result",
    "open_loggers",
    "read_metrics",
]


def check_loggers(config: Config) -> None:
    """Check that the packages of ``log.to`` are installed.

    Raises:
        UserError: one is missing; its extra is named.
    """
    for name in config.log.to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.to has {name}, which is not installed: pip install 'tmass-dist[{name}]'")


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
    logged = {(line["step"], has_scores(line)) for line in read_metrics(run_dir / METRICS_FILE)}
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
