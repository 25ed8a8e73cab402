"""Evaluation of a run: what is encoded when, which settings apply at each call, several ranks, no internet."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import run
from tests.ranks import on_ranks
from tmass_dist.config import load_config, to_yaml
from tmass_dist.evaluation import encode as encoding
from tmass_dist.evaluation import features as store
from tmass_dist.evaluation.run import encode_run, evaluate_run
from tmass_dist.models.tmass import build_model


def make_run(data: list[str], directory: Path, *overrides: str) -> Path:
    """A run directory as training leaves it, with weights that no training has touched."""
    config = load_config("demo.yaml", [*data, f"run_dir={directory}", "data.eval_batch_size=2", *overrides])
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(0)
    model = build_model(load_config("demo.yaml").model)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(model.state_dict(), directory / "checkpoints" / "best.safetensors")
    best = {"step": 3, "selected_on": "val", "R@1": 50.0, "query_scoring_tau": 0.2}
    (directory / "checkpoints" / "best.json").write_text(json.dumps(best))
    return directory


def _evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "tmass_dist.evaluate", *arguments)


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def _metrics(directory: Path) -> dict:
    return json.loads((directory / "metrics.json").read_text())


@pytest.fixture(scope="module")
def made(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run; no test changes it."""
    directory = make_run(data, tmp_path_factory.mktemp("made") / "run")
    done = _evaluate("--run", str(directory))
    assert done.returncode == 0 and "(encoded)" in done.stdout, done.stderr
    return directory


@pytest.fixture
def evaluated(made: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_the_baselines_are_rows_of_every_table(made: Path) -> None:
    result = _metrics(made / "evaluation")
    assert list(result["baselines"]) == [
        "mean pooling, before training",
        "zero-shot (untrained head, M = 20)",
        "mean pooling of these towers",
        "best frame of these towers",
        "query scoring of these towers (tau 0.2, chosen on validation)",
    ]
    for name in ("table.md", "report.html"):
        text = (made / "evaluation" / name).read_text()
        assert all(row in text for row in result["baselines"])
    # These towers were not trained, so both rows of mean pooling are one.
    rows = list(result["baselines"].values())
    assert rows[0] == rows[2]
    for name, gains in result["gain_over_baselines"].items():
        for direction in ("t2v", "v2t"):
            value, low, high = gains[direction]["R@1"]
            assert value == result[direction]["R@1"] - result["baselines"][name][direction]["R@1"]
            assert low <= value <= high
    assert len(result["gain_over_baselines"]) == 3


def test_settings_of_every_call_are_applied_to_features_that_are_kept(evaluated: Path) -> None:
    out = evaluated / "evaluation"
    plain, written = _metrics(out), (out / "features" / "frames.npy").stat().st_mtime_ns
    done = _evaluate("--run", str(evaluated), "--post-processing", "dsl", "stochastic.num_trials=3")
    assert done.returncode == 0 and "post-processing dsl (transductive)" in done.stdout, done.stderr
    assert "(kept)" in done.stdout and "M = 3" in done.stdout
    assert (_metrics(out)["post_processing"], _metrics(out)["num_trials"]) == ("dsl", 3)
    assert "[query_conditioned, no post-processing]" in (out / "table.md").read_text()
    assert _metrics(out)["gain_over_baselines"] == {}
    assert _evaluate("--run", str(evaluated)).returncode == 0
    assert _metrics(out) == plain and (out / "features" / "frames.npy").stat().st_mtime_ns == written


def test_search_bank_and_out_work_with_a_run(evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _evaluate("--run", str(evaluated), "--search", "4", "--out", str(out))
    assert done.returncode == 0 and "search with 4 candidates" in done.stdout, done.stderr
    assert [path.name for path in out.iterdir()] == ["search.json"]
    bank = tmp_path / "bank"
    train = next(o for o in load_config(str(evaluated / "config.yaml")).data.train.splitlines())
    done = _evaluate("--run", str(evaluated), "--features", str(bank), f"data.test={train}", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert _metrics(out)["num_videos"] == 40 and _metrics(out)["split"] == "train"
    done = _evaluate("--run", str(evaluated), "--post-processing", "qbnorm", "--bank", str(bank))
    assert done.returncode == 0, done.stderr
    assert _metrics(evaluated / "evaluation")["bank"] == str(bank)
    # The bank's path is the same; its content is of other weights.
    weights = load_file(evaluated / "checkpoints" / "best.safetensors")
    weights["head.pooling.query.bias"] += 1
    save_file(weights, evaluated / "checkpoints" / "best.safetensors")
    done = _evaluate("--run", str(evaluated), "--post-processing", "qbnorm", "--bank", str(bank))
    assert "weights_sha256 differs" in _one_line(done)


def test_what_does_not_apply_to_a_run_is_refused(evaluated: Path, tmp_path: Path) -> None:
    before = _metrics(evaluated / "evaluation")
    for option, message in (
        (["--shard", "0/2"], "--shard does not apply to --run"),
        (["--truth", "t.json"], "--truth does not apply to --run"),
        (["optim.lr=1"], "optim.lr does not apply to --run"),
        (["data.train=elsewhere"], "data.train does not apply to --run"),
        (["--features", str(evaluated / "evaluation" / "features"), "model.num_frames=6"], "holds features of another"),
        (["--checkpoint", str(tmp_path / "none")], "no checkpoint"),
    ):
        assert message in _one_line(_evaluate("--run", str(evaluated), *option))
    assert _metrics(evaluated / "evaluation") == before


def test_a_named_checkpoint_has_no_known_selection(evaluated: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copyfile(evaluated / "checkpoints" / "best.safetensors", weights)
    done = _evaluate("--run", str(evaluated), "--checkpoint", str(weights), "--features", str(tmp_path / "store"))
    assert done.returncode == 0 and "checkpoint selected on unknown" in done.stdout, done.stderr
    assert any("not chosen here" in name for name in _metrics(evaluated / "evaluation")["baselines"])


def test_a_trained_run_needs_no_pretrained_weights(data: list[str], tmp_path: Path) -> None:
    """``openai`` is no file here, so that loading it fails at once: nothing may try."""
    directory = make_run(data, tmp_path / "run", "model.pretrained=openai")
    done = _evaluate("--run", str(directory))
    assert done.returncode == 0, done.stderr
    rows = list(_metrics(directory / "evaluation")["baselines"])
    assert len(rows) == 3 and not any("before" in name or "untrained" in name for name in rows)
    assert "openai" in _one_line(_evaluate("--run", str(directory), "evaluation.baselines=all"))


def test_rows_before_training_are_added_when_they_are_asked_for(data: list[str], made: Path, tmp_path: Path) -> None:
    directory = make_run(data, tmp_path / "run")
    assert _evaluate("--run", str(directory), "evaluation.baselines=none").returncode == 0
    assert _metrics(directory / "evaluation")["baselines"] == {}
    for name, rows in (("features", 3), ("all", 5), ("auto", 5)):
        done = _evaluate("--run", str(directory), f"evaluation.baselines={name}")
        assert done.returncode == 0 and "(kept)" in done.stdout, done.stderr
        assert len(_metrics(directory / "evaluation")["baselines"]) == rows
    assert _metrics(directory / "evaluation")["baselines"] == _metrics(made / "evaluation")["baselines"]


def test_an_encoding_that_was_killed_goes_on_from_its_chunks(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(evaluated / "config.yaml"), [f"run_dir={evaluated}", "data.num_workers=0"])
    whole = store.load_features(encode_run(config, store=tmp_path / "whole"))
    monkeypatch.setattr(encoding.shutil, "rmtree", lambda *_: None)
    left = encode_run(config, store=tmp_path / "left")
    [directory] = left.glob("encoding-*")
    reused, damaged = sorted(directory.iterdir())
    part = store.load_part(reused)
    assert part is not None
    part.frames_VFD[0, 0, 0] = 7.0  # a mark that only a chunk which is used again can carry
    store.save_part(reused, part)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (left / "index.json").unlink()
    again = store.load_features(encode_run(config, store=left))
    assert again.frames_VFD[0, 0, 0] == 7.0
    assert torch.equal(again.frames_VFD[1:], whole.frames_VFD[1:]) and torch.equal(again.text_TD, whole.text_TD)


def _on_rank(run_dir: str, post: str) -> None:
    overrides = [f"run_dir={run_dir}", f"evaluation.post_processing={post}", "data.num_workers=1"]
    evaluate_run(load_config(f"{run_dir}/config.yaml", overrides))


@pytest.mark.parametrize("post", ["none", "dsl"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_give_the_files_of_one_process(
    data: list[str], made: Path, tmp_path: Path, num_ranks: int, post: str
) -> None:
    directory = make_run(data, tmp_path / "run")
    (tmp_path / "meet").mkdir()
    on_ranks(num_ranks, _on_rank, str(directory), post, tmp_path=tmp_path / "meet")
    alone = tmp_path / "alone"
    done = _evaluate("--run", str(made), "--out", str(alone), *(["--post-processing", post] if post != "none" else []))
    assert done.returncode == 0, done.stderr
    one, several = _metrics(alone), _metrics(directory / "evaluation")
    assert several.pop("checkpoint") != one.pop("checkpoint") and one == several
    for name in ("ranks.csv", "video_ranks.csv"):
        assert (alone / name).read_bytes() == (directory / "evaluation" / name).read_bytes()
    for name in ("frames.npy", "texts.npy", "captions.jsonl"):
        both = (made / "evaluation" / "features" / name, directory / "evaluation" / "features" / name)
        assert both[0].read_bytes() == both[1].read_bytes()
