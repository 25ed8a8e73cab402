"""What a task of a job leaves when it fails: a machine's failure is queued again, a user error is not."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.failures import FAILED, FINAL_ERROR, MOST_ALIKE, USER_ERROR
from tests.conftest import ROOT

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


def test_a_user_error_is_final_at_once_and_has_no_traceback(tmp_path: Path) -> None:
    ended = run_task("", tmp_path, 0)
    assert ended.returncode == USER_ERROR and "Traceback" not in ended.stderr
    assert ended.stderr.strip() == "error: rank 3: data.train is empty"
    assert (tmp_path / f"{FINAL_ERROR}-7.txt").read_text() == "error: rank 3: data.train is empty\n"
