"""State of a run: ``python launch/status.py [RUN]``, from its directory and SLURM; without RUN, all in runs/."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch import slurm  # noqa: E402
from launch.failures import FINAL_ERROR  # noqa: E402
from launch.submitted import jobs_of, local_state  # noqa: E402
from tmass_dist.cli import program, run_command  # noqa: E402
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
    for job in jobs_of(run):
        state = slurm.slurm_state(job["id"])
        reason = ""
        if slurm.is_alive(state):
            answer = subprocess.run(["squeue", "-h", "-j", job["id"], "-o", "%N %r"], capture_output=True, text=True)
            reason = " ".join(answer.stdout.split())
        lines.append(f"  {job['step']}: job {job['id']}: {state} {reason}".rstrip())
    local = local_state(run)
    if local:
        lines.append(f"  {local}")
    log = run / "train.log"
    steps = _STEP.findall(log.read_text(encoding="utf-8")) if log.is_file() else []
    if steps:
        step, total, loss, rate, eta = steps[-1]
        lines.append(f"  step {step} of {total}, loss {loss}, {rate} videos/s" + (f", {eta} left" if eta else ""))
    best = run / "checkpoints" / "best.json"
    if best.is_file():
        chosen = json.loads(best.read_text(encoding="utf-8"))
        labels = ", ".join(label_words({"protocol": "unknown", **chosen, "selected_on": None}))
        lines.append(f"  best {chosen['selected_on']} t2v R@1 {chosen['R@1']:.1f} ({labels}) at step {chosen['step']}")
    metrics = run / "evaluation" / "metrics.json"
    if metrics.is_file():
        result = json.loads(metrics.read_text(encoding="utf-8"))
        numbers = ", ".join(f"{name} {value:.1f}" for name, value in result["t2v"].items())
        lines.append(f"  {result.get('split', 'test')} t2v ({', '.join(label_words(result))}): {numbers}")
    errors = [] if local else sorted((run / "jobs").glob(f"{FINAL_ERROR}-*.txt"))
    for note in (run / "jobs" / "restarts.log", *errors):
        if note.is_file():
            lines += [f"  {line}" for line in note.read_text(encoding="utf-8").splitlines()]
    return "\n".join(lines)


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
