"""State of a run: ``python launch/status.py [RUN]``, from its directory and SLURM; without RUN, all in runs/."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import slurm  # noqa: E402
from launch.failures import FINAL_ERROR  # noqa: E402
from launch.results import METRICS, read_result  # noqa: E402
from launch.submitted import jobs_of, local_state  # noqa: E402
from tmass_dist.cli import program, read_object, run_command  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402
from tmass_dist.score_labels import label_words  # noqa: E402

_STEP = re.compile(r"step (\d+)/(\d+) loss ([\d.nan]+), ([\d.]+) videos/s(?:.*, ETA (\S+))?")


def describe(run: Path) -> str:
    """One paragraph on a run.

    Raises:
        UserError: it is not a run directory.
    """
    if not (run / "jobs").is_dir() and not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run directory: it has neither jobs/ nor config.yaml")
    lines = [str(run)]
    for part in (_jobs, _local, _progress, _best, _result, _notes):
        try:
            lines += [f"  {line}" for line in part(run)]
        except UserError as error:
            lines.append(f"  {error}")
    return "\n".join(lines)


def _jobs(run: Path) -> Iterator[str]:
    for job in jobs_of(run):
        state = slurm.slurm_state(job["id"])
        reason = ""
        if slurm.is_alive(state):
            answer = subprocess.run(["squeue", "-h", "-j", job["id"], "-o", "%N %r"], capture_output=True, text=True)
            reason = " ".join(answer.stdout.split())
        yield f"{job['step']}: job {job['id']}: {state} {reason}".rstrip()


def _local(run: Path) -> Iterator[str]:
    if state := local_state(run):
        yield state


def _progress(run: Path) -> Iterator[str]:
    if steps := _STEP.findall(_text(run / "train.log")):
        step, total, loss, rate, eta = steps[-1]
        yield f"step {step} of {total}, loss {loss}, {rate} videos/s" + (f", {eta} left" if eta else "")


def _best(run: Path) -> Iterator[str]:
    path = run / "checkpoints" / "best.json"
    if path.is_file():
        keys = {"selected_on": str, "R@1": int | float, "step": int}
        chosen = read_object(path, keys, "the next better validation writes it again")
        labels = ", ".join(label_words({"protocol": "unknown", **chosen, "selected_on": None}))
        yield f"best {chosen['selected_on']} t2v R@1 {chosen['R@1']:.1f} ({labels}) at step {chosen['step']}"


def _result(run: Path) -> Iterator[str]:
    if result := read_result(run):
        numbers = ", ".join(f"{name} {result['t2v'][name]:.1f}" for name in METRICS)
        yield f"{result.get('split', 'test')} t2v ({', '.join(label_words(result))}): {numbers}"


def _notes(run: Path) -> Iterator[str]:
    errors = [] if (run / "jobs" / "local.json").is_file() else sorted((run / "jobs").glob(f"{FINAL_ERROR}-*.txt"))
    for note in (run / "jobs" / "restarts.log", *errors):
        yield from _text(note).splitlines()


def _text(path: Path) -> str:
    """The content of a file; "" where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python launch/status.py"), description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a run directory")
    arguments = parser.parse_args()
    runs = [arguments.run] if arguments.run else sorted(path.parent for path in Path("runs").glob("**/jobs"))
    if not runs:
        raise UserError("there is no run below runs/; name a run directory")
    for run in runs:
        print(describe(run))


if __name__ == "__main__":
    run_command(main)
