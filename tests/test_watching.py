"""The curves of a run: a run that was killed and resumed has those of one that was never stopped, in every logger."""

import gzip
import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run
from tests.processes import train_and_be_killed
from tmass_dist.config import load_config
from tmass_dist.errors import UserError
from tmass_dist.loggers import MetricsFile, check_loggers, open_loggers, read_metrics

SETTINGS = ["max_steps=12", "eval_every=6", "log_every=1", "engine.keep=9"]
OPTIONS = ["engine.save_every=4", "eval_at_start=true", "engine.profile_steps=2..3"]
KILLED_AT = 10


def _train(run_dir: Path, data: list[str], *more: str) -> list[str]:
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *data, *SETTINGS, "eval_at_start=false"]
    return [*command, f"run_dir={run_dir}", *more]


@pytest.fixture(scope="module")
def undisturbed(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("watching") / "plain"
    done = run(*_train(run_dir, data))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def resumed(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed after step 10, so resumed from step 8, which is no validation; with every logger and option."""
    folder = tmp_path_factory.mktemp("resumed")
    run_dir = folder / "run"
    command = _train(run_dir, data, *OPTIONS, "log.to=[tensorboard,wandb,trackio]")
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    train_and_be_killed(KILLED_AT, command[2:], folder, **environment)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss/tot')  # as a kill in the middle of a write leaves it
    done = run(*command, **environment)
    assert done.returncode == 0, done.stderr
    assert "step 8 of 12" in (run_dir / "train.log").read_text()
    return run_dir


def _without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "time" and not k.startswith("speed/")} for line in lines]


def test_a_resumed_run_has_the_lines_and_weights_of_one_that_was_never_stopped(
    undisturbed: Path, resumed: Path
) -> None:
    """So checkpoints between validations, the validation at the start, the profiler and the loggers change nothing."""
    plain, other = (_without_times(read_metrics(path / "metrics.jsonl")) for path in (undisturbed, resumed))
    assert [line["step"] for line in plain] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]
    assert other[0]["step"] == 0 and any(key.startswith("metrics/val/") for key in other[0])
    assert other[1:] == plain
    weights, resumed_weights = (load_file(path / "checkpoints" / "best.safetensors") for path in (undisturbed, resumed))
    assert all(torch.equal(value, resumed_weights[name]) for name, value in weights.items())
    steps = {path.name for path in (resumed / "checkpoints").glob("step-*")}
    assert {"step-00000004", "step-00000008"} <= steps


def test_hours_include_the_start_that_was_killed(resumed: Path) -> None:
    hours = [line["speed/cpu_hours"] for line in read_metrics(resumed / "metrics.jsonl") if "speed/cpu_hours" in line]
    assert hours == sorted(hours) and hours[0] > 0
    [last] = [line for line in (resumed / "train.log").read_text().splitlines() if "in all starts" in line]
    assert "CPU-hours" in last and "best val t2v R@1" in last and "at step" in last


def test_tensorboard_holds_every_step_once_and_the_same_values(resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed)).Reload()
    lines = [line for line in read_metrics(resumed / "metrics.jsonl") if "loss/total" in line]
    points = [(point.step, point.value) for point in events.Scalars("loss/total")]
    assert points == [(line["step"], pytest.approx(line["loss/total"], rel=1e-6)) for line in lines]
    for direction in ("t2v", "v2t"):
        validations = events.Scalars(f"metrics/val/query_conditioned/M20/{direction}_R@1")
        assert [point.step for point in validations] == [0, 6, 12]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "stochastic:" in config and "save_every: 4" in config
    assert "loss/kl" not in events.Tags()["scalars"] and "loss/support" in events.Tags()["scalars"]
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("final")]


def test_a_run_that_version_0_1_began_is_one_run_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    config = load_config("demo.yaml", [f"run_dir={tmp_path}"])
    with SummaryWriter(str(tmp_path / "tensorboard")) as old:
        for step in range(1, 11):
            old.add_scalar("loss/total", 1.0, step)
    for logger in open_loggers(config, 8, {}):
        logger.scalars({"loss/total": 2.0}, 9)
        logger.close(complete=False)
    assert not (tmp_path / "tensorboard").exists()
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/total")
    assert [(point.step, point.value) for point in points] == [*((step, 1.0) for step in range(1, 9)), (9, 2.0)]


def _wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: a header of 7 bytes, then LevelDB's log format, up to an incomplete record."""
    content, position, record = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        room = 32768 - position % 32768  # of the block
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(content) or kind == 0:
            return
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def test_wandb_offline_keeps_one_run_with_every_step(resumed: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    run_id = (resumed / "run-id").read_text().strip()
    files = sorted((resumed / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2  # a file for each start; `wandb sync` joins them by the id
    logged: list[tuple[int, float]] = []
    for data in (data for file in files for data in _wandb_records(file)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "loss/total" in row:
            logged.append((record.history.step.num, json.loads(row["loss/total"])))
    lines = [line for line in read_metrics(resumed / "metrics.jsonl") if "loss/total" in line]
    expected = {line["step"]: line["loss/total"] for line in lines}
    assert len(logged) == len(dict(logged))  # no step twice
    # wandb writes in the background, so the killed start may have lost its last lines, and nothing else.
    assert {1, 2, 11, 12} <= set(dict(logged))
    assert dict(logged) == {step: pytest.approx(expected[step]) for step, _ in logged}


def test_trackio_keeps_one_run_with_every_step(resumed: Path) -> None:
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "runs = S.get_runs('tmass-dist'); print(json.dumps([runs, S.get_logs('tmass-dist', runs[0])], default=str))"
    )
    done = run("-c", code, TRACKIO_DIR=str(resumed.parent / "trackio"))
    assert done.returncode == 0, done.stderr
    runs, logs = json.loads(done.stdout.splitlines()[-1])
    assert runs == [f"run-{(resumed / 'run-id').read_text().strip()}"]
    steps = Counter(row["step"] for row in logs if "loss/total" in row)
    assert set(steps.values()) == {1} and {1, 2, 11, 12} <= set(steps)


def test_the_profile_holds_the_steps_of_its_range(resumed: Path) -> None:
    files = {path.name for path in (resumed / "profile").iterdir()}
    assert files == {"steps-2-3.trace.json.gz", "steps-2-3.operators.txt"}
    with gzip.open(resumed / "profile" / "steps-2-3.trace.json.gz", "rt") as file:
        names = Counter(event.get("name") for event in json.load(file)["traceEvents"])
    assert names["aten::mm"] > 10
    assert [name for name in names if str(name).startswith("step ")] == ["step 2", "step 3"]
    assert "aten::" in (resumed / "profile" / "steps-2-3.operators.txt").read_text()


def test_a_profile_beyond_the_end_is_one_line(data: list[str], tmp_path: Path) -> None:
    done = run(*_train(tmp_path / "run", data, "engine.profile_steps=10..13"))
    assert done.returncode == 2 and "engine.profile_steps is '10..13': the run has 12 steps" in done.stderr
    assert len(done.stderr.strip().splitlines()) < 5 and "Traceback" not in done.stderr


@pytest.mark.parametrize("steps", ["5", "5..2", "0..3", "a..b", "1..500", ""])
def test_a_bad_profile_range_is_one_line(steps: str) -> None:
    with pytest.raises(UserError, match=r"^engine\.profile_steps is "):
        load_config("demo.yaml", [f"engine.profile_steps='{steps}'"])


def test_an_unknown_logger_or_one_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^log\.to is 'mlflow': the loggers are tensorboard, wandb, trackio"):
        load_config("demo.yaml", ["log.to=[mlflow]"])
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks a package that cannot be imported
    with pytest.raises(UserError, match=r"has wandb, which is not installed: pip install 'tmass-dist\[wandb\]'"):
        check_loggers(load_config("demo.yaml", ["log.to=[wandb]"]))


def test_wandb_without_a_login_is_one_line(data: list[str], tmp_path: Path) -> None:
    command = _train(tmp_path / "run", data, "log.to=[wandb]")
    done = run(*command, WANDB_MODE="online", HOME=str(tmp_path), WANDB_API_KEY="")
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "WANDB_MODE=offline" in line and "Traceback" not in done.stderr


def test_lines_of_the_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.scalars({"loss/total": float("nan")}, 1)
    file.scalars({"loss/total": 2.0}, 2)
    file.scalars({"metrics/val/query_conditioned/t2v_R@1": 3.0}, 2)
    assert [json.loads(line).get("loss/total", 0) for line in path.read_text().splitlines()] == [None, 2.0, 0]
    with path.open("ab") as raw:
        raw.write(b'[1]\n{"step": "x"}\n\xff\xfe\n{"step": 3, "loss/t')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2]
    MetricsFile(path, 2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2]
    MetricsFile(path, 2, repeats_validation=True)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    after = MetricsFile(path, None)
    for recall in (5.0, 6.0):  # a second evaluation replaces the first
        after.result({"metrics/test/query_conditioned/t2v_R@1": recall}, 1)
    assert [line.get("metrics/test/query_conditioned/t2v_R@1") for line in read_metrics(path)] == [None, None, 6.0]
    MetricsFile(path, 0)
    assert read_metrics(path) == []
