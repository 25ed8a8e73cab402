"""An evaluation that is stopped in any of its steps leaves at once, and the next start continues."""

import os
import signal
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import ROOT, run
from tests.processes import until
from tests.stores import write_store
from tests.test_evaluate_run import make_run
from tmass_dist.evaluation.encode import BATCHES_PER_CHUNK

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
def slow(*_):
    open(MARK, "w").close()
    time.sleep(1000)
report.Report.html = slow
""",
}
"""Code that makes one part of an evaluation slow, after it has created the file ``MARK``."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stopped") / "features")


def _stop_in(slow: str, arguments: list[str], folder: Path, number: int) -> int | None:
    """Send a signal to an evaluation that has come to its slow part; its exit code."""
    mark, error = folder / "mark", folder / "error"
    code = f"import time\nMARK = {str(mark)!r}\n{slow}\nfrom tmass_dist.evaluate import main, run_command\n"
    code += "run_command(main)"
    process = forked.start(
        "-c", code, *arguments, environment={**os.environ}, cwd=ROOT, stdout=Path(os.devnull), stderr=error
    )
    until(lambda: mark.exists() or not process.is_alive(), "slow part")
    assert process.is_alive() and process.pid, error.read_text()
    os.kill(process.pid, number)
    process.join(180)
    assert "Traceback" not in error.read_text()
    return process.exitcode


@pytest.mark.parametrize("part", SLOW)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_evaluation_leaves_at_once_and_continues(
    stored: Path, tmp_path: Path, part: str, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    arguments = ["--features", str(stored), "--out", str(out)]
    code = _stop_in(SLOW[part], arguments, tmp_path, number)
    assert code == (130 if number == signal.SIGINT else -signal.SIGTERM)
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


COUNT_CHUNKS = """
from tmass_dist.evaluation import encode as encoding
encode_batches = encoding.encode_batches
def counted(model, index, tokenize, config, device, batches, *more):
    with open(MARK + ".chunks", "a") as file:
        print(batches.start, file=file)
    if SLOW and batches.start > 0:
        open(MARK, "w").close()
        time.sleep(1000)
    return encode_batches(model, index, tokenize, config, device, batches, *more)
encoding.encode_batches = counted
"""
"""Notes the first batch of each chunk of videos that is encoded. All but the first chunk take very long if ``SLOW``."""


def test_an_encoding_leaves_at_once_and_continues(data: list[str], tmp_path: Path) -> None:
    interrupted, whole = (make_run(data, tmp_path / name, "evaluation.baselines=none") for name in ("one", "other"))
    arguments = ["--run", str(interrupted)]
    assert _stop_in("SLOW = True" + COUNT_CHUNKS, arguments, tmp_path, signal.SIGTERM) == -signal.SIGTERM
    assert not (interrupted / "evaluation" / "features" / "index.json").exists()

    mark = tmp_path / "mark"
    code = f"SLOW, MARK = False, {str(mark)!r}\n{COUNT_CHUNKS}\nfrom tmass_dist.evaluate import main, run_command\n"
    assert run("-c", code + "run_command(main)", *arguments).returncode == 0
    first, *others = Path(f"{mark}.chunks").read_text().split()
    assert first == "0" and others == [str(BATCHES_PER_CHUNK)] * 2, "the first chunk was encoded once"
    assert run("-m", "tmass_dist.evaluate", "--run", str(whole)).returncode == 0
    for name in ("ranks.csv", "video_ranks.csv", "features/frames.npy", "features/texts.npy"):
        assert (interrupted / "evaluation" / name).read_bytes() == (whole / "evaluation" / name).read_bytes()
    assert not list((interrupted / "evaluation").rglob("encoding-*"))
