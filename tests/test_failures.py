"""A failure of the machine keeps its traceback and is queued again; a user error is final."""

import errno
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.failures import FAILED, FINAL_ERROR, MOST_ALIKE, USER_ERROR, _count_alike
from tests.conftest import ROOT, run
from tests.loaders import TOKENIZE, make_loaders
from tmass_dist.cli import MACHINE_FAILURE
from tmass_dist.data import loader, videos
from tmass_dist.data.index import load_index
from tmass_dist.data.remote import DownloadError
from tmass_dist.data.samples import DamagedError
from tmass_dist.data.videos import iterate_videos
from tmass_dist.errors import MachineError
from tmass_dist.training.checkpoint import saved_steps, weights_of

TASK = """
import sys
from pathlib import Path
from launch.failures import end_task
from tmass_dist.data.remote import fetch
from tmass_dist.errors import UserError
url, folder, restarts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
try:
    if not url:
        raise UserError("data.train is empty")
    fetch(url, folder / "cache", retry_s=0)
except Exception as error:
    end_task(error, folder=folder, job_id="7", restarts=restarts, name="rank 3", run=folder)
"""


def run_task(url: str, folder: Path, restarts: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TASK, url, str(folder), str(restarts)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def dead_url() -> str:
    """Of a port where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}/shard-000000.tar"


def test_a_store_that_does_not_answer_queues_the_job_again_until_it_fails_alike_too_often(
    tmp_path: Path, dead_url: str
) -> None:
    (tmp_path / "train.log").write_text("12:00:00 step 40/100 loss 1.0\n")
    final = tmp_path / f"{FINAL_ERROR}-7.txt"
    for restarts in range(MOST_ALIKE):
        assert not final.exists()  # the job would be queued again
        ended = run_task(dead_url, tmp_path, restarts)
        assert ended.returncode == FAILED
        assert "Traceback" in ended.stderr and "cannot be downloaded" in ended.stderr
        last = ended.stderr.rstrip().splitlines()[-1]
        assert last.startswith("error: rank 3: DownloadError: ") and dead_url in last
    assert f"({MOST_ALIKE} times in a row at step 40: not queued again)" in final.read_text()
    noted = [json.loads(line) for line in (tmp_path / "failures-7.jsonl").read_text().splitlines()]
    assert [(one["restart"], one["step"], one["task"]) for one in noted] == [
        (k, 40, "rank 3") for k in range(MOST_ALIKE)
    ]


def test_failures_that_differ_in_their_duration_alone_are_alike(tmp_path: Path) -> None:
    counts = [
        _count_alike(tmp_path / "failures-7.jsonl", "rank 3", restart, 40, message)
        for restart, message in enumerate(["no answer after 0 s", "no answer after 12 s", "no answer after 1.5 s", "7"])
    ]
    assert counts == [1, 2, 3, 1]


def test_a_user_error_is_final_at_once_and_has_no_traceback(tmp_path: Path) -> None:
    ended = run_task("", tmp_path, 0)
    assert ended.returncode == USER_ERROR and "Traceback" not in ended.stderr
    assert ended.stderr.strip() == "error: rank 3: data.train is empty"
    assert (tmp_path / f"{FINAL_ERROR}-7.txt").read_text() == "error: rank 3: data.train is empty\n"


STALE = """
import errno
from tmass_dist.data import samples
from tmass_dist.train import main, run_command

read_bytes, calls = samples._read_bytes, []

def stale(*arguments, **options):
    calls.append(1)
    if len(calls) == 100:
        raise OSError(errno.ESTALE, "Stale file handle", "shard")
    return read_bytes(*arguments, **options)

samples._read_bytes = stale
run_command(main)
"""
"""A training in which reading a shard fails once, as on a file server that was restarted."""


def test_a_transient_error_of_reading_costs_a_start_and_no_video(data: list[str], tmp_path: Path) -> None:
    settings = ["--config", "demo.yaml", *data, "max_steps=16", "eval_every=4", "data.num_workers=1"]
    run_dir = tmp_path / "run"
    failed = run("-c", STALE, *settings, f"run_dir={run_dir}")
    assert failed.returncode == MACHINE_FAILURE, failed.stderr
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Stale file handle" in errors[0] and "Traceback" not in failed.stderr, failed.stderr
    assert "Traceback (most recent call last)" in (run_dir / "train.log").read_text()
    assert not (run_dir / "quarantine.jsonl").exists(), "no video is damaged"
    assert 0 < saved_steps(run_dir / "checkpoints")[0] < 16

    for folder in (run_dir, tmp_path / "undisturbed"):  # the same command again; and a run without the failure
        done = run("-m", "tmass_dist.train", *settings, f"run_dir={folder}")
        assert done.returncode == 0, done.stderr
    one, other = (weights_of(path / "checkpoints" / "step-00000016") for path in (run_dir, tmp_path / "undisturbed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), MachineError, "OSError: [Errno 116] Stale file handle"),
        (KeyError("caption"), MachineError, "KeyError: 'caption'"),
        (
            DownloadError("a.tar cannot be downloaded"),
            DownloadError,
            "a.tar cannot be downloaded",
        ),
        (DamagedError("shard a.tar is damaged: no"), DamagedError, "shard a.tar is damaged: no"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_of_a_worker_keeps_its_kind_in_training_and_in_evaluation(
    data: list[str], monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    index = load_index(data[0].removeprefix("data.train="))
    training = make_loaders(index, 1, num_workers=1, max_bad=0.5)[0]
    if not isinstance(raised, DamagedError):  # training replaces the video
        monkeypatch.setattr(loader, "read_into", fail)
        with pytest.raises(kind) as caught:
            next(training.batches(0))
        assert type(caught.value) is kind and str(caught.value) == message
    monkeypatch.setattr(videos, "read_into", fail)
    with pytest.raises(kind) as caught:
        next(iterate_videos(index, batches=range(2), batch_size=2, tokenize=TOKENIZE, num_workers=1))
    assert type(caught.value) is kind and str(caught.value) == message
