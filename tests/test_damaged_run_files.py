"""Files of a run directory that are damaged: the commands that read them name the file in one line."""

import json
from pathlib import Path

import pytest

from launch.compare import compare
from launch.results import read_result
from launch.status import describe
from launch.submitted import jobs_of, local_state
from tests.conftest import run as run_command
from tmass_dist.audit.ours import similarity_of_run
from tmass_dist.cli import read_json
from tmass_dist.config import Config, to_yaml
from tmass_dist.errors import UserError

SCORES = {name: 1.0 for name in ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")}
RESULT = {"protocol": "query_conditioned", "t2v": SCORES, "v2t": SCORES, "split": "test"}
BAD = {
    "empty": b"",
    "cut off": b'{"id": 1',
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
    "other keys": b'{"a": 1}',
    "deep": b"[" * 20_000,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that is evaluated, as far as these commands look at it."""
    run = tmp_path / "run"
    for folder in ("jobs", "checkpoints", "evaluation"):
        (run / folder).mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(Config()))
    (run / "train.log").write_text("step 3/6 loss 4.4690, 31.4 videos/s\n")
    (run / "checkpoints" / "best.json").write_text(json.dumps({"selected_on": "val", "R@1": 25.0, "step": 3}))
    (run / "evaluation" / "metrics.json").write_text(json.dumps(RESULT))
    return run


def _one_line(text: str, path: Path) -> None:
    assert "\n" not in text and f"{path} is damaged: " in text and "; " in text, text


def test_status_without_damage(run_dir: Path) -> None:
    lines = describe(run_dir).splitlines()
    assert len(lines) == 4 and "step 3 of 6" in lines[1] and "R@1 25.0" in lines[2] and "MnR 1.0" in lines[3]


@pytest.mark.parametrize("name", BAD)
def test_status_names_each_damaged_file_and_shows_the_others(run_dir: Path, name: str) -> None:
    files = ["jobs/jobs.json", "jobs/local.json", "checkpoints/best.json", "evaluation/metrics.json"]
    for file in files:
        (run_dir / file).write_bytes(BAD[name])
    lines = describe(run_dir).splitlines()
    assert len(lines) == 6 and "step 3 of 6" in lines[3]
    for file, line in zip(files, [lines[1], lines[2], *lines[4:]]):
        _one_line(line, run_dir / file)


@pytest.mark.parametrize("file", ["train.log", "jobs/restarts.log", "jobs/final-error-1.txt"])
def test_status_reads_notes_that_are_not_utf8(run_dir: Path, file: str) -> None:
    (run_dir / file).write_bytes(b"\xff step 4/6 loss 1.0, 2.0 videos/s\n")
    assert "step 4" in describe(run_dir)


@pytest.mark.parametrize("name", BAD)
def test_a_list_of_jobs_and_a_result_are_not_guessed(run_dir: Path, name: str) -> None:
    for file, read in (("jobs/jobs.json", jobs_of), ("jobs/local.json", local_state)):
        (run_dir / file).write_bytes(BAD[name])
        with pytest.raises(UserError) as error:
            read(run_dir)
        _one_line(str(error.value), run_dir / file)
    (run_dir / "evaluation" / "metrics.json").write_bytes(BAD[name])
    with pytest.raises(UserError) as error:
        compare([run_dir])
    _one_line(str(error.value), run_dir / "evaluation" / "metrics.json")


@pytest.mark.parametrize(
    "change",
    [
        {"t2v": SCORES | {"R@1": "high"}},
        {"v2t": {}},
        {"intervals_95": []},
        {"intervals_95": {"t2v": {"R@1": [1]}}},
        {"intervals_95": {"t2v": {"R@1": [None, 2]}}},
        {"protocol": None},
    ],
)
def test_a_result_with_a_wrong_number_is_named(run_dir: Path, change: dict) -> None:
    path = run_dir / "evaluation" / "metrics.json"
    path.write_text(json.dumps(RESULT | change))
    with pytest.raises(UserError) as error:
        read_result(run_dir)
    _one_line(str(error.value), path)


def test_a_job_without_its_number_is_named(run_dir: Path) -> None:
    (run_dir / "jobs" / "jobs.json").write_text(json.dumps({"jobs": [{"step": "train"}]}))
    with pytest.raises(UserError, match="a job has no step or no id"):
        jobs_of(run_dir)


def test_settings_of_others_do_not_read_the_environment(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", "7")
    (run_dir / "config.yaml").write_text("seed: ${oc.env:SECRET_OF_TEST}\n")
    (run_dir / "checkpoints" / "best.safetensors").touch()
    for work in (lambda: compare([run_dir]), lambda: similarity_of_run(run_dir, [])):
        with pytest.raises(UserError, match=r"config\.yaml reads the environment of this machine"):
            work()


def test_a_file_that_training_can_do_without_is_ignored_whatever_it_holds(tmp_path: Path) -> None:
    for content in BAD.values():
        (tmp_path / "validation.json").write_bytes(content)
        assert read_json(tmp_path / "validation.json", int) is None


def test_a_page_is_not_written_to_a_directory(run_dir: Path) -> None:
    done = run_command("launch/compare.py", str(run_dir), "--html", str(run_dir))
    assert (
        done.returncode == 2 and "is a directory; name a file in it" in done.stderr and "Traceback" not in done.stderr
    )
    assert not list(run_dir.parent.glob("*.tmp"))
