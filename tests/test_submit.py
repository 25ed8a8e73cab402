"""launch/submit.py: where the resources come from, what a dry run prints, which options are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.nodes import describe_gpus, select_nodes
from launch.options import parse
from launch.resources import Resources, mebibytes_of
from tests.conftest import run
from tmass_dist.errors import UserError

NO_SLURM = {"PATH": "/nowhere"}
SINFO = """\
small1|main*|16|64000|gpu:2|(null)
small1|all|16|64000|gpu:2|(null)
big1|large|96|1024000|gpu:a100:8(S:0-1)|a100,fast
big2|large|96|1024000|gpu:h100:8(S:0,1),shard:32|h100,fast
big2|all|96|1024000|gpu:h100:8(S:0,1),shard:32|h100,fast
slice1|mig|64+|512000|gpu:1g.5gb:14,gpu:2080ti:1|(null)
plain1|cpu|32|128000|(null)|(null)
plain1|all|32|128000|(null)|(null)
"""


def _dry_run(*options: str, slurm: bool = False) -> str:
    done = run("launch/submit.py", "--config", "demo.yaml", "--dry-run", *options, **({} if slurm else NO_SLURM))
    assert done.returncode == 0, done.stderr
    return done.stdout


def _refused(*options: str) -> str:
    done = run("launch/submit.py", "--config", "demo.yaml", "--dry-run", *options, **NO_SLURM)
    assert done.returncode == 2 and not done.stdout, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


def test_without_gpus_and_slurm_one_line_asks_for_gpus() -> None:
    assert "give --gpus N (--gpus 0: train on CPUs)" in _refused("--nodes", "4")


def test_lanes_that_the_ranks_do_not_divide_are_refused() -> None:
    options = ["--gpus", "3", "data.order=streaming", "data.lanes=4", "data.batch_size=12"]
    assert "data.lanes=4 is not divisible by 3 ranks; use one of [1, 2, 4] ranks" in _refused(*options)


def test_a_sweep_takes_settings_of_one_value_after_it_as_overrides(tmp_path: Path) -> None:
    axes = ["--sweep", "optim.lr=1e-5,3e-5,1e-5", "seed=7", f"run_dir={tmp_path / 'sweep'}", "max_steps=8,9"]
    printed = _dry_run("--gpus", "0", *axes)
    found = re.findall(rf"^run_dir: {tmp_path / 'sweep'}/(.*)$", printed, re.MULTILINE)
    assert found == [f"optim.lr={lr},max_steps={steps}" for lr in ("1e-5", "3e-5") for steps in (8, 9)]
    assert printed.count("\nseed: 7\n") == 4


def test_a_sweep_that_would_mix_with_other_runs_or_settings_is_refused(tmp_path: Path) -> None:
    assert "optim.lr is the same for all runs" in _refused("--gpus", "0", "optim.lr=1", "--sweep", "optim.lr=1,2")
    (tmp_path / "config.yaml").touch()
    refused = _refused("--gpus", "0", "--sweep", "optim.lr=1,2", f"run_dir={tmp_path}")
    assert f"give the sweep another one, as run_dir={tmp_path}-sweep" in refused


def test_dry_run_with_gpus_prints_the_exact_script(tmp_path: Path) -> None:
    options = ["--nodes", "4", "--time", "1-02:30:00", "--partition", "gpu", "--qos", "high", "--mem", "8G"]
    printed = _dry_run(*options, "--gpus", "8", "data.num_workers=5", f"run_dir={tmp_path / 'run'}")
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1590", "--qos=high", "--mem=8G"):
        assert f"#SBATCH {line}\n" in printed
    assert "#SBATCH --cpus-per-task=6\n" in printed, "data.num_workers + 1"
    assert "export TMASS_GPUS_PER_NODE=8\n" in printed
    assert "srun" in printed and "scontrol requeue" in printed and f"run_dir: {tmp_path / 'run'}" in printed
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"


def test_dry_run_begins_with_a_summary(data: list[str], tmp_path: Path) -> None:
    options = ["--gpus", "4", "--nodes", "2", *data, f"run_dir={tmp_path}", "epochs=3", "max_steps=null"]
    summary = _dry_run(*options).split("\n# train:")[0].splitlines()
    assert summary[0] == "# 2 nodes x 4 GPUs = 8 ranks, 1 CPUs a rank"
    assert summary[1] == "# global batch of 8 pairs, 1 a rank"
    steps = re.fullmatch(r"# (\d+) steps: 3 epochs of (\d+) steps", summary[2])
    assert steps and int(steps[1]) == 3 * int(steps[2]) > 0
    assert f"# run directory {tmp_path}" in summary
    assert "# checked: options, config, batch against ranks, data, run directory" in summary
    warnings = [line for line in summary if line.startswith("# warning: ")]
    assert any("each rank has one pair" in line for line in warnings)
    assert any("engine.bf16 is off" in line for line in warnings) is ("bf16: false" in _dry_run(*options))


def test_missing_data_is_a_warning_of_the_dry_run_and_an_error_of_the_submission() -> None:
    settings = ["--gpus", "8", "data.train=/nowhere/shards"]
    printed = _dry_run(*settings)
    assert "# warning: data: no shards in /nowhere/shards" in printed and "#SBATCH" in printed
    assert "checked: options, config, batch against ranks, run directory" in printed
    done = run("launch/submit.py", "--config", "demo.yaml", "--cluster", "local", "data.train=/nowhere/shards")
    assert done.returncode == 2 and "no shards in /nowhere/shards" in done.stderr


def test_cpus_on_purpose() -> None:
    printed = _dry_run("--gpus", "0", "--procs", "4", "data.num_workers=1")
    assert "1 node x 4 CPU processes = 4 ranks, 2 CPUs a rank" in printed and "--gpus-per-node" not in printed
    assert "bf16" not in printed.split("\n# train:")[0], "no advice on bfloat16 for CPUs"


def test_a_local_run_counts_this_machine() -> None:
    printed = _dry_run("--cluster", "local", "optim.lr=2e-5")
    assert "lr: 2.0e-05" in printed and "# 1 node x " in printed and "#SBATCH" not in printed


def test_tasks_of_an_array_have_a_gpu_and_their_own_memory() -> None:
    scripts = _dry_run("--job", "all", "--nodes", "2", "--gpus", "8", "--mem", "400G").split("#!/bin/bash")
    train, score, report = scripts[1:4]
    assert "--gpus-per-node=8\n" in train and "--mem=400G\n" in train
    assert "--gpus-per-node=1\n" in score and "--mem=51200M\n" in score and "--nodes=1\n" in score
    assert "--gpus-per-node" not in report and "--mem=51200M\n" in report
    assert "--mem=20G\n" in _dry_run("--job", "all", "--gpus", "8", "--mem", "400G", "--task-mem", "20G")
    assert "--gpus-per-node" not in _dry_run("--job", "all", "--gpus", "0")


def test_memory_of_one_task() -> None:
    assert [mebibytes_of(text) for text in ("4000", "4000M", "64G", "2T", "2048K")] == [4000, 4000, 65536, 2097152, 2]
    for size, share in (("8G", "4096M"), ("0", None)):  # SLURM's 0 is the whole node
        assert Resources(gpus=2, flags={"mem": size}).one_task().flags.get("mem") == share


def test_nodes_are_read_from_sinfo() -> None:
    def gpus(partition: str | None, constraint: str | None = None) -> list[tuple[str, int, str]]:
        return [(node.name, node.gpus, node.gpu_type) for node in select_nodes(SINFO, partition, constraint)]

    assert gpus(None) == gpus("main") == [("small1", 2, "")]
    assert gpus("large") == [("big1", 8, "a100"), ("big2", 8, "h100")]
    assert gpus("large", "fast&h100") == gpus("large", "h100|v100") == [("big2", 8, "h100")]
    assert len(gpus("large", "[a100*1&h100*1]")) == 2, "a form that is not evaluated here excludes nothing"
    assert gpus("mig") == [("slice1", 15, "1g.5gb, 2080ti")]
    assert gpus("cpu") == [("plain1", 0, "")]
    assert len(gpus("main,cpu")) == 2
    [node] = select_nodes(SINFO, "mig", None)
    assert node.cpus == 64 and node.memory_mb == 512000
    described = describe_gpus(select_nodes(SINFO, "all", None))
    assert described == "1 node with no GPUs, 1 with 2 GPUs, 1 with 8 GPUs (h100)"


@pytest.mark.parametrize(
    ("sinfo", "partition", "constraint", "message"),
    [
        (SINFO, "nowhere", None, "SLURM has no partition nowhere; it has all, cpu, large, main, mig"),
        (SINFO, "large", "v100", "has --constraint v100; features: a100, fast, h100"),
        (SINFO.replace("*", ""), None, None, "no default partition; give --partition"),
        ("", None, None, "no default partition; give --partition: there is none"),
    ],
)
def test_what_sinfo_does_not_have_is_named(sinfo: str, partition: str, constraint: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        select_nodes(sinfo, partition, constraint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "1", "--time", "soon"], "--time soon is not a time"),
        (["--gpus", "1", "--mem", "much"], "--mem much is not a size"),
        (["--gpus", "1", "--nodes", "0"], "--nodes is 0; at least 1"),
        (["--gpus", "-1"], "--gpus is -1; at least 0"),
        (["--gpus", "1", "--min-nodes", "3", "--nodes", "2"], "--min-nodes is 3, more than --nodes 2"),
        (["--cluster", "local", "--nodes", "2"], "a local run has 1 node"),
        (["--cluster", "local", "--gpus", "99"], "this machine has"),
        (["--gpus", "0", "--procs", "3"], "not divisible by 3 ranks"),
        (["--gpus", "8", "--procs", "3"], "--procs is for nodes without GPUs"),
        (["--site", "nowhere"], "there are example"),
    ],
)
def test_impossible_resources_are_one_line(options: list[str], message: str) -> None:
    assert message in _refused(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "3"], "--tasks is for --job evaluate or shards or captions or all, and the job is train"),
        (["--pack", "x"], "--pack is for --job shards or all"),
        (["--job", "evaluate", "--sweep", "optim.lr=1,2"], "--sweep is for --job train"),
        (["--cluster", "local", "--partition", "gpu"], "--partition is for SLURM"),
        (["--cluster", "local", "--wait"], "--wait is for SLURM"),
        (["--cluster", "local", "--time", "60"], "--time is for SLURM"),
        (["--job", "shards", "--pack", "x", "--gpus", "2"], "packing shards uses no GPU"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(options: list[str], message: str) -> None:
    assert message in _refused(*options)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("gpus: eight", "--gpus is 'eight'; it is a whole number"),
        ("gpu: 8", "unknown gpu; known: account"),
        ("[8]", "must hold keys and values"),
        ("gpus: [", "is not valid YAML"),
    ],
)
def test_a_bad_page_of_a_site_is_one_line(tmp_path: Path, page: str, message: str) -> None:
    from launch.options import read_resources

    (tmp_path / "mine.yaml").write_text(page)
    with pytest.raises(UserError, match=re.escape(message)):
        read_resources(parse(["--site", "mine"]), 2, tmp_path)


def test_the_page_of_a_site_gives_defaults() -> None:
    printed = _dry_run("--site", "example", "--nodes", "2", "data.batch_size=64")
    assert "--nodes=2\n" in printed and "--gpus-per-node=8\n" in printed and "--cpus-per-task=10\n" in printed
