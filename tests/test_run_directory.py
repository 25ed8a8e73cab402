"""The run directory: one writer, a failed start that claims nothing, files that may be damaged."""

import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch

from launch import submit
from launch.submitted import refuse_live, write_local_state
from tests.conftest import run
from tests.processes import processes_with, until
from tests.ranks import on_ranks
from tests.small_model import batch_of, config_of, own_rows, small_objective
from tmass_dist.cli import read_json
from tmass_dist.config import load_config
from tmass_dist.errors import UserError
from tmass_dist.training.checks import check, check_model
from tmass_dist.training.run_lock import RunLock


def test_the_second_start_says_who_holds_the_directory(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / "lock.json").read_text())
        line = f"in use by process {os.getpid()} on {holder['host']}, since {holder['since']}"
        with pytest.raises(UserError, match=line), RunLock(tmp_path, patience_s=0.1):
            pass
    with RunLock(tmp_path, patience_s=0.1):
        pass
    assert not (tmp_path / "lock.json").exists()


def test_a_submission_to_a_directory_in_use_leaves_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    write_local_state(tmp_path, "local-1", "RUNNING")
    monkeypatch.setattr(RunLock.__init__, "__defaults__", (0.1,))
    with RunLock(tmp_path):
        arguments = ["--cluster", "local", "--config", "demo.yaml", f"run_dir={tmp_path}", "model.pretrained=null"]
        monkeypatch.setattr("sys.argv", ["submit.py", *arguments])
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getpid()} "):
            submit.main()
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()
    assert json.loads((tmp_path / "jobs" / "local.json").read_text())["state"] == "RUNNING"
    refuse_live(tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tmass_dist.training.run_lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run("-c", code, str(tmp_path)).returncode == -signal.SIGKILL
    assert (tmp_path / "lock.json").exists()
    with RunLock(tmp_path, patience_s=0.1):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()


def test_a_start_that_failed_leaves_the_directory_to_other_settings(data: list[str], tmp_path: Path) -> None:
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *data, f"run_dir={tmp_path}", "max_steps=1"]
    failed = run(*command, "optim.frozen=[no.such.parameter]")
    assert failed.returncode == 2 and "no.such.parameter" in failed.stderr
    assert not (tmp_path / "config.yaml").exists()
    done = run(*command, "optim.lr=1e-5")
    assert done.returncode == 0, done.stderr
    assert load_config(str(tmp_path / "config.yaml")).optim.lr == 1e-5
    refused = run(*command, "optim.lr=2e-5")
    assert refused.returncode == 2 and "optim.lr: saved 1e-05" in refused.stderr


def test_a_start_that_failed_leaves_no_process(data: list[str], tmp_path: Path) -> None:
    """The decoding processes began before the start failed."""
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *data, f"run_dir={tmp_path}", "data.num_workers=2"]
    failed = run(*command, "optim.frozen=[no.such.parameter]", MARK_OF_TEST=str(tmp_path))
    assert failed.returncode == 2 and "no.such.parameter" in failed.stderr
    until(lambda: not processes_with("MARK_OF_TEST", str(tmp_path)), "end of its processes")


def test_more_frames_than_the_shards_hold_are_refused_with_both_remedies(data: list[str], tmp_path: Path) -> None:
    config = load_config("demo.yaml", [*data, f"run_dir={tmp_path}", "model.num_frames=24"])
    with pytest.raises(UserError, match=r"hold 12 frames .* set model.num_frames=12, or pack again with --num-frames"):
        check(config, 1)


def test_smaller_frames_than_the_towers_warn(data: list[str], caplog: pytest.LogCaptureFixture) -> None:
    from tmass_dist.data.index import load_index

    config = config_of()
    index = load_index(next(o for o in data if o.startswith("data.train=")).removeprefix("data.train="))
    model = small_objective(config)  # towers of 16 pixels
    check_model(model, index, config, logging.getLogger("quiet"))
    assert not caplog.records
    model.towers.image_size = 64
    check_model(model, index, config, logging.getLogger("sizes"))
    assert "32 pixels, which are enlarged to the towers' 64" in caplog.text


def test_towers_with_batch_norm_are_refused() -> None:
    config = config_of()
    model = small_objective(config)
    model.towers.clip.visual.extra = torch.nn.BatchNorm2d(3)
    with pytest.raises(UserError, match="has BatchNorm layers"):
        check_model(model, None, config, logging.getLogger("quiet"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("content", ["", "[{", "{}", "null", '[{"step": 3, "R@1"'], ids=range(5))
def test_a_damaged_file_that_a_run_can_do_without_is_ignored(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tmass_dist"), "propagate", True)
    path = tmp_path / "validation.json"
    path.write_text(content)
    assert read_json(path, list) is None
    assert f"{path} is ignored" in caplog.text
    path.write_text('["a line\u2028separator"]')
    assert read_json(path, list) == ["a line\u2028separator"]
    assert read_json(tmp_path / "missing.json", list) is None


MANIFESTS = {
    "empty": "",
    "cut": '{"step": 2, "parts": {"part-000',
    "list": "[]",
    "null": "null",
    "parts are a list": '{"step": 2, "world_size": 1, "parts": ["part-00000.safetensors"]}',
    "no parts": '{"step": 2, "world_size": 0, "parts": {}}',
    "another step": '{"step": 7, "world_size": 1, "parts": {"part-00000.safetensors": "SUM"}}',
    "step is text": '{"step": "two", "world_size": 1, "parts": {"part-00000.safetensors": "SUM"}}',
    "a part is missing": '{"step": 2, "world_size": 2, "parts": {"part-00000.safetensors": "SUM"}}',
    "another file": '{"step": 2, "world_size": 1, "parts": {"../../other.safetensors": "SUM"}}',
    "shapes are a number": '{"step": 2, "world_size": 1, "parts": {"part-00000.safetensors": "SUM"}, "shapes": 3}',
    "updates are text": '{"step": 2, "world_size": 1, "parts": {"part-00000.safetensors": "SUM"}, "num_updates": "2"}',
    "not unicode": b"\xff\xfe\x00",
    "deep": "[" * 20_000,
}


def _resume_with(directory: str) -> list[int]:
    from tmass_dist.training import checkpoint
    from tmass_dist.training.engine import Engine

    config = config_of()
    engine = Engine(small_objective(config), config)
    saver = checkpoint.Saver(engine, Path(directory))
    for step in (1, 2):
        engine.backward(*own_rows(batch_of(step)))
        engine.step(1.0)
        saver.begin(step)
        saver.finish()
    manifest = Path(directory) / "step-00000002" / checkpoint.MANIFEST
    good = manifest.read_text()
    checksum = json.loads(good)["parts"]["part-00000.safetensors"]
    resumed = [checkpoint.resume(engine, Path(directory))]
    for content in MANIFESTS.values():
        manifest.write_bytes(content if isinstance(content, bytes) else content.replace("SUM", checksum).encode())
        resumed.append(checkpoint.resume(engine, Path(directory)))
    manifest.write_text(good)
    return [*resumed, checkpoint.resume(engine, Path(directory))]


def test_a_manifest_that_is_not_what_was_written_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    [resumed] = on_ranks(1, _resume_with, str(tmp_path / "c"), tmp_path=tmp_path)
    assert resumed == [2, *[1] * len(MANIFESTS), 2]
