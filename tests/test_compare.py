"""Runs side by side: their results with labels, and paired differences where these make sense."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from launch.compare import DIRECTIONS, METRICS, Row, markdown, terminal
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
    page = tmp_path / "pages" / "runs.html"
    done = run("launch/compare.py", str(runs), "--out", str(tmp_path / "out"), "--html", str(page))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "comparison.md").read_text()
    labels = "protocol query_conditioned, M = 20, checkpoint selected on val, post-processing none, precision float32"
    assert labels in text and "Differences from a (95 %" in text
    [row] = re.findall(r"\| b \| ([-+].*) \|", text)
    (a, ids), (b, _) = (read_ranks(runs / name / "evaluation") for name in "ab")
    assert ids[0][1] == 0 and len(ids) == len(a.t2v_T)
    gains = [float(cell.split(" ")[0]) for cell in row.split(" | ")]
    names = ("R@1", "R@5", "R@10", "MdR", "MnR")
    expected = [metrics(b.t2v_T)[n] - metrics(a.t2v_T)[n] for n in names]
    expected += [metrics(b.v2t_V)[n] - metrics(a.v2t_V)[n] for n in names]
    assert gains == pytest.approx(expected, abs=0.05) and any(gains)
    assert "| c | not compared: c is not evaluated |" in text
    html = page.read_text()
    assert row.split(" | ")[0].replace(" (", "<br>(") in html and "not compared: c is not evaluated" in html
    shown = re.findall(r"^b +[\d.]+ \([\d.]+ to [\d.]+\) +([-+][\d.]+) \(", done.stdout, re.MULTILINE)
    assert [float(one) for one in shown] == pytest.approx([expected[0], expected[5]], abs=0.05)
    assert "c: not compared: c is not evaluated" in done.stdout and f"b: {labels}" in " ".join(done.stdout.split())


def test_lines_fit_a_terminal_and_names_stay_apart() -> None:
    long = "a-run-with-a-name-that-is-longer-than-any-column-of-the-table"
    rows = [Row(Path(f"runs/{long}-{k}"), {"optim.lr": 10.0**-k, "data.train": "/data/" + "x" * 100}) for k in (5, 6)]
    for row in rows:
        row.scores = {(direction, name): "100.0" for direction in DIRECTIONS for name in METRICS}
        row.intervals = dict.fromkeys(row.scores, "100.0 to 100.0")
        row.differences = dict.fromkeys(row.scores, "-100.0 (-100.0 to +100.0)")
    for width in (80, 100, 200):
        lines = terminal(rows, width).splitlines()
        assert max(map(len, lines)) <= width
        assert len({line.split()[0] for line in lines if line.startswith("a-run")}) == 2
    middle = [Row(Path(f"optim.lr=1e-{k},data.batch_size=32,model.radius=exp_mean"), {}) for k in (4, 5)]
    assert [line[:10] for line in terminal(middle, 80).splitlines()[1:3]] == ["1 optim.lr", "2 optim.lr"]
    settings = {"log.to": ("tensorboard", "wandb"), "engine.save_every": None, "data.augment": True}
    shown = " ".join(terminal([Row(Path("a"), settings)], 80).split())
    assert shown.endswith("log.to a [tensorboard,wandb] engine.save_every a null data.augment a true")
    text = markdown([Row(Path("a|b"), {"data.train": "x|y"})])
    assert "| a\\|b | x\\|y | - |" in text


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
