"""Every command: ``--help`` imports nothing heavy, and a user error is one line without a traceback."""

import logging
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conftest import run
from tmass_dist.__main__ import COMMANDS
from tmass_dist.cli import run_command
from tmass_dist.errors import UserError

OF_TMASS = [
    module if module.startswith("tmass_dist.") else module.replace(".", "/") + ".py" for module, _ in COMMANDS.values()
]
ENTRY_POINTS = [*OF_TMASS, "shards/demo_data.py", "shards/demo_towers.py"]
HEAVY = {"torch", "deepspeed", "open_clip", "webdataset", "tensorboard", "av", "usearch", "starlette", "transformers"}


def _help(code: str, *arguments: str) -> str:
    """What ``code`` prints for ``--help`` in a fresh interpreter, which imports none of ``HEAVY``."""
    # Importing torch and the like is what makes --help slow. The imports are tested; a time limit would be flaky.
    whole = (
        f"import sys, runpy\nsys.argv = [*sys.argv[1:], '--help']\ntry:\n    {code}\n"
        "except SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
        f"heavy = {HEAVY} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = run("-c", whole, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_help_imports_nothing_heavy(entry: str) -> None:
    runner = "run_path" if "/" in entry else "run_module"
    printed = _help(f"runpy.{runner}(sys.argv[0], run_name='__main__')", entry)
    usual = f"python {entry}" if "/" in entry else f"python -m {entry}"
    assert f"usage: {usual} " in " ".join(printed.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_tmass_runs_every_command(name: str) -> None:
    assert _help("import tmass_dist.__main__ as t; t.main()", "tmass", name).startswith(f"usage: tmass {name} ")


def test_tmass_help_lists_every_command_and_imports_none() -> None:
    printed = run("-c", "import sys, tmass_dist.__main__ as t; t.main(); print(sorted(sys.modules))", "--help").stdout
    for name, (module, description) in COMMANDS.items():
        assert f"  {name} " in printed and description in printed and f"'{module}'" not in printed


def test_tmass_names_the_nearest_command() -> None:
    assert "did you mean submit?" in _fails_in_one_line(run("-m", "tmass_dist", "submt"))


def test_config_lists_settings_or_the_one_that_is_named() -> None:
    everything = run("-m", "tmass_dist", "config").stdout
    for line in (
        "optim.lr=3e-05    (float)",
        "data.val=data/val    (str or null)",
        "prior=uniform    (uniform or normal)",
    ):
        assert line in everything
    one = run("-m", "tmass_dist", "config", "data.batch_size").stdout
    assert one.startswith("data.batch_size=32    (int)\n    (video, caption) pairs") and one.count("=") == 1
    assert "did you mean data.batch_size?" in _fails_in_one_line(run("-m", "tmass_dist", "config", "batch_siz"))


def test_every_setting_has_a_meaning() -> None:
    from tmass_dist.config import Config, flat
    from tmass_dist.settings import all_settings

    settings = list(all_settings())
    assert [setting.key for setting in settings] == list(flat(asdict(Config())))
    assert all(len(setting.meaning) > 10 for setting in settings)


def _fails_in_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "did you mean optim.lr"),
        ("optim.max_steps=6", "unknown config key optim.max_steps; did you mean max_steps?"),
        ("data.batch_size=1", "data.batch_size is 1"),
        ("stochastic.num_trials=0", "at least one sample"),
        ("data.train=/nowhere/shards", "/nowhere/shards"),
        ("optim.lr=fast", "fast"),
        ("model.radius=round", "round"),
        ("model={radius: linear, radius_start: falling}", "it applies to exp_linear"),
        ("model={pooling: best_frame, num_heads: 2}", "model.pooling=best_frame has no attention heads"),
        ("model.pooling=late_interaction", "its tokens have no text mass; set model.radius=none"),
        ("model={radius: none, mass_score: expected}", "model.radius=none has no mass"),
        ("model={radius: linear, mass_score: temperature}", "model.radius=linear may be negative"),
    ],
)
def test_bad_setting_is_one_line(override: str, said: str) -> None:
    assert said in _fails_in_one_line(run("-m", "tmass_dist.train", "--config", "demo.yaml", override))


def test_late_interaction_has_no_published_protocol() -> None:
    overrides = ["model={pooling: late_interaction, radius: none}", "evaluation.protocol=published_code"]
    said = _fails_in_one_line(run("-m", "tmass_dist.train", "--config", "demo.yaml", *overrides))
    assert "evaluation.protocol is 'published_code'" in said and "late_interaction does not pool" in said


def test_missing_config_lists_what_is_there() -> None:
    assert "msrvtt.yaml" in _fails_in_one_line(run("-m", "tmass_dist.train", "--config", "vatx.yaml"))


def test_partly_set_environment_names_the_missing_variable() -> None:
    said = _fails_in_one_line(run("-m", "tmass_dist.train", "--config", "demo.yaml", RANK="0", WORLD_SIZE="2"))
    assert "MASTER_ADDR" in said and "LOCAL_RANK" in said


def test_status_and_cancel_name_what_is_no_run(tmp_path: Path) -> None:
    assert "not a run directory" in _fails_in_one_line(run("launch/status.py", str(tmp_path)))
    assert "no SLURM job" in _fails_in_one_line(run("launch/cancel.py", str(tmp_path)))


def _exit_code_of(error: Exception) -> object:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(command)
    return stop.value.code


def test_only_a_user_error_is_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code_of(UserError("set it")) == 2
    assert capsys.readouterr().err == "error: set it\n"
    for error in (ValueError("of a library"), OSError(116, "Stale file handle"), FileNotFoundError(2, "gone", "/x/y")):
        assert _exit_code_of(error) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback") and lines[-1].startswith(f"error: {type(error).__name__}: ")


def test_a_file_named_on_the_command_line_is_the_users(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["command", "key=/x/y"])
    assert _exit_code_of(FileNotFoundError(2, "No such file", "/x/y")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_with_a_log_the_traceback_goes_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("tmass_dist").addHandler(handler)
    try:
        assert _exit_code_of(RuntimeError("broken")) == 1
    finally:
        logging.getLogger("tmass_dist").removeHandler(handler)
    assert capsys.readouterr().err.splitlines() == [f"error: RuntimeError: broken (traceback in {tmp_path / 'log'})"]
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_log_that_cannot_be_opened_leaves_the_traceback_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logging.FileHandler(tmp_path, delay=True)  # a directory
    logging.getLogger("tmass_dist").addHandler(handler)
    try:
        assert _exit_code_of(RuntimeError("broken")) == 1
    finally:
        logging.getLogger("tmass_dist").removeHandler(handler)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "error: RuntimeError: broken"


def test_an_error_starts_a_line_of_its_own_below_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    bar = tqdm(total=3)
    assert _exit_code_of(UserError("set it")) == 2
    bar.close()
    assert "\nerror: set it\n" in capsys.readouterr().err


def test_towers_import_no_logger() -> None:
    """timm would import wandb, which leaves directories in /tmp when a rank ends at once."""
    code = "import sys; from tmass_dist.models.library import open_clip; open_clip(); print('wandb' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"
