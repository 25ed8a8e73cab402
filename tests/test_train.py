"""The whole road in small, through the command line: real mp4s, tars, two DeepSpeed ranks, evaluation, resuming."""

import io
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.conftest import run
from tmass_dist import __version__
from tmass_dist.config import load_config, to_yaml
from tmass_dist.errors import UserError
from tmass_dist.training.checks import check


def _submit(data: list[str], run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["launch/submit.py", "--cluster", "local", "--config", "demo.yaml", *data, f"run_dir={run_dir}", *more]
    return run(*command)


@pytest.fixture(scope="module")
def whole(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on two ranks that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = _submit(data, run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chance" in done.stdout and "query_conditioned" in done.stdout
    assert done.stdout.endswith(f"tensorboard --logdir {run_dir.parent}\n")  # which names the run after its directory
    return run_dir


def test_run_directory_holds_a_labelled_result(whole: Path) -> None:
    result = json.loads((whole / "evaluation" / "metrics.json").read_text())
    assert (result["num_texts"], result["num_videos"]) == (14, 14)
    assert (result["protocol"], result["selected_on"]) == ("query_conditioned", "val")
    assert result["post_processing"] == "none" and result["checkpoint"].endswith("best.safetensors")
    for direction in ("t2v", "v2t"):
        assert {"R@1", "R@5", "R@10", "MdR", "MnR"} <= set(result[direction])
    best = json.loads((whole / "checkpoints" / "best.json").read_text())
    assert best["code"].startswith(__version__)
    assert f"<dd>{best['code']}</dd>" in (whole / "evaluation" / "report.html").read_text()
    labels = {"selected_on": "val", "protocol": "query_conditioned", "num_trials": 20, "post_processing": "none"}
    assert (labels | {"precision": "float32"}).items() <= best.items()
    words = "protocol query_conditioned, M = 20, post-processing none, precision float32"
    words += ", noise keyed by seed 0, caption text and trial"
    log = (whole / "train.log").read_text()
    assert re.search(rf"step 6: val R@1: t2v [\d.]+, v2t [\d.]+ \({words}\)", log)
    status = run("launch/status.py", str(whole)).stdout
    for text in (log, status):
        assert re.search(rf"best val t2v R@1 [\d.]+ \({words}\) at step", text)
    assert f"test t2v ({words.replace('post', 'checkpoint selected on val, post')})" in status
    tau = best["query_scoring_tau"]
    assert f"query scoring of these towers (tau {tau}, chosen on validation)" in result["baselines"]
    assert (whole / "config.yaml").is_file() and "step 6/6" in (whole / "train.log").read_text()


def test_tensorboard_has_every_tag_once_a_step(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole)).Reload()
    tags = {"loss/total", "loss/stochastic", "loss/support", "optim/lr_towers", "optim/lr_head", "optim/grad_norm"}
    tags |= {"model/logit_scale", "model/mean_radius", "speed/videos_per_s", "speed/data_wait", "speed/memory_gb"}
    tags |= {
        "speed/tflops",
        "optim/grad_norm_towers",
        "model/positive_similarity",
        "metrics/test/selected_on_val/query_conditioned/M20/t2v_R@1",
        "metrics/test/selected_on_val/query_conditioned/M20/v2t_R@1",
    }
    split = {f"speed/{name}_s" for name in ("data", "encode", "head", "communication", "optimizer")}
    assert tags | split <= set(events.Tags()["scalars"])
    assert all(event.value > 0 for name in split for event in events.Scalars(name))
    for number, rate in enumerate(events.Scalars("speed/videos_per_s")):  # no moment is counted twice
        assert sum(events.Scalars(name)[number].value for name in split) < 8 / rate.value
    assert "speed/mfu" not in events.Tags()["scalars"]  # nobody knows this CPU's peak
    queries = events.Images("metrics/val/query_conditioned/M20/queries")
    assert [image.step for image in queries] == [0, 3, 6]
    from PIL import Image

    picture = Image.open(io.BytesIO(queries[-1].encoded_image_string))
    assert picture.height > 8 * 90 and np.asarray(picture).std() > 20
    assert "_hparams_/session_start_info" in events.Tags()["tensors"] or "_hparams_/session_start_info" in str(
        events.summary_metadata
    )
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("metrics/val/query_conditioned/M20/t2v_R@1")] == [0, 3, 6]


def test_export_loads_without_deepspeed_and_gives_the_same_similarities(whole: Path, tmp_path: Path) -> None:
    done = run("-m", "tmass_dist.export", str(whole), str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "model" / "README.md").read_text()
    assert "query_conditioned" in card and "R@1" in card
    code = f"""
import sys, torch
from pathlib import Path
from tmass_dist import TMass
from tmass_dist.evaluation.stored import StoredSplit
model = TMass.from_pretrained({str(tmp_path / "model")!r})
stored = StoredSplit(Path({str(whole / "evaluation" / "features")!r}), [])
texts = stored.features.captions
torch.testing.assert_close(model.encode_text(texts), stored.features.text_TD, rtol=1e-5, atol=1e-5)
similarity_TV = model.similarity(texts, stored.features.frames_VFD)
torch.testing.assert_close(similarity_TV, torch.cat(list(stored.scorer.scores())), rtol=0, atol=1e-5)
assert "deepspeed" not in sys.modules
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    done = run("-m", "tmass_dist.evaluate", "--run", str(tmp_path / "model"))  # an export is evaluated as a run is
    assert done.returncode == 0, done.stderr
    once, again = (json.loads((of / "evaluation" / "metrics.json").read_text()) for of in (whole, tmp_path / "model"))
    assert once["t2v"] == again["t2v"] and once["selected_on"] == again["selected_on"]
    done = run("-m", "tmass_dist.export", str(tmp_path), str(tmp_path / "nothing"))
    assert done.returncode == 2 and "is no run directory" in done.stderr


def test_another_config_in_the_same_directory_is_refused(data: list[str], whole: Path) -> None:
    done = _submit(data, whole, "optim.lr=0.5")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "optim.lr: saved 0.001, given 0.5" in done.stderr


def test_relative_and_absolute_paths_of_the_same_data_are_one_run(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``tmass submit`` makes paths absolute, and ``torchrun -m tmass_dist.train`` does not."""
    (tmp_path / "run").mkdir()
    here = Path(data[0].partition("=")[2]).parent
    monkeypatch.chdir(here)
    relative = [f"{key}={os.path.relpath(path)}" for key, _, path in (one.partition("=") for one in data)]
    config = load_config("demo.yaml", [*relative, f"run_dir={tmp_path / 'run'}"])
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    check(load_config("demo.yaml", [*data, f"run_dir={tmp_path / 'run'}"]), 1)
    monkeypatch.chdir(here.parent)  # there are no such data
    with pytest.raises(UserError, match=r"holds a run with another config \(data\.train: saved"):
        check(load_config("demo.yaml", [*data, f"run_dir={tmp_path / 'run'}"]), 1)


def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(data: list[str], tmp_path: Path) -> None:
    done = _submit(data, tmp_path / "run", "data.batch_size=9")
    assert done.returncode == 2 and "not divisible by 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()


def test_all_packs_only_what_is_not_packed(data: list[str], tmp_path: Path) -> None:
    pack = ["--pack", f"--source folder --videos {tmp_path} --split train --out {tmp_path / 'new'}"]
    command = ["launch/submit.py", "--config", "demo.yaml", "--job", "all", "--dry-run", "--gpus", "0", *pack]
    for more, steps in (
        ([], ["train", "score", "report"]),
        ([f"data.train={tmp_path / 'new'}"], ["pack", "index", "train", "score", "report"]),
    ):
        done = run(*command, *data, *more)
        assert done.returncode == 0, done.stderr
        named = [line.split(":")[0].removeprefix("# ") for line in done.stdout.splitlines() if " tasks (" in line]
        assert named == steps


def test_a_directory_that_cannot_be_written_is_one_line(data: list[str]) -> None:
    done = _submit(data, Path("/proc/no-run"))
    assert done.returncode == 2 and "cannot write to /proc/no-run" in done.stderr and "Traceback" not in done.stderr


def test_training_loss_falls(data: list[str], tmp_path: Path) -> None:
    """One process, through ``python -m tmass_dist.train``; a page of log per step."""
    more = ["max_steps=40", "eval_every=40", "stochastic.support_weight=0"]
    done = run("-m", "tmass_dist.train", "--config", "demo.yaml", *data, f"run_dir={tmp_path}", *more)
    assert done.returncode == 0, done.stderr
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in (tmp_path / "train.log").read_text().splitlines()
        if " loss " in line
    ]
    assert len(losses) == 40 and sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert load_file(tmp_path / "checkpoints" / "best.safetensors")


VARIANTS = {
    "kl": ["model.radius=variational", "stochastic.kl_weight=1", "stochastic.support_weight=0"],
    "at_evaluation_only": ["model.radius=exp_mean", "stochastic.training=mean", "stochastic.num_trials=10"],
    "pooled_by_sample": ["model.pooled_by=sample", "stochastic.num_trials=3"],
    "best_of_samples": ["stochastic.samples=3", "stochastic.trials=best", "stochastic.training_radius=pair"],
    "xpool": ["model.radius=none", "model.num_heads=3"],
    "authors_selection": ["evals_per_epoch=2", "evaluation.window=5", "data.val=null", "data.holdout=8"],
    "augmented_random_frames": ["data.augment=true", "data.frames=random", "model.num_frames=6"],
}


NO_SUPPORT = ("kl", "at_evaluation_only", "xpool")
"""Variants without the support-text loss."""


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_is_evaluated(data: list[str], tmp_path: Path, name: str) -> None:
    more = [f"run_dir={tmp_path}", "max_steps=3", "eval_every=3", *VARIANTS[name]]
    done = run("-m", "tmass_dist.train", "--config", "demo.yaml", *data, *more)
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])  # a term that is off has no curve
    assert ("loss/kl" in tags) == (name == "kl") and ("loss/support" in tags) == (name not in NO_SUPPORT)
    assert name != "kl" or all(event.value > 0 for event in events.Scalars("loss/kl"))
    done = run("-m", "tmass_dist.evaluate", "--run", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["protocol"] == "query_conditioned"


def test_the_share_of_a_known_peak_is_shown(data: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = [f"run_dir={tmp_path}", "max_steps=2", "eval_every=2", "engine.peak_tflops=0.5"]
    done = run("-m", "tmass_dist.train", "--config", "demo.yaml", *data, *more)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path)).Reload()
    tflops, mfu = (events.Scalars(f"speed/{name}")[-1].value for name in ("tflops", "mfu"))
    assert mfu == pytest.approx(tflops / 0.5) and 0 < mfu < 1


def test_flops_are_those_of_the_architecture() -> None:
    """ViT-B/32 at 224: 4.4 G multiplications a frame (Radford et al., 2021); a text of 77 tokens: 3.0 G."""
    import torch

    from tmass_dist.config import load_config
    from tmass_dist.models.tmass import build_model
    from tmass_dist.training.monitor import forward_flops

    model = build_model(load_config("msrvtt.yaml", ["model.pretrained=null"]).model)
    pixels = torch.zeros(1, 2, 224, 224, 3, dtype=torch.uint8)
    found = forward_flops(model, pixels, torch.ones(1, 77, dtype=torch.int64))
    assert found == pytest.approx(2 * (2 * 4.4e9 + 3.0e9), rel=0.03)
