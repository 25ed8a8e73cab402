"""Every option of evaluate, in every way to evaluate: it changes the result, or it is refused in one line."""

import argparse
import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run
from tests.stores import V, write_store
from tmass_dist import evaluate
from tmass_dist.config import Config, flat, load_config
from tmass_dist.errors import UserError
from tmass_dist.evaluation.settings import (
    BLOCK_SETTINGS,
    ENCODING_SETTINGS,
    SCORING_SETTINGS,
    check_overrides,
    scoring_overrides,
)

OPTIONS = {
    "run": "RUN",
    "checkpoint": "w.safetensors",
    "features": Path("F"),
    "shard": "0/2",
    "search": 3,
    "compare_exact": True,
    "bank": Path("B"),
    "similarities": Path("s.npy"),
    "truth": Path("t.json"),
    "post_processing": "qbnorm",
    "out": Path("O"),
    "allow_env": True,
}
MODES = ("run", "features", "similarities")

APPLY = {
    "run": {"checkpoint", "features", "search", "bank", "post_processing", "out", "allow_env"},
    "features": {"shard", "search", "bank", "post_processing", "out", "allow_env"},
    "similarities": {"truth", "post_processing", "out"},
}
"""Options that change something where they are the only ones; ``compare_exact`` needs ``search``."""

EXCLUDE = [{"shard", "search"}, {"shard", "bank"}, {"shard", "post_processing"}, {"search", "bank"}]
EXCLUDE += [{"search", "post_processing"}]


def _namespace(names: set[str], overrides: tuple[str, ...] = ()) -> argparse.Namespace:
    values = {name: value if name in names else None for name, value in OPTIONS.items()}
    for flag in ("compare_exact", "allow_env"):
        values[flag] = flag in names
    return argparse.Namespace(**values, overrides=list(overrides))


def _accepted(names: set[str], overrides: tuple[str, ...] = ()) -> bool:
    try:
        evaluate.check_options(_namespace(names, overrides))
    except UserError:
        return False
    return True


def test_this_file_knows_every_option() -> None:
    options = {action.dest for action in evaluate.build_parser()._actions}
    assert options - {"help", "overrides"} == set(OPTIONS)


@pytest.mark.parametrize("mode", MODES)
def test_every_combination_of_up_to_four_options_is_accepted_or_refused_by_rule(mode: str) -> None:
    # --run with --features is the way of --run: it says where to keep the features.
    others = [name for name in OPTIONS if name != mode and (mode, name) != ("features", "run")]
    accepted = 0
    for size in range(4):
        for chosen in map(set, itertools.combinations(others, size)):
            expected = chosen - {"compare_exact"} <= APPLY[mode]
            expected &= "compare_exact" not in chosen or ("search" in chosen and mode != "similarities")
            expected &= not any(pair <= chosen for pair in EXCLUDE)
            assert _accepted({mode} | chosen) == expected, (mode, chosen)
            accepted += expected
    assert accepted > 5
    assert not _accepted(set())


def test_every_setting_of_a_config_applies_or_is_refused() -> None:
    """Every key that exists: those that an evaluation uses are accepted, every other one is named."""
    import dataclasses

    config = load_config("demo.yaml", ["stochastic.prior=normal"])
    for key in flat(dataclasses.asdict(Config())):
        for keys, option in ((SCORING_SETTINGS, "--features"), ((*SCORING_SETTINGS, *ENCODING_SETTINGS), "--run")):
            if key in keys:
                check_overrides([f"{key}=1"], config, keys, option)
            else:
                with pytest.raises(UserError, match=f"{key} does not apply to {option}"):
                    check_overrides([f"{key}=1"], config, keys, option)


def test_settings_that_these_systems_do_not_have_are_refused() -> None:
    for overrides, key in (
        (["model.radius=none"], "seed"),
        (["model.radius=none"], "stochastic.num_trials"),
        (["stochastic.prior=uniform"], "stochastic.prior_std"),
    ):
        config = load_config("demo.yaml", overrides)
        with pytest.raises(UserError, match=f"{key} does not apply"):
            check_overrides([f"{key}=1"], config, SCORING_SETTINGS, "--features")
        assert not any(override.startswith(f"{key}=") for override in scoring_overrides(config))
        check_overrides(scoring_overrides(config), config, SCORING_SETTINGS, "--features")


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        ({"features", "shard"}, "evaluation.post_processing=dsl", "has no report"),
        ({"features", "shard"}, "evaluation.baselines=none", "has no report"),
        ({"features", "search"}, "evaluation.baselines=none", "has no report"),
        ({"features", "post_processing"}, "evaluation.post_processing=dsl", "are one setting"),
        ({"similarities"}, "stochastic.num_trials=3", "does not apply to --similarities"),
        ({"run", "similarities"}, "", "--similarities does not apply to --run"),
    ],
)
def test_overrides_that_do_not_go_with_an_option_are_refused(names: set[str], overrides: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.check_options(_namespace(names, (overrides,) if overrides else ()))


def _evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "tmass_dist.evaluate", *arguments)


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("features"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.num_frames=8"], "model.num_frames is 8"),
        (["stochastic.num_trials=0"], "at least one sample"),
        (["optim.lr=1"], "optim.lr does not apply to --features"),
        (["data.test=elsewhere"], "data.test does not apply to --features"),
        (["evaluation.selected_on=test"], "evaluation.selected_on does not apply"),
        (["evaluation.precision=bfloat16", "evaluation.protocol=published_code"], "support float32 only"),
        (["--shard", "3/3"], "--shard 3/3 is no share"),
        (["--post-processing", "qbnorm"], "give --bank"),
        (["--bank", "nowhere"], "--bank is used by --post-processing qbnorm only"),
        (["--search", "0"], "at least one candidate"),
        (["--search", "3", "evaluation.protocol=published_code"], "--search has no post-processing and no published"),
        (["--truth", "t.json"], "--truth does not apply to --features"),
        (["--checkpoint", "w"], "--checkpoint does not apply to --features"),
        (["--compare-exact"], "give both"),
        (["evaluation.baselines=all"], "no scores before training"),
    ],
)
def test_requests_that_cannot_be_met_are_one_line(made: Path, tmp_path: Path, more: list[str], message: str) -> None:
    assert message in _one_line(_evaluate("--features", str(made), "--out", str(tmp_path), *more))
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "override",
    [
        "seed=5",
        "model.pooled_by=sample",
        "stochastic.prior=uniform",
        "stochastic.num_trials=3",
        "evaluation.protocol=published_code",
        "evaluation.precision=bfloat16",
        "evaluation.post_processing=dsl",
        "evaluation.baselines=none",
    ],
)
def test_every_scoring_setting_changes_the_result_of_a_second_evaluation(
    made: Path, tmp_path: Path, override: str
) -> None:
    overrides = []
    if override.startswith("evaluation.baselines"):
        overrides = ["stochastic.num_trials=3"]
    command = ["--features", str(made), "--out", str(tmp_path)]
    assert _evaluate(*command, *overrides).returncode == 0
    first = json.loads((tmp_path / "metrics.json").read_text())
    scores = {path.parent.name for path in tmp_path.rglob("rows-*.safetensors")}
    done = _evaluate(*command, *overrides, override)
    assert done.returncode == 0, done.stderr
    second = json.loads((tmp_path / "metrics.json").read_text())
    key, _, value = override.partition("=")
    if key not in BLOCK_SETTINGS:
        assert second != first
    assert (key in BLOCK_SETTINGS) == ({path.parent.name for path in tmp_path.rglob("rows-*.safetensors")} != scores)
    for name in ("protocol", "post_processing", "num_trials", "precision"):
        if key.endswith(f".{name}"):
            assert str(second[name]) == value and value in done.stdout
    # And back: the settings of one call do not stick.
    assert _evaluate(*command, *overrides).returncode == 0
    assert json.loads((tmp_path / "metrics.json").read_text()) == first


def test_a_matrix_takes_its_own_options_only(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.eye(4, dtype=np.float32))
    command = ["--similarities", str(tmp_path / "s.npy")]
    assert "--search does not apply" in _one_line(_evaluate(*command, "--search", "3"))
    assert "seed=1 does not apply" in _one_line(_evaluate(*command, "seed=1"))
    assert "features of training queries" in _one_line(_evaluate(*command, "--post-processing", "qbnorm"))


def test_the_fixture_has_every_video(made: Path) -> None:
    assert len(json.loads((made / "index.json").read_text())["video_ids"]) == V
