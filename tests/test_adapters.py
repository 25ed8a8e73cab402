"""LoRA, learning rates by layer, early stopping: each is an equality, at every ZeRO stage and after resuming."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run
from tests.ranks import on_ranks
from tests.small_model import batch_of, config_of, small_objective
from tests.test_checkpoint import _resumed
from tests.test_engine import _many, plain_run
from tmass_dist import TMass
from tmass_dist.config import Config, load_config
from tmass_dist.errors import UserError
from tmass_dist.models.adapters import is_adapter, plain_weights
from tmass_dist.models.tmass import build_model
from tmass_dist.training.groups import parameter_groups
from tmass_dist.training.validation import Validator

DECAY = ["optim.layer_decay=0.5"]
LORA = ["optim.lora_rank=2"]
CASES = [(options, stage) for options in (DECAY, LORA) for stage in (0, 1, 2, 3) if (options, stage) != (LORA, 3)]


def test_two_ranks_at_every_stage_are_one_process(tmp_path: Path) -> None:
    configs = [config_of(*options, f"engine.zero_stage={stage}") for options, stage in CASES]
    expected = {tuple(options): plain_run(config_of(*options)) for options in (DECAY, LORA)}
    for rank in on_ranks(2, _many, [(config, False) for config in configs], tmp_path=tmp_path):
        for (options, stage), found in zip(CASES, rank):
            one, case = expected[tuple(options)], f"{options}, ZeRO-{stage}"
            torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-6, atol=0, msg=case)
            assert found["weights"].keys() == one["gradients"].keys(), case
            assert all(is_adapter(name) or name.startswith("head.") for name in found["weights"]) == (options == LORA)
            for name, value in found["weights"].items():
                torch.testing.assert_close(value, one["weights"][name], rtol=0, atol=1e-6, msg=f"{case}: {name}")


@pytest.mark.parametrize(("options", "stage"), [(DECAY, 3), (LORA, 2)], ids=["layer_decay", "lora"])
def test_resumed_is_never_stopped(options: list[str], stage: int, tmp_path: Path) -> None:
    config = config_of(*options, f"engine.zero_stage={stage}", "optim.ema=0.9")
    results = []
    for save_at in (3, None):  # the second start resumes at step 3
        folder = tmp_path / f"meet-{save_at}"
        folder.mkdir()
        results.append(on_ranks(2, _resumed, config, str(tmp_path / "c"), 5, save_at, tmp_path=folder))
    for unbroken, resumed in zip(*results):
        assert unbroken.keys() == resumed.keys() and all(torch.equal(unbroken[n], resumed[n]) for n in unbroken)


def _rates(*overrides: str) -> dict[str, float]:
    config = load_config("demo.yaml", list(overrides))
    model = build_model(config.model, without_weights=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in parameter_groups(model, config.optim) for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in parameter_groups(model, config.optim)) == len(names)
    return rates


def test_a_block_is_trained_at_a_fixed_part_of_the_rate_of_the_block_above() -> None:
    rates = _rates("optim.clip_lr=1.0", "optim.layer_decay=0.5", "optim.lr=7.0")
    numbers = {name: int(name.split("resblocks.")[1].split(".")[0]) for name in rates if "resblocks." in name}
    depth = {visual: 1 + max(n for name, n in numbers.items() if (".visual." in name) == visual) for visual in (0, 1)}
    for name, rate in rates.items():
        blocks = depth[".visual." in name]
        if name.startswith("head."):
            assert rate == 7.0
        elif name in numbers:
            assert rate == 0.5 ** (blocks - numbers[name]), name
        elif any(part in name for part in ("embedding", "conv1", "ln_pre")):
            assert rate == 0.5 ** (blocks + 1), name
        else:
            assert rate == 1.0 and any(part in name for part in ("ln_post", "ln_final", "proj", "logit_scale")), name


def test_a_factor_of_one_is_no_factor() -> None:
    config = load_config("demo.yaml", ["optim.layer_decay=1.0"])
    model = build_model(config.model, without_weights=True)
    towers, head = parameter_groups(model, config.optim)
    assert (towers["name"], towers["lr"], head["name"], head["lr"]) == ("towers", 3e-4, "head", 1e-3)
    assert [id(p) for p in towers["params"]] == [id(p) for p in model.towers.parameters()]


def test_without_a_trained_block_the_factor_is_refused() -> None:
    config = load_config("demo.yaml", DECAY)
    model = build_model(config.model, without_weights=True)
    model.towers.requires_grad_(False)
    with pytest.raises(UserError, match="needs a trained tower with numbered blocks"):
        parameter_groups(model, config.optim)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.layer_decay=0"], r"optim\.layer_decay is 0"),
        (["optim.lora_alpha=4"], "it applies to optim.lora_rank"),
        (["optim.lora_rank=0"], "at least 1, or null"),
        ([*LORA, *DECAY], "only their adapters are trained"),
        ([*LORA, "optim.frozen=[towers.clip.visual]"], "the towers are frozen"),
        ([*LORA, "engine.zero_stage=3"], "use 0, 1 or 2"),
        ([*LORA, "engine.compile=true"], "does not work with optim.lora_rank"),
        (["patience=0"], "patience is 0"),
    ],
)
def test_what_does_not_apply_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("demo.yaml", overrides)


@torch.inference_mode()
def test_the_weights_with_their_adapters_added_compute_the_same() -> None:
    config = config_of(*LORA, "optim.lora_alpha=3")
    adapted = small_objective(config).eval()  # perturbed, adapters too
    plain = small_objective(config_of()).eval()
    plain.load_state_dict(plain_weights(adapted))
    pixels, tokens, _, _ = batch_of(0)
    for one, other in zip(adapted.encode(pixels, tokens), plain.encode(pixels, tokens)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    unadapted = small_objective(config_of()).eval()
    assert (unadapted.encode(pixels, tokens)[1] - plain.encode(pixels, tokens)[1]).abs().max() > 1e-3


def test_a_run_with_adapters_is_exported_without_them_and_resumes(data: list[str], tmp_path: Path) -> None:
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *data, f"run_dir={tmp_path / 'run'}", *LORA]
    command += ["optim.lr=0.01", "eval_every=3", "max_steps=6"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    first = load_file(checkpoints / "best.safetensors")
    published = load_file("configs/towers/demo.safetensors")
    moved = {
        name
        for name in published
        if not torch.equal(first[f"towers.clip.{name}"].reshape(-1), published[name].reshape(-1))
    }
    assert moved and all(name.split(".")[-2] in ("c_fc", "c_proj") or "in_proj_weight" in name for name in moved)
    TMass.of_run(tmp_path / "run").save_pretrained(tmp_path / "export")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == first.keys() and all(torch.equal(exported[name], first[name]) for name in first)
    # As if it had been stopped after step 3: the next start comes to the same weights.
    last = load_file(checkpoints / "step-00000006" / "part-00000.safetensors")
    shutil.rmtree(checkpoints / "step-00000006")
    again = run(*command)
    assert again.returncode == 0, again.stderr
    resumed = load_file(checkpoints / "step-00000006" / "part-00000.safetensors")
    assert resumed.keys() == last.keys() and all(torch.equal(resumed[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("scores", "patience", "window", "exhausted"),
    [
        ([], 1, 1, False),
        ([5.0], 1, 1, False),
        ([5.0, 5.0], 1, 1, True),
        ([5.0, 4.0, 6.0], 2, 1, False),
        ([5.0, 4.0, 5.0], 2, 1, True),
        ([5.0, 9.0, 5.0, 5.0], 2, 2, True),
        ([5.0, 4.0, 3.0], None, 1, False),
    ],
)
def test_patience_counts_validations_without_a_new_best(
    scores: list[float], patience: int | None, window: int, exhausted: bool
) -> None:
    config: Config = load_config("demo.yaml", [f"patience={patience or 'null'}", f"evaluation.window={window}"])
    validator = Validator(cast(Any, None), None, config, torch.device("cpu"), lambda: False)
    validator.history = [{"step": 1 + number, "R@1": score} for number, score in enumerate(scores)]
    assert validator.is_exhausted() == exhausted


def test_a_job_that_stops_early_is_evaluated_and_resumes_to_the_same_end(data: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ["--config", "demo.yaml", *data, f"run_dir={run_dir}", "patience=2", "eval_every=1", "max_steps=6"]
    settings += ["optim.lr=0", "optim.clip_lr=0"]  # no score ever changes
    done = run("launch/submit.py", "--cluster", "local", "--procs", "1", *settings)
    assert done.returncode == 0, done.stderr
    assert "patience=2: training ends at step 3 of 6" in (run_dir / "train.log").read_text()
    assert json.loads((run_dir / "evaluation" / "metrics.json").read_text())["num_videos"] == 14
    checkpoints = run_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000002", "step-00000003"]
    shutil.rmtree(checkpoints / "step-00000003")  # as if it had been stopped in the third step
    again = run("-m", "tmass_dist.train", *settings)
    assert again.returncode == 0, again.stderr
    assert (checkpoints / "step-00000003").is_dir() and not (checkpoints / "step-00000004").exists()
    assert (run_dir / "complete.json").is_file()
