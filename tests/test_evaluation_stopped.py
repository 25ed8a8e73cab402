"""An evaluation that is stopped while it scores or writes its report leaves at once, and the next start continues."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import ROOT, run
from tests.test_evaluation import write_store

SLOW = {
    "scoring": """
from tmass_dist.evaluation import blocks
scores = blocks.BlockScorer.scores
def slow(self, *more):
    for number, block_TV in enumerate(scores(self, *more)):
        if number == 1:
            open(MARK, "w").close()
            time.sleep(1000)
        yield block_TV
blocks.BlockScorer.scores = slow
""",
    "report": """
from tmass_dist.evaluation import report
def slow(self):
    open(MARK, "w").close()
    time.sleep(1000)
report.Report.html = slow
""",
}
"""Code that makes one part of an evaluation slow, after it has created the file ``MARK``."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stopped") / "features")


@pytest.mark.parametrize("part", SLOW)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_evaluation_leaves_at_once_and_continues(
    stored: Path, tmp_path: Path, part: str, number: signal.Signals
) -> None:
    mark, out, error = tmp_path / "mark", tmp_path / "out", tmp_path / "error"
    code = f"import time\nMARK = {str(mark)!r}\n{SLOW[part]}\nfrom tmass_dist.evaluate import main, run_command\n"
    code += "run_command(main)"
    arguments = ["--features", str(stored), "--out", str(out)]
    process = forked.start(
        "-c", code, *arguments, environment={**os.environ}, cwd=ROOT, stdout=Path(os.devnull), stderr=error
    )
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < deadline and process.is_alive(), error.read_text()
        time.sleep(0.05)
    assert process.pid
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert "Traceback" not in error.read_text()
    done = {path: path.stat().st_mtime_ns for path in out.rglob("rows-*.safetensors")}
    assert len(done) == (1 if part == "scoring" else 3) and not (out / "report.html").exists()

    again = run("-m", "tmass_dist.evaluate", *arguments)
    assert again.returncode == 0, again.stderr
    assert all(
        path.stat().st_mtime_ns == before for path, before in done.items()
    )  # what was scored is not scored again
    whole = tmp_path / "whole"
    assert run("-m", "tmass_dist.evaluate", "--features", str(stored), "--out", str(whole)).returncode == 0
    for name in ("metrics.json", "ranks.csv", "video_ranks.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not list(out.rglob("*.tmp"))
