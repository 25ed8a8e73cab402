"""TensorBoard."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tmass_dist.config import Config, flat, to_yaml
from tmass_dist.loggers.base import Logger
from tmass_dist.score_labels import SCORES, score_prefix, scoring_labels

ALWAYS_LISTED = (
    "seed",
    "evaluation.selected_on",
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
        split, labels = config.evaluation.selected_on, scoring_labels(config, None)
        scores = [score_prefix(split, labels), score_prefix("test", {**labels, "selected_on": split})]
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
