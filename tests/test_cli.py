"""Every entry point: --help in under a second, and a person's mistake is one line without a traceback."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import run

ENTRY_POINTS = [
    ["-m", "tmass_dist.train"],
    ["-m", "tmass_dist.evaluate"],
    ["-m", "tmass_dist.export"],
    ["-m", "tmass_dist.convert"],
    ["launch/submit.py"],
    ["launch/reproduce.py"],
    ["launch/compare.py"],
    ["shards/caption_videos.py"],
    ["shards/inspect_shards.py"],
    ["launch/status.py"],
    ["launch/cancel.py"],
    ["shards/make_shards.py"],
    ["shards/verify_shards.py"],
    ["shards/demo_data.py"],
    ["shards/demo_towers.py"],
]


@pytest.mark.parametrize("entry", ENTRY_POINTS, ids=lambda e: e[-1])
def test_help_imports_nothing_heavy(entry: list[str]) -> None:
    # What makes help slow is importing torch and its kin: that is what is tested, a clock would only be noise.
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:] + ['--help']\n"
        "try:\n    (runpy.run_module if sys.argv[0].count('.') == 1 and '/' not in sys.argv[0] else runpy.run_path)"
        "(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
        "heavy = {'torch', 'deepspeed', 'open_clip', 'webdataset', 'tensorboard', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run("-c", code, entry[-1])
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def _fails_in_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "did you mean optim.lr"),
        ("data.batch_size=1", "data.batch_size is 1"),
        ("stochastic.num_trials=0", "at least one sample"),
        ("data.train=/nowhere/shards", "/nowhere/shards"),
        ("optim.lr=fast", "fast"),
        ("model.radius=round", "round"),
        ("model={radius: linear, radius_start: falling}", "has no start to choose"),
    ],
)
def test_bad_setting_is_one_line(override: str, said: str) -> None:
    assert said in _fails_in_one_line(run("-m", "tmass_dist.train", "--config", "demo.yaml", override))


def test_missing_config_lists_what_is_there() -> None:
    assert "msrvtt.yaml" in _fails_in_one_line(run("-m", "tmass_dist.train", "--config", "vatx.yaml"))


def test_partly_set_environment_names_the_missing_variable() -> None:
    said = _fails_in_one_line(run("-m", "tmass_dist.train", "--config", "demo.yaml", RANK="0", WORLD_SIZE="2"))
    assert "MASTER_ADDR" in said and "LOCAL_RANK" in said


def test_dry_run_prints_the_config() -> None:
    done = run("launch/submit.py", "--cluster", "local", "--config", "demo.yaml", "--dry-run", "optim.lr=2e-5")
    assert done.returncode == 0, done.stderr
    assert "lr: 2.0e-05" in done.stdout and "2 tasks" in done.stdout


def test_dry_run_on_slurm_prints_the_exact_sbatch_text_without_a_cluster() -> None:
    asked = [
        "--nodes",
        "4",
        "--time",
        "1-02:30:00",
        "--partition",
        "gpu",
        "--qos",
        "high",
        "--mem",
        "8G",
        "--gpus",
        "8",
    ]
    done = run("launch/submit.py", "--config", "demo.yaml", "--dry-run", *asked)
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1590", "--qos=high", "--mem=8G"):
        assert f"#SBATCH {line}" in done.stdout
    assert "srun" in done.stdout and "scontrol requeue" in done.stdout and "run_dir:" in done.stdout


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--time", "soon"], "--time soon is no time"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--cluster", "local", "--nodes", "2"], "a local run has 1 node"),
        (["--cluster", "local", "--gpus", "99"], "this machine has"),
        (["--procs", "3"], "not divisible by 3 ranks"),
        (["--site", "nowhere"], "there are example"),
    ],
)
def test_bad_resources_are_one_line(option: list[str], said: str) -> None:
    assert said in _fails_in_one_line(run("launch/submit.py", "--config", "demo.yaml", "--dry-run", *option))


def test_status_and_cancel_name_what_is_no_run(tmp_path: Path) -> None:
    assert "no run directory" in _fails_in_one_line(run("launch/status.py", str(tmp_path)))
    assert "no SLURM job" in _fails_in_one_line(run("launch/cancel.py", str(tmp_path)))
