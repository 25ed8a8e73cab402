"""``--tune``: search for settings by Optuna. Each trial is an ordinary run in a directory of its own.

The driver is this process. It holds no state: the study is in ``study.journal`` of the study's directory, and each
trial's progress in its run directory. When the driver is started again it finds the trials that were running, and
resumes them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from launch.options import forwarded_options
from launch.resources import Resources, local_gpus
from launch.space import Dimension, as_overrides, describe_space
from launch.trial_run import TrialRun
from tmass_dist.cli import read_json, writable_dir
from tmass_dist.config import Config, differing_keys, load_config, make_config, to_yaml
from tmass_dist.errors import UserError
from tmass_dist.score_labels import LABELS, label_words, scoring_labels

JOURNAL = "study.journal"
POLL_S = {"local": 0.5, "slurm": 5.0}
"""Seconds between two looks at the trials."""
ADOPT_S = 5.0
"""Seconds in which a submission that a killed driver had begun may still appear in SLURM's queue."""
FIRST_FAILURES = 3
"""The search ends if so many trials have failed before any was complete."""


def import_optuna() -> Any:
    """Optuna.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("--tune needs optuna: pip install 'tmass-dist[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@dataclass
class Running:
    """A trial that is not finished.

    Args:
        trial: Optuna's.
        run: its run.
    """

    trial: Any
    run: TrialRun
    starts: int = 0
    not_before_s: float = 0.0
    """Not started earlier, by the monotonic clock."""
    reported: set[int] = field(default_factory=set)
    """Steps whose validation Optuna knows."""
    is_hopeless: bool = False
    """Whether the pruner asked to stop it."""


class Tuner:
    """The driver of a study.

    Args:
        arguments: of ``launch/submit.py``.
        page: config file of the trials.
        overrides: of all trials.
        config: of the trials, apart from what is searched; its ``run_dir`` is the directory of the study.
        resources: of one trial.
        space: the settings to search.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        page: str,
        overrides: list[str],
        config: Config,
        resources: Resources,
        space: list[Dimension],
    ) -> None:
        if config.evaluation.selected_on != "val":
            raise UserError("--tune chooses by validation, and evaluation.selected_on is test")
        self.optuna = import_optuna()
        self.arguments, self.page, self.config, self.resources = arguments, page, config, resources
        self.overrides = [override for override in overrides if not override.startswith("run_dir=")]
        self.base, self.space = Path(config.run_dir), space
        self.is_local = resources.cluster == "local"
        if (self.base / "config.yaml").is_file():
            raise UserError(f"{self.base} is the directory of a run; give the study another one: run_dir=...")
        if self.is_local and resources.gpus * arguments.parallel > len(local_gpus()):
            raise UserError(
                f"--parallel {arguments.parallel} trials of {resources.gpus} GPUs need "
                f"{resources.gpus * arguments.parallel}, and this machine has {len(local_gpus())}"
            )
        self.running: list[Running] = []
        self._received: list[int] = []

    def run(self) -> None:
        """Search until the study has ``--trials`` trials, then print the best one.

        Raises:
            UserError: another driver works on the study, the study was made with other settings, or trials fail.
        """
        from filelock import FileLock, Timeout

        writable_dir(self.base)
        try:
            lock = FileLock(self.base / "study.lock")
            lock.acquire(timeout=2)
        except Timeout:
            raise UserError(f"another driver works on the study in {self.base}") from None
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._open()
            print(f"study in {self.base}: {len(self.study.trials)} of {self.arguments.trials} trials so far")
            print(describe_space(self.config, self.space, self.arguments.tune), flush=True)
            while not self._received:
                self._fill()
                if not self.running:
                    break
                time.sleep(POLL_S[self.resources.cluster])
                for running in list(self.running):
                    self._look_at(running)
        finally:
            self._leave()
            lock.release()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._received:
            print("the search is stopped; the same command continues it", file=sys.stderr)
            raise SystemExit(128 + self._received[0])
        self._show_result()

    def _receive(self, number: int, _: Any) -> None:
        self._received.append(number)

    def _open(self) -> None:
        """Open or create the study, and take up the trials that were running."""
        journal = self.base / JOURNAL
        _cut_incomplete_line(journal)
        backend = self.optuna.storages.journal.JournalFileBackend(
            str(journal), lock_obj=self.optuna.storages.journal.JournalFileOpenLock(str(journal))
        )
        pruner = self.optuna.pruners.MedianPruner() if self.arguments.prune else self.optuna.pruners.NopPruner()
        self.study = self.optuna.create_study(
            storage=self.optuna.storages.JournalStorage(backend),
            study_name="tune",
            direction="maximize",
            load_if_exists=True,
            pruner=pruner,
        )
        known = self.study.user_attrs
        if "space" not in known:
            self.study.set_user_attr("config", to_yaml(self.config))
            self.study.set_user_attr("space", sorted(self.arguments.tune))
        elif known["space"] != sorted(self.arguments.tune):
            raise UserError(
                f"the study in {self.base} searches {' '.join(known['space'])}; give the same, or another run_dir"
            )
        elif differing := differing_keys(make_config(_yaml(known["config"])), self.config):
            raise UserError(
                f"the study in {self.base} has other settings ({'; '.join(differing)}); give the same, or another "
                "run_dir"
            )
        for frozen in self.study.trials:
            if frozen.state == self.optuna.trial.TrialState.RUNNING:
                self._take_up(self.optuna.trial.Trial(self.study, frozen._trial_id))

    def _fill(self) -> None:
        """Start trials while places are free."""
        while (
            len(self.running) < self.arguments.parallel
            and len(self.study.trials) < self.arguments.trials
            and not self._received
        ):
            number = len(self.study.trials)
            # A seed for each trial: with one for the study, a driver that is started again would draw the same values.
            sampler = self.optuna.samplers.TPESampler(seed=self.config.seed * 100_003 + number, constant_liar=True)
            self.study.sampler = sampler
            self._take_up(self.study.ask())

    def _take_up(self, trial: Any) -> None:
        """Draw what the trial has not drawn yet, and start it unless it runs already."""
        for dimension in self.space:
            dimension.suggest(trial)
        frozen = _frozen(trial)
        slot = min(set(range(len(self.running) + 1)) - {running.run.slot for running in self.running})
        name = f"tune-{sha256(str(self.base).encode()).hexdigest()[:8]}-{trial.number}"
        run = TrialRun(self.base / f"trial-{trial.number:04d}", slot, self.resources, name)
        running = Running(trial, run)
        running.starts = int(frozen.user_attrs.get("starts", 0))
        if running.starts and not self.is_local:
            running.not_before_s = time.monotonic() + ADOPT_S
        running.reported = set(frozen.intermediate_values)
        try:
            load_config(self.page, self._overrides_of(running))
        except UserError as error:
            self._fail(running, str(error))
            return
        self.running.append(running)

    def _overrides_of(self, running: Running) -> list[str]:
        return [*self.overrides, *as_overrides(running.trial.params), f"run_dir={running.run.run_dir}"]

    def _look_at(self, running: Running) -> None:
        """Report new validations; finish the trial if it has ended, prune it if it is hopeless, start it if need be."""
        run = running.run
        is_complete = run.is_complete()  # before the validations are read
        scores = self._report(running)
        if is_complete and scores:
            run.end_process()
            self._tell(running, max(scores.values()))
        elif "pruned" in _frozen(running.trial).user_attrs or running.is_hopeless:
            running.trial.set_user_attr("pruned", max(scores, default=0))  # known before the run is stopped
            run.stop()
            if not run.is_alive(was_started=running.starts > 0):
                self._tell(running, None, self.optuna.trial.TrialState.PRUNED)
        elif not run.is_alive(was_started=running.starts > 0):
            if reason := self._failure(running):
                self._fail(running, reason)
            elif time.monotonic() >= running.not_before_s:
                self._start(running)

    def _report(self, running: Running) -> dict[int, float]:
        """The score at each validation: R@1, averaged over ``evaluation.window`` validations as the run itself does."""
        from tmass_dist.training.validation import window_means

        points = read_json(running.run.run_dir / "checkpoints" / "validation.json", list) or []
        means = window_means([point["R@1"] for point in points], self.config.evaluation.window)
        scores = {point["step"]: mean for point, mean in zip(points, means)}
        for step, score in scores.items():
            if step not in running.reported:
                running.trial.report(score, step)
                running.reported.add(step)
                # After each report: Optuna compares the last step only, and two validations may have passed in between.
                running.is_hopeless |= self.arguments.prune and running.trial.should_prune()
        return scores

    def _failure(self, running: Running) -> str | None:
        """Why the trial, whose run has ended without being complete, has failed for good; None: it is started again."""
        run = running.run
        reason = run.final_error()
        if reason is None and run.has_failed():
            failures = int(_frozen(running.trial).user_attrs.get("failures", 0)) + 1
            running.trial.set_user_attr("failures", failures)
            if failures > self.resources.requeues:
                reason = f"it failed {failures} times, at last with: {run.last_line()}"
        run.process = None
        return reason

    def _start(self, running: Running) -> None:
        """Submit the trial, or resume it."""
        running.starts += 1
        running.trial.set_user_attr("starts", running.starts)
        options = [*forwarded_options(self.arguments), "--train-only"]
        running.run.start(["--config", self.page, *options, *self._overrides_of(running)])
        verb = "started" if running.starts == 1 else "resumed"
        print(f"trial {running.trial.number} {verb}: {' '.join(as_overrides(running.trial.params))}", flush=True)

    def _tell(self, running: Running, value: float | None, state: Any = None) -> None:
        self.study.tell(running.trial, value, state=state)
        if running in self.running:
            self.running.remove(running)
        best = max((scores for scores in _frozen(running.trial).intermediate_values.values()), default=float("nan"))
        words = "complete" if state is None else state.name.lower()
        labels = ", ".join(label_words(self._labels_of(running.run.run_dir)))
        print(f"trial {running.trial.number} {words}: t2v R@1 {best:.1f} ({labels})", flush=True)

    def _labels_of(self, run_dir: Path) -> dict[str, Any]:
        """Labels of a trial's validations; the tau is that of its selected checkpoint."""
        labels = {"selected_on": self.config.evaluation.selected_on, **scoring_labels(self.config, None)}
        best = read_json(run_dir / "checkpoints" / "best.json", dict) or {}
        return labels | {key: best[key] for key in LABELS if key in best}

    def _fail(self, running: Running, reason: str) -> None:
        running.trial.set_user_attr("failure", reason)
        self.study.tell(running.trial, state=self.optuna.trial.TrialState.FAIL)
        if running in self.running:
            self.running.remove(running)
        print(f"trial {running.trial.number} failed: {reason}", file=sys.stderr, flush=True)
        states = [trial.state.name for trial in self.study.trials]
        if states.count("FAIL") >= FIRST_FAILURES and not {"COMPLETE", "PRUNED"} & {*states}:
            raise UserError(f"the first {states.count('FAIL')} trials failed, the last because: {reason}")

    def _leave(self) -> None:
        """Local runs save and end with the driver; SLURM jobs go on."""
        for running in self.running:
            running.run.terminate()
        for running in self.running:
            if running.run.process is not None and self.is_local:
                running.run.process.wait()

    def _show_result(self) -> None:
        complete = self.optuna.trial.TrialState.COMPLETE
        trials = sorted(self.study.get_trials(states=(complete,)), key=lambda trial: -trial.value)
        counts = {state.name.lower(): 0 for state in self.optuna.trial.TrialState}
        for trial in self.study.trials:
            counts[trial.state.name.lower()] += 1
        counted = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        print(f"\n{len(self.study.trials)} trials: {counted}")
        if not trials:
            raise UserError(f"no trial of the study in {self.base} is complete")
        print("best by validation (t2v R@1):")
        for trial in trials[:5]:
            name = f"trial-{trial.number:04d}"
            labels = ", ".join(label_words(self._labels_of(self.base / name)))
            print(f"  {trial.value:5.1f}  {name}  {' '.join(as_overrides(trial.params))}  ({labels})")
        best = self.base / f"trial-{trials[0].number:04d}"
        print(f"\nbest trial: {best}")
        print(f"evaluate it on the test split: python -m tmass_dist.evaluate --run {best}")
        print(f"compare all: python launch/compare.py {self.base}", flush=True)


def _frozen(trial: Any) -> Any:
    """What the storage knows of a trial."""
    return trial.storage.get_trial(trial._trial_id)


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _cut_incomplete_line(journal: Path) -> None:
    """A machine that lost its power may have left half a line, after which Optuna could not append."""
    if not journal.is_file():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)
