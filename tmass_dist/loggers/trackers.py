"""wandb and trackio, whose runs a resumed run continues."""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tmass_dist.cli import write_text
from tmass_dist.config import Config, flat
from tmass_dist.errors import UserError
from tmass_dist.loggers.base import Logger, has_scores


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
        if (step, has_scores(values)) not in self._logged:
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
        if (step, has_scores(values)) not in self._logged:
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
