"""Damaged stores, and stores that others made: each file is checked, and what is wrong is one line."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import run
from tests.stores import V, make_part, write_store
from tmass_dist.errors import UserError
from tmass_dist.evaluation import features as store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("features"))


def _evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "tmass_dist.evaluate", *arguments)


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("name", ["frames.npy", "texts.npy", "captions.jsonl", "head.safetensors"])
@pytest.mark.parametrize("damage", ["bit", "torn", "missing"])
def test_a_damaged_file_of_a_store_is_named(made: Path, tmp_path: Path, name: str, damage: str) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    content = (directory / name).read_bytes()
    if damage == "bit":
        (directory / name).write_bytes(content[:-50] + bytes([content[-50] ^ 1]) + content[-49:])
    elif damage == "torn":
        (directory / name).write_bytes(content[: len(content) // 2])
    else:
        (directory / name).unlink()
    state = "missing" if damage == "missing" else "damaged"
    assert f"{name} is {state}" in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "a newer version"),
        ({"version": 1}, "an older version"),
        ({"version": "?"}, "an older version"),
        ({"checkpoint": "other"}, "its checksum differs"),
        ({"video_ids": ["v1"]}, "its checksum differs"),
        ("[[[[", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("7", "is damaged"),
    ],
)
def test_a_damaged_index_is_one_line(made: Path, tmp_path: Path, change: dict | str, message: str) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(change if isinstance(change, str) else json.dumps(index | change))
    assert message in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))


def test_an_index_with_a_right_checksum_and_missing_entries_is_one_line(made: Path, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    about = store.read_index(directory)
    for key, value in (("config", None), ("fingerprint", 3), ("video_ids", {}), ("weights_sha256", None)):
        store.write_index(directory, about | {key: value})
        assert f"{key} is missing" in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))
    store.write_index(directory, about | {"video_ids": about["video_ids"][1:]})
    assert "no feature store" in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": 7}, ""),
        ({"selection": {"selected_on": ["val"], "query_scoring_tau": "0"}}, ""),
        ({"selection": {"query_scoring_tau": 0}}, ""),
        ({"before_training": [1]}, "scores before training"),
        ({"before_training": {"row": {"t2v": {"R@1": "<b>"}}}}, "scores before training"),
        ({"shards": 7}, ""),
        ({"shards": "https://127.0.0.1:9/nowhere"}, ""),
        ({"split": "<script>"}, ""),
    ],
)
def test_facts_in_an_index_of_others_break_nothing(
    made: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    store.write_index(directory, store.read_index(directory) | change)
    done = _evaluate("--features", str(directory), "--out", str(tmp_path / "out"))
    if message:
        assert message in _one_line(done)
        return
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not chosen here" in done.stdout and page.count("<script") == 1


def test_features_that_are_not_finite_are_named() -> None:
    parts = [make_part(list(range(n, V, 2))) for n in range(2)]
    parts[1].frames_VFD[1, 0, 0] = torch.nan
    parts[1].text_TD[parts[1].caption_ids.index(("v5", 0))] = torch.inf
    with pytest.raises(UserError, match="2 features are not finite numbers: v3, v5 caption 0"):
        store.merge(parts, [f"v{n}" for n in range(V)])
    with pytest.raises(UserError, match="45 videos were encoded by no rank: v1, v3"):
        store.merge(parts[:1], [f"v{n}" for n in range(V)])


def test_a_store_cannot_read_the_environment(made: Path, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    about = store.read_index(directory)
    config = about["config"].replace("run_dir: runs/demo", "run_dir: ${oc.env:SECRET_OF_TEST}")
    assert config != about["config"]
    store.write_index(directory, about | {"config": config})
    command = ["-m", "tmass_dist.evaluate", "--features", str(directory), "--out", str(tmp_path)]
    refused = run(*command, SECRET_OF_TEST="hunter2")
    assert "--allow-env" in _one_line(refused) and "hunter2" not in refused.stderr + refused.stdout
    assert run(*command, "--allow-env", SECRET_OF_TEST="hunter2").returncode == 0


def test_the_bank_is_compared_by_its_weights_and_named_in_the_result(made: Path, tmp_path: Path) -> None:
    command = ["--features", str(made), "--out", str(tmp_path / "out"), "--post-processing", "qbnorm", "--bank"]
    bank = write_store(tmp_path / "bank", checkpoint="a/copy/of/best.safetensors")
    done = _evaluate(*command, str(bank))
    assert done.returncode == 0 and "qbnorm (transductive)" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["bank"] == str(bank)
    other = write_store(tmp_path / "other", weights_sha256="another")  # at the same path, other weights
    assert "weights_sha256 differs" in _one_line(_evaluate(*command, str(other)))
