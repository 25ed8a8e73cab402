"""``init_from``: the weights of a run, an export or a converted checkpoint, part by part, the same on every rank."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import run
from tests.ranks import on_ranks
from tests.small_model import config_of, small_objective
from tests.test_evaluate_run import make_run
from tmass_dist import TMass
from tmass_dist.config import load_config
from tmass_dist.errors import UserError
from tmass_dist.models.tmass import RetrievalModel, build_model
from tmass_dist.models.warm_start import start_from


@pytest.fixture(scope="module")
def source(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(data, tmp_path_factory.mktemp("source") / "run")


def _started(path: Path, *overrides: str) -> tuple[RetrievalModel, RetrievalModel, str]:
    """A model that starts from ``path``, the same without ``init_from``, and the line that is logged."""
    config = load_config("demo.yaml", [f"init_from={path}", *overrides])
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(build_model(config.model, without_weights=True))
    return models[0], models[1], start_from(models[0], config)


def _equal(model: RetrievalModel, weights: dict[str, torch.Tensor], prefix: str) -> bool:
    own = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    return bool(own) and all(torch.equal(value, weights[name]) for name, value in own.items())


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "run": lambda source, _: source,
    "weights file": lambda source, _: source / "checkpoints" / "best.safetensors",
    "export": lambda source, out: _exported(source, out),
    "converted checkpoint": lambda source, out: _converted(source, out),
}


def _exported(source: Path, out: Path) -> Path:
    TMass.of_run(source).save_pretrained(out)
    return out


def _converted(source: Path, out: Path) -> Path:
    theirs = out.with_suffix(".pth")
    for command in (["--back", str(source / "checkpoints/best.safetensors"), str(theirs)], [str(theirs), str(out)]):
        more = [] if command[0] == "--back" else ["--config", "demo.yaml"]
        done = run("-m", "tmass_dist.convert", *command, *more)
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("form", FORMS)
def test_towers_and_head_are_those_of_the_source(source: Path, tmp_path: Path, form: str) -> None:
    path = FORMS[form](source, tmp_path / "out")
    weights = load_file(source / "checkpoints" / "best.safetensors")
    model, _, line = _started(path)
    assert _equal(model, weights, "") and "fresh" not in line
    assert line.startswith(f"init_from={path}: towers, head.pooling, head.mass loaded from ")


OTHER_HEADS = {
    "frames": (["model.num_frames=6"], "head.mass", "model.num_frames is 12 there and 6 here", "head.pooling"),
    "radius": (
        ["model.radius=linear"],
        "head.mass",
        "model.radius is exp_linear there and linear here",
        "head.pooling",
    ),
    "heads": (["model.num_heads=3"], "head.pooling", "model.num_heads is 1 there and 3 here", "head.mass"),
    "mean": (["model.pooling=mean"], None, "", "head.mass"),
}


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_a_part_of_another_kind_starts_fresh_and_says_so(source: Path, name: str) -> None:
    overrides, fresh, reason, kept = OTHER_HEADS[name]
    weights = load_file(source / "checkpoints" / "best.safetensors")
    model, untouched, line = _started(source, *overrides)
    assert _equal(model, weights, "towers.") and _equal(model, weights, kept)
    if fresh is None:
        assert "fresh" not in line  # mean pooling has no weights
    else:
        assert line.endswith(f"; {fresh} ({reason}) starts fresh")
        assert _equal(model, untouched.state_dict(), fresh) and "\n" not in line


def _copy_with(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(source / "checkpoints" / "best.safetensors")
    change(weights)
    save_file(weights, target)
    return target


WRONG: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (lambda _, tmp: tmp / "nothing", "is no run directory, no export and no file of weights"),
    "an empty directory": (lambda _, tmp: tmp, "is no run directory, no export"),
    "other towers": (
        lambda s, tmp: _copy_with(
            s, tmp / "w.safetensors", lambda w: w.update({"towers.clip.text_projection": torch.ones(3, 4)})
        ),
        r"1 weights differ: towers.clip.text_projection is \(3, 4\) and not \(96, 96\)",
    ),
    "NaN": (
        lambda s, tmp: _copy_with(s, tmp / "w.safetensors", lambda w: w["head.pooling.key.bias"][0].fill_(torch.nan)),
        "1 weights are not finite",
    ),
    "damaged": (
        lambda s, tmp: _cut(s / "checkpoints" / "best.safetensors", tmp / "w.safetensors"),
        "is damaged, or not a file of weights",
    ),
    "towers alone": (lambda *_: Path("configs/towers/demo.safetensors").absolute(), "model.pretrained takes a file"),
    "authors' file": (lambda _, tmp: _cut(Path(__file__), tmp / "model_best.pth"), "`tmass convert "),
}


def _cut(path: Path, target: Path) -> Path:
    target.write_bytes(path.read_bytes()[:-100])
    return target


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_started_from_is_one_line(source: Path, tmp_path: Path, name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(UserError, match=message) as raised:
        _started(make(source, tmp_path))
    assert "\n" not in str(raised.value)


def test_pixels_normalised_in_another_way_are_refused(source: Path, tmp_path: Path) -> None:
    export = _exported(source, tmp_path / "out")
    content = json.loads((export / "config.json").read_text())
    content["normalisation"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    del content["checksum"], content["weights_sha256"]  # as in an export of version 0.1
    (export / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"set model\.pretrained=towers/demo\.safetensors, whose weights are not read"):
        _started(export)


def test_a_whole_model_in_model_pretrained_names_init_from(source: Path) -> None:
    with pytest.raises(UserError, match="takes towers alone; start from a whole model with init_from=PATH"):
        build_model(load_config("demo.yaml", [f"model.pretrained={source}/checkpoints/best.safetensors"]).model)


def test_a_run_starts_from_it_once_and_records_it(data: list[str], source: Path, tmp_path: Path) -> None:
    started = Path(shutil.copytree(source, tmp_path / "source"))
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *data, f"run_dir={tmp_path / 'run'}"]
    command += [
        "optim.lr=0",
        "optim.clip_lr=0",
        "max_steps=3",
        f"init_from={started}",
        "optim.frozen=[towers.clip.visual]",
    ]
    done = run(*command, "model.pretrained=null", "engine.zero_stage=2")
    assert done.returncode == 0, done.stderr
    trained, weights = (load_file(path / "checkpoints/best.safetensors") for path in (tmp_path / "run", started))
    assert trained.keys() == weights.keys() and all(torch.equal(trained[name], weights[name]) for name in weights)
    assert f"init_from={started}: towers, head.pooling, head.mass loaded" in (tmp_path / "run/train.log").read_text()
    assert load_config(str(tmp_path / "run/config.yaml")).init_from == str(started)
    assert "starting from `source`" not in str(TMass.of_run(tmp_path / "run").generate_model_card())
    assert f"starting from `{tmp_path.name}/source`" in str(TMass.of_run(tmp_path / "run").generate_model_card())
    # A start that resumes needs nothing but the run directory, frozen weights included.
    shutil.rmtree(started)
    (tmp_path / "run/checkpoints/validation.json").unlink()
    (tmp_path / "run/checkpoints/best.safetensors").unlink()
    again = run(*command, "model.pretrained=null", "engine.zero_stage=2")
    assert again.returncode == 0, again.stderr
    resumed = load_file(tmp_path / "run/checkpoints/best.safetensors")
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)


def _weights_on_a_rank(paths: list[str], run_dir: str, stage: int) -> dict[str, Any]:
    from dataclasses import replace

    from tmass_dist import distributed
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.start import starting_model

    config = config_of(f"engine.zero_stage={stage}", f"run_dir={run_dir}")
    config = replace(config, init_from=paths[distributed.rank()])
    model = starting_model(config, torch.device("cpu"), logging.getLogger("quiet"))
    return {name: value.clone() for _, name, value in Engine(model, config).state(("weight",))}


@pytest.mark.parametrize("stage", [0, 3])
def test_every_rank_starts_from_the_weights_that_rank_0_read(tmp_path: Path, stage: int) -> None:
    """The other run may write better weights while the ranks are reading."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    paths = []
    for number in range(2):
        model = small_objective(config_of())
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(number)
        paths.append(str(tmp_path / f"{number}.safetensors"))
        save_file(model.state_dict(), paths[-1])
    first, second = on_ranks(2, _weights_on_a_rank, paths, str(tmp_path / "run"), stage, tmp_path=tmp_path)
    weights = load_file(paths[0])
    for rank in (first, second):
        assert all(torch.equal(value, weights[name]) for name, value in rank.items())


def test_an_export_says_what_the_table_compares_with(data: list[str], source: Path, tmp_path: Path) -> None:
    run_dir = make_run(data, tmp_path / "run", f"init_from={source}")
    done = run("-m", "tmass_dist.evaluate", "--run", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert "before training (init_from, M = 20)" in done.stdout and "untrained head" not in done.stdout
