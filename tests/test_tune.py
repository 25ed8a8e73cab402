"""``--tune``: the driver and a trial are killed, and no trial is lost or doubled; a bad spec is one line."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from launch.space import Dimension, parse_space
from launch.tune import JOURNAL, _cut_incomplete_line, import_optuna
from tests.conftest import ROOT, run
from tests.processes import until
from tmass_dist.cli import read_json
from tmass_dist.errors import UserError
from tmass_dist.loggers import read_metrics

SPACE = ["optim.lr=log:1e-5..1e-3", "stochastic.support_weight=0..1"]
LONG = ["max_steps=30", "eval_every=15"]
"""So that a trial is not over while a test looks at it."""
SHORT = ["max_steps=6", "eval_every=3", "log_every=1", "eval_at_start=false"]


def _command(base: Path, data: list[str], *more: str) -> list[str]:
    options = ["--cluster", "local", "--procs", "1", "--config", "demo.yaml", "--tune", *SPACE]
    return ["launch/submit.py", *options, *more, *data, *SHORT, f"run_dir={base}"]


def _trials(base: Path) -> list:
    optuna = import_optuna()
    backend = optuna.storages.journal.JournalFileBackend(str(base / JOURNAL))
    return optuna.load_study(study_name="tune", storage=optuna.storages.JournalStorage(backend)).trials


def test_killed_driver_and_killed_trial_lose_and_double_nothing(data: list[str], tmp_path: Path) -> None:
    base, log = tmp_path / "study", tmp_path / "log"
    command = [sys.executable, *_command(base, data, "--trials", "3", "--parallel", "2"), *LONG]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    driver = start()
    until(lambda: read_metrics(base / "trial-0000" / "metrics.jsonl"), f"first step; see {log}", 400)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {trial.number: trial.params for trial in _trials(base)}
    assert len(before) == 2

    driver = start()  # at once: the trials of the first driver may still be saving
    holder = base / "trial-0002" / "lock.json"
    until(lambda: read_json(holder, dict), f"start of the third trial; see {log}", 400)
    os.kill(json.loads(holder.read_text())["process"], signal.SIGKILL)  # long before its first step
    assert driver.wait(timeout=400) == 0, log.read_text()

    trials = _trials(base)
    assert [(trial.number, trial.state.name) for trial in trials] == [(n, "COMPLETE") for n in range(3)]
    assert all(trials[number].params == params for number, params in before.items())
    assert len({trial.params["optim.lr"] for trial in trials}) == 3
    assert trials[2].user_attrs["starts"] == 2 and trials[2].user_attrs["failures"] == 1
    for trial in trials:
        run_dir = base / f"trial-{trial.number:04d}"
        steps = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss/total" in line]
        assert steps == list(range(1, 31))
        history = json.loads((run_dir / "checkpoints" / "validation.json").read_text())
        assert trial.intermediate_values == {point["step"]: point["R@1"] for point in history}
        assert trial.value == max(point["R@1"] for point in history)
        assert not (run_dir / "evaluation").exists()  # no trial is scored on the test split

    again = run(*command[1:])
    assert again.returncode == 0 and len(_trials(base)) == 3, again.stderr
    best = max(trials, key=lambda trial: trial.value)
    assert f"python -m tmass_dist.evaluate --run {base}/trial-{best.number:04d}" in again.stdout
    for more, line in (
        (["optim.weight_decay=0.1"], "has other settings (optim.weight_decay: saved 0.2, given 0.1)"),
        (["--tune", "optim.lr=log:1e-5..1e-2"], "searches optim.lr=log:1e-5..1e-3 stochastic.support_weight=0..1"),
    ):
        refused = run(*command[1:], *more)
        assert refused.returncode == 2 and line in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_second_driver_is_refused(data: list[str], tmp_path: Path) -> None:
    with FileLock(tmp_path / "study.lock"):
        second = run(*_command(tmp_path, data, "--trials", "3"))
    assert second.returncode == 2 and f"another driver works on the study in {tmp_path}" in second.stderr
    assert not (tmp_path / JOURNAL).exists()


def test_a_trial_below_the_median_is_pruned_and_keeps_its_directory(data: list[str], tmp_path: Path) -> None:
    optuna = import_optuna()
    base = tmp_path / "study"
    base.mkdir()
    backend = optuna.storages.journal.JournalFileBackend(str(base / JOURNAL))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(storage=storage, study_name="tune", direction="maximize")
    for _ in range(5):  # earlier trials that no trial of the demo can equal
        trial = study.ask()
        for dimension in (Dimension("optim.lr", 1e-5, 1e-3, True), Dimension("stochastic.support_weight", 0.0, 1.0)):
            dimension.suggest(trial)
        trial.report(100.0, 3)
        study.tell(trial, 100.0)
    done = run(*_command(base, data, "--trials", "6", "--prune"), "max_steps=3000")
    assert done.returncode == 0, done.stdout + done.stderr
    trial = _trials(base)[5]
    assert trial.state.name == "PRUNED" and "trial 5 pruned" in done.stdout
    labels = "(protocol query_conditioned, M = 20, checkpoint selected on val, post-processing none, precision float32"
    shown = re.findall(r"^(?:trial 5 pruned: t2v R@1 |  100\.0  trial-).*", done.stdout, re.MULTILINE)
    assert len(shown) == 6 and all(labels in line for line in shown)
    run_dir = base / "trial-0005"
    assert list((run_dir / "checkpoints").glob("step-*")) and not (run_dir / "complete.json").exists()
    assert "best trial: " in done.stdout and "trial-0005" not in done.stdout.split("best trial: ")[1].splitlines()[0]


BAD_SPECS = {
    "optim.lr": "write KEY=LOW..HIGH",
    "optim.lr=1e-5": "fewer than two values",
    "optim.lr=2..1": "the range is empty",
    "optim.lr=1..1": "the range is empty",
    "optim.lr=log:0..1": "begins above 0",
    "optim.lr=log:a..b": "with numbers",
    "optim.lr=log:1,2": "with numbers",
    "optim.lrr=0..1": "did you mean optim.lr",
    "optim.ema=0..1": "optim.ema is 1.0: it must be in",
    "model.radius=0..1": "is no number",
    "model.radius=linear,exponential": "model.radius",
    "stochastic.samples=1..2.5": "is a whole number",
    "run_dir=a,b": "must be the same for all trials",
    "seed=1,2": "seed is also given as seed=",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_spec_that_makes_no_sense_is_one_line(spec: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_space([spec], "demo.yaml", ["seed=7"])
    text = str(caught.value)
    assert text.startswith(f"--tune {spec}: ") and BAD_SPECS[spec] in text and "\n" not in text


def test_kinds_of_ranges() -> None:
    specs = [
        "optim.lr=log:1e-6..1e-4",
        "stochastic.samples=1..4",
        "optim.warmup=0..0.5",
        "model.radius=linear,exp_mean",
    ]
    lr, samples, warmup, radius = parse_space([*specs, "max_steps=10..20"], "demo.yaml", [])[:4]
    assert (lr.low, lr.high, lr.log) == (1e-6, 1e-4, True)
    assert (samples.low, samples.high) == (1, 4) and isinstance(samples.low, int)
    assert (warmup.low, warmup.high) == (0.0, 0.5) and isinstance(warmup.low, float)
    assert radius.choices == ("linear", "exp_mean")
    with pytest.raises(UserError, match=r"optim\.lr appears twice"):
        parse_space([specs[0], specs[0]], "demo.yaml", [])


OPTIONS = {
    "--trials 3": "--trials is for --tune",
    "--prune": "--prune is for --tune",
    "--parallel 2": "--parallel is for --tune",
    "--tune optim.lr=0..1": "--tune needs --trials N",
    "--tune optim.lr=0..1 --trials 0": "--trials is 0; at least 1",
    "--tune optim.lr=0..1 --trials 2 --parallel 0": "--parallel is 0; at least 1",
    "--tune optim.lr=0..1 --trials 2 --sweep seed=1,2": "--sweep is not for --tune",
    "--tune optim.lr=0..1 --trials 2 --dry-run": "--dry-run is not for --tune",
    "--tune optim.lr=0..1 --trials 2 --job evaluate": "--tune is for --job train",
    "--train-only --job evaluate": "--train-only is for --job train",
    "--tune optim.lr=1e-4 seed=1 --trials 2": "--tune optim.lr=1e-4 seed=1: no setting has several values",
    "--sweep run_dir=runs/x": "--sweep run_dir=runs/x: no setting has several values",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_do_not_go_together_are_one_line(options: str) -> None:
    done = run("launch/submit.py", "--cluster", "local", "--config", "demo.yaml", *options.split())
    assert done.returncode == 2 and OPTIONS[options] in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_search_on_the_test_split_is_refused(data: list[str], tmp_path: Path) -> None:
    done = run(*_command(tmp_path, data, "--trials", "2"), "evaluation.selected_on=test")
    assert done.returncode == 2 and "--tune chooses by validation" in done.stderr


def test_a_missing_optuna_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'tmass-dist\[tune\]'"):
        import_optuna()


def test_trials_that_all_fail_end_the_search(data: list[str], tmp_path: Path) -> None:
    """A value that each end of the range allows, and that no run does: one frame more than the shards have."""
    specs = ["--tune", "model.num_frames=13,14", "--trials", "9"]
    options = ["--cluster", "local", "--procs", "1", "--config", "demo.yaml", *specs]
    done = run("launch/submit.py", *options, *data, *SHORT, f"run_dir={tmp_path / 'study'}")
    assert done.returncode == 2 and "the first 3 trials failed" in done.stderr.splitlines()[-1]
    assert "hold 12 frames" in done.stderr
    assert [trial.state.name for trial in _trials(tmp_path / "study")] == ["FAIL"] * 3


@pytest.mark.parametrize("torn", ['{"op_code": 5, "tri', "x"])
def test_a_half_written_line_of_the_journal_is_cut(tmp_path: Path, torn: str) -> None:
    journal = tmp_path / JOURNAL
    _cut_incomplete_line(journal)
    assert not journal.exists()
    journal.write_text('{"op_code": 0}\n' + torn)
    _cut_incomplete_line(journal)
    assert journal.read_text() == '{"op_code": 0}\n'
    journal.write_text(torn)
    _cut_incomplete_line(journal)
    assert journal.read_text() == ""


def test_the_driver_takes_no_run_for_a_study(data: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    done = run(*_command(tmp_path, data, "--trials", "2"))
    assert done.returncode == 2 and "is the directory of a run" in done.stderr
