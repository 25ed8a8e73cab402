"""--plan: memory and exchanges of a simulated step against a real one, what fits, and what is refused."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.plan_accuracy import compare
from launch import forecast as forecast_module
from launch.forecast import GIB, USABLE, Forecast, StepCost, forecast, settings_that_fit, simulate
from launch.hardware import find_gpu
from launch.options import parse
from launch.plan import refuse_what_cannot_fit
from launch.resources import Resources
from launch.simulation import StepMeter
from launch.submit import submit
from tests.conftest import run
from tmass_dist.config import load_config
from tmass_dist.errors import UserError


def test_the_meter_counts_bytes_gradients_and_flops() -> None:
    """A product of (8, 4) with (4, 2) numbers; all sizes are those of float32."""
    layer = torch.nn.Linear(4, 2, bias=False)
    with StepMeter() as meter:
        meter.track_gradients(layer)
        assert meter.live == 4 * 8
        output = layer(torch.ones(8, 4))
        assert meter.live == 4 * (8 + 32 + 16) and meter.flops == 2 * 8 * 4 * 2
        meter.begin_section()
        output.sum().backward()
        del output
    assert meter.live == 4 * 2 * 8  # the weight and its gradient
    assert (
        meter.peak == meter.peak_without_gradients >= 4 * (8 + 32 + 16 + 8)
    )  # the gradient is complete at the end only
    assert 4 * 8 <= meter.section_peak <= 4 * (16 + 16 + 8 + 2)
    assert meter.flops == 2 * (2 * 8 * 4 * 2)  # forward, and the gradient of the weight


@pytest.fixture(scope="module")
def plan() -> Forecast:
    """The demo on two nodes of four H100."""
    config = load_config("demo.yaml", ["data.num_workers=3", "max_steps=100"])
    return forecast(config, find_gpu("h100"), Resources(nodes=2, gpus=4), steps_per_epoch=None)


@pytest.mark.parametrize(
    "case",
    [
        "demo-2-ranks",
        "demo-micro",
        *(
            pytest.param(f"demo-{name}", marks=pytest.mark.slow)
            for name in (
                "checkpointing",
                "stage-0",
                "stage-2",
                "stage-3",
                "2-ranks-micro-stage-2",
                "2-ranks-micro-stage-3",
            )
        ),
    ],
)
def test_a_plan_is_close_to_a_real_step(case: str) -> None:
    """Peak of live bytes within 15 % of torch's profiler; exchanged numbers equal, but for DeepSpeed's padding."""
    for line in compare(case):
        padding = 2 * line["n"]  # at most one number a rank for each of the two parameter groups
        is_estimate = line["name"] == "demo-2-ranks-micro-stage-3-exchanged-allgather"
        bound = 0.15 * line["reference"] if line["unit"] == "bytes" or is_estimate else padding
        assert line["reference"] and abs(line["value"] - line["reference"]) <= bound, line


def test_a_plan_adds_up(plan: Forecast) -> None:
    assert sum(plan.memory.values()) == plan.total and plan.fits
    assert plan.num_ranks == 8 and plan.num_steps == 100
    assert plan.host_memory == (2 * 3 + 2) * 4 * 12 * 32 * 32 * 3  # batches x pairs x frames x pixels x colours
    assert plan.checkpoint == 3 * 4 * plan.cost.num_parameters
    assert plan.exchange_s > 0 and plan.compute_s > 0
    alone = dataclasses.replace(plan, num_ranks=1)
    assert alone.exchanges == {} and alone.exchange_s == 0


@pytest.mark.slow
def test_a_plan_for_1024_ranks_takes_no_memory() -> None:
    config = load_config("demo.yaml", ["data.batch_size=32768", "engine.head_memory_mb=128"])
    cost = simulate(config, 1024)
    assert cost.peak > 4 * 32768 * 96  # at least the gathered texts
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # kilobytes


@pytest.mark.slow
def test_settings_that_fit_do_fit(plan: Forecast) -> None:
    """A GPU with 10 MB too little: the settings that are offered are simulated again, and fit."""
    config = dataclasses.replace(plan.config, engine=dataclasses.replace(plan.config.engine, zero_stage=0))
    big = dataclasses.replace(plan, config=config)
    gpu = dataclasses.replace(plan.gpu, memory_gb=(big.total - 10e6) / GIB / USABLE)
    big = dataclasses.replace(big, gpu=gpu)
    assert not big.fits
    settings = settings_that_fit(big)
    again = load_config("demo.yaml", ["data.num_workers=3", "engine.zero_stage=0", *settings])
    assert forecast(again, gpu, Resources(nodes=2, gpus=4), None).fits, settings


COST = StepCost(
    num_parameters=10**9,
    num_trainable=10**9,
    num_in_towers=9 * 10**8,
    num_groups=2,
    persistent=0,
    image_size=224,
    weights=4 * 10**9,
    peak=20 * 10**9,
    peak_without_gradients=16 * 10**9,
    head_peak=10**6,
    flops=0,
    exchanged={},
)


def _large(plan: Forecast, num_ranks: int, memory_gb: float, **engine: Any) -> Forecast:
    """A plan for a billion weights, whose step is not simulated."""
    config = dataclasses.replace(plan.config, engine=dataclasses.replace(plan.config.engine, **engine))
    gpu = dataclasses.replace(plan.gpu, memory_gb=memory_gb)
    return dataclasses.replace(plan, config=config, cost=COST, num_ranks=num_ranks, gpu=gpu)


def test_only_settings_that_lower_the_peak_are_offered(plan: Forecast, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 3 keeps gathered weights beside its shards, which takes more than ZeRO 2 for a model of this size."""
    monkeypatch.setattr(forecast_module, "simulate", lambda *_: COST)  # neither micro-batches nor checkpointing help
    for num_ranks in (1, 2, 8):
        least = min(_large(plan, num_ranks, 1, zero_stage=stage).total for stage in range(4))
        for stage in range(4):
            with pytest.raises(UserError, match="the least is") as error:
                settings_that_fit(_large(plan, num_ranks, 1, zero_stage=stage))
            needed = float(str(error.value).partition("the least is ")[2].split()[0])
            assert 0 <= needed - least / GIB / USABLE < 0.1001, (num_ranks, stage, str(error.value))
            enough = _large(plan, num_ranks, needed, zero_stage=stage)
            assert enough.fits or settings_that_fit(enough)
    alone = _large(plan, 1, 33.5)
    assert not alone.fits and settings_that_fit(alone) == ["engine.zero_stage=0"]


def test_a_setting_that_was_of_no_use_is_tried_again(plan: Forecast, monkeypatch: pytest.MonkeyPatch) -> None:
    """At stage 0 the update needs the most; once the optimiser is sharded, the backward pass does."""
    small = dataclasses.replace(COST, peak=14 * 10**9, peak_without_gradients=10 * 10**9)
    monkeypatch.setattr(
        forecast_module,
        "simulate",
        lambda config, _: dataclasses.replace(small, peak=9 * 10**9, peak_without_gradients=5 * 10**9)
        if config.engine.checkpoint_activations
        else small,
    )
    big = dataclasses.replace(_large(plan, 8, 14, zero_stage=0), cost=small)
    settings = settings_that_fit(big)
    assert "engine.checkpoint_activations=true" in settings and any("zero_stage" in setting for setting in settings)


@pytest.mark.slow
def test_what_fits_at_no_setting_says_how_much_the_least_needs(plan: Forecast) -> None:
    tiny = dataclasses.replace(plan, gpu=dataclasses.replace(plan.gpu, memory_gb=0.001))
    with pytest.raises(UserError, match=r"cannot fit into 0.001 GB: the least is .* use more ranks"):
        settings_that_fit(tiny)


@pytest.mark.slow
def test_a_submission_that_does_not_fit_is_refused(data: list[str], tmp_path: Path) -> None:
    config = load_config("demo.yaml", [*data, f"run_dir={tmp_path}"])
    options = ["--config", "demo.yaml", "--gpus", "2", "--gpu-memory-gb", "0.001", "--peak-tflops", "1"]
    with pytest.raises(UserError, match="cannot fit"):
        refuse_what_cannot_fit(parse(options), [config], Resources(gpus=2), [])
    refuse_what_cannot_fit(parse(["--config", "demo.yaml"]), [config], Resources(gpus=2), [])  # the GPU is not known


def test_options_of_a_plan_are_refused_where_they_have_no_effect(data: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--mfu is for --plan"):
        parse(["--config", "demo.yaml", "--gpu", "h100", "--mfu", "0.5"])
    config = load_config("demo.yaml", [*data, f"run_dir={tmp_path}"])
    for options, resources, message in (
        (["--gpu", "h100"], Resources(), "--gpu: for runs on GPUs, and this one has --gpus 0"),
        (["--gpu-memory-gb", "0"], Resources(gpus=2), "--gpu-memory-gb is 0.0; it must be positive"),
        (["--peak-tflops", "5"], Resources(gpus=2), "which GPU. give --gpu"),
    ):
        with pytest.raises(UserError, match=message):
            refuse_what_cannot_fit(parse(["--config", "demo.yaml", *options]), [config], resources, [])


def test_the_batch_is_checked_before_data_are_packed(tmp_path: Path) -> None:
    pack = f"--source folder --videos {tmp_path} --split train --out {tmp_path}/train"
    options = ["--config", "demo.yaml", "--job", "all", "--gpus", "0", "--procs", "3", "--dry-run", "--pack", pack]
    with pytest.raises(UserError, match="not divisible by 3 ranks"):
        submit(parse([*options, f"data.train={tmp_path}/train", f"run_dir={tmp_path}/run"]))


@pytest.mark.slow
def test_what_does_not_fit_is_not_submitted_without_force(data: list[str], tmp_path: Path) -> None:
    """The command, with an ``sbatch`` that only records that it was called."""
    commands, record = tmp_path / "bin", tmp_path / "called"
    commands.mkdir()
    for name, answer in (("sbatch", "Submitted batch job 7"), ("squeue", ""), ("sacct", "")):
        program = commands / name
        program.write_text(f'#!/bin/sh\necho {name} >> {record}\necho "{answer}"\n')
        program.chmod(0o755)
    command = ["launch/submit.py", "--config", "demo.yaml", "--gpus", "2", "--gpu-memory-gb", "0.001", *data]
    command += ["--peak-tflops", "1", f"run_dir={tmp_path / 'run'}"]
    refused = run(*command, PATH=str(commands))
    assert refused.returncode == 2 and "cannot fit into 0.001 GB: the least is" in refused.stderr, refused.stderr
    assert "sbatch" not in (record.read_text().splitlines() if record.exists() else [])
    forced = run(*command, "--force", PATH=str(commands))
    assert forced.returncode == 0 and "job 7" in forced.stdout, forced.stderr
    assert "sbatch" in record.read_text().splitlines()


def test_the_command_prints_the_plan(data: list[str]) -> None:
    command = ["launch/submit.py", "--config", "demo.yaml", "--plan", "--gpus", "2", "--gpu", "a100", *data]
    command += ["--nodes", "2", "--min-nodes", "1"]
    done = run(*command, "max_steps=null", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    for words in (
        "plan: 4 x a100 (80 GB, 312 TFLOP/s)",
        "in all: fits",
        "with --min-nodes 1: 2 ranks, 0.",
        "gradients, allreduce",
        "GPU-hours",
    ):
        assert words in done.stdout, done.stdout
    assert "training shards: " in done.stdout and "(40% of " in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "2", "--gpu", "abacus"], "--gpu abacus is not known; known: h200, h100"),
        (["--gpus", "2"], "which GPU? give --gpu"),
        (["--gpus", "2", "--gpu", "h100", "--mfu", "2"], "--mfu is 2.0; it must be positive and at most 1"),
        (["--gpus", "2", "--gpu", "h100", "--gpu-memory-gb", "-1"], "--gpu-memory-gb is -1.0"),
        (["--gpus", "0", "--gpu", "h100"], "--plan is for GPUs"),
        (["--gpus", "3", "--gpu", "h100"], "not divisible by 3 ranks"),
        (["--gpus", "3", "--nodes", "2", "--min-nodes", "1", "--gpu", "h100"], "not divisible by 6 ranks"),
        (["--gpus", "2", "--job", "evaluate"], "--plan is for --job train or all"),
        (["--gpus", "2", "--gpu", "h100", "--dry-run"], "--dry-run is not for --plan"),
        (["--gpus", "2", "--gpu", "h100", "--force"], "--force is not for --plan"),
        (["--gpus", "2", "--gpu", "h100", "--sweep", "optim.lr=1,2"], "--sweep is not for --plan"),
    ],
)
def test_bad_input_of_a_plan_is_one_line(options: list[str], message: str) -> None:
    done = run("launch/submit.py", "--config", "demo.yaml", "--plan", *options, PATH="/nowhere")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("name", "known", "memory_gb"),
    [
        ("nvidia_h100_80gb_hbm3", "h100", 80),
        ("l40s", "l40s", 48),
        ("L4", "l4", 24),
        ("a100", "a100", 80),
        ("nvidia_a100-sxm4-40gb", "a100", 40),
        ("tesla_v100-pcie-16gb", "v100", 16),
        ("rtx4090", "4090", 24),
        ("nvidia_a10g", "a10", 24),
    ],
)
def test_gpus_are_found_by_the_names_that_sites_use(name: str, known: str, memory_gb: float) -> None:
    assert (find_gpu(name).name, find_gpu(name).memory_gb) == (known, memory_gb)
    assert find_gpu(name, memory_gb=12).memory_gb == 12


@pytest.mark.parametrize("name", ["l40", "gh200", "a1000", "nvidia_h100_80gb_hbm3_1g.10gb", "gb200", "abacus"])
def test_a_gpu_whose_name_contains_that_of_another_is_not_known(name: str) -> None:
    with pytest.raises(UserError, match=f"--gpu {name} is not known; known: h200"):
        find_gpu(name)
    own = find_gpu(name, memory_gb=12, peak_tflops=3)
    assert (own.memory_gb, own.peak_tflops) == (12, 3)


@pytest.mark.slow
def test_each_run_of_a_sweep_and_the_fewest_nodes_are_checked(plan: Forecast, tmp_path: Path) -> None:
    arguments = parse(["--config", "demo.yaml", "--gpu", "h100"])
    arguments.gpu_memory_gb = (plan.total + 5e6) / GIB / USABLE  # 8 ranks fit
    runs = [load_config("demo.yaml", [f"data.batch_size={n}", f"run_dir={tmp_path}/b-{n}"]) for n in (32, 256)]
    refuse_what_cannot_fit(arguments, runs[:1], Resources(nodes=2, gpus=4), [])
    with pytest.raises(UserError, match=r"the run b-256 on 8 GPUs (needs|cannot fit into)"):
        refuse_what_cannot_fit(arguments, runs, Resources(nodes=2, gpus=4), [])
    with pytest.raises(UserError, match=r"the run b-32 on 2 GPUs (needs|cannot fit into)"):
        refuse_what_cannot_fit(arguments, runs[:1], Resources(nodes=4, min_nodes=1, gpus=2), [])
