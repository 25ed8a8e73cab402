"""Runs side by side: their results with labels, and paired differences where these make sense."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import run
from tests.test_evaluate_run import make_run
from tmass_dist.evaluation.ranking import metrics
from tmass_dist.evaluation.report import read_ranks


@pytest.fixture(scope="module")
def runs(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two evaluated runs, of different heads, and one that is not evaluated."""
    base = tmp_path_factory.mktemp("runs")
    for name in ("a", "b", "c"):
        directory = make_run(data, base / name)
        weights = load_file(directory / "checkpoints" / "best.safetensors")
        weights["head.pooling.out.weight"] *= -1.0 if name == "b" else 1.0
        save_file(weights, directory / "checkpoints" / "best.safetensors")
        if name != "c":
            assert run("-m", "tmass_dist.evaluate", "--run", str(directory)).returncode == 0
    return base


def test_differences_are_paired_and_those_of_the_metrics(runs: Path, tmp_path: Path) -> None:
    done = run("launch/compare.py", str(runs), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "comparison.md").read_text() == done.stdout
    assert "query_conditioned, 20, val, none" in done.stdout and "Differences from a (95 %" in done.stdout
    [row] = re.findall(r"\| b \| ([-+].*) \|", done.stdout)
    (a, ids), (b, _) = (read_ranks(runs / name / "evaluation") for name in "ab")
    assert ids[0][1] == 0 and len(ids) == len(a.t2v_T)
    gains = [float(cell.split(" ")[0]) for cell in row.split(" | ")]
    names = ("R@1", "R@5", "R@10", "MdR", "MnR")
    expected = [metrics(b.t2v_T)[n] - metrics(a.t2v_T)[n] for n in names]
    expected += [metrics(b.v2t_V)[n] - metrics(a.v2t_V)[n] for n in names]
    assert gains == pytest.approx(expected, abs=0.05) and any(gains)
    assert "| c | not compared: c is not evaluated |" in done.stdout


def test_results_that_must_not_be_subtracted_are_named(runs: Path, data: list[str], tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name)
    command = ["-m", "tmass_dist.evaluate", "--run", str(tmp_path / "b")]
    val = next(entry for entry in data if entry.startswith("data.val=")).replace("data.val", "data.test")
    for more, reason in (
        (["evaluation.protocol=published_code"], "protocol differs"),
        ([val], "it was evaluated on other captions"),
    ):
        assert run(*command, *more).returncode == 0
        done = run("launch/compare.py", str(tmp_path / "a"), str(tmp_path / "b"))
        assert done.returncode == 0 and f"not compared: {reason}" in done.stdout, done.stderr
    assert run(*command).returncode == 0
    ranks = tmp_path / "b" / "evaluation" / "video_ranks.csv"
    for content in ("", "video_id,rank\nv1,many\n", 'video_id,rank\n"v1'):
        ranks.write_text(content)
        done = run("launch/compare.py", str(tmp_path / "a"), str(tmp_path / "b"))
        assert done.returncode == 0 and "video_ranks.csv is missing or damaged" in done.stdout, done.stdout
