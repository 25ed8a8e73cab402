"""Compare heads after long training on the embedded benchmark: ``python launch/long_runs.py --out DIR``.

Each result is one line of ``docs/long_runs.jsonl``. Running the command again continues with the runs that are missing;
``--table`` trains nothing and prints the tables of docs/findings.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.paper.long_runs import (  # noqa: E402
    COMPARED,
    HEAD_RATES,
    IMAGE_TOWERS,
    WITHOUT_HEAD,
    Setting,
    append_result,
    missing_runs,
    read_results,
    run_one,
)
from tmass_dist.cli import program, run_command, writable_dir  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402
from tmass_dist.score_labels import label_words  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python launch/long_runs.py"), description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/long"), help="data, towers and runs")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "long_runs.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of the results so far")
    parser.add_argument("--image-tower", choices=IMAGE_TOWERS, default="trained")
    parser.add_argument("--videos", type=int, default=400, help="training videos")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of batch 32")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--systems", nargs="+", choices=COMPARED, default=COMPARED, metavar="SYSTEM")
    parser.add_argument(
        "--head-rate",
        choices=HEAD_RATES,
        default="same",
        help="factor of the head's learning rate to the towers' (same)",
    )
    parser.add_argument("--max-runs", type=int, help="stop after so many runs")
    parser.add_argument("--minutes", type=float, help="start no run after so many minutes")
    arguments = parser.parse_args()
    for name in ("videos", "steps", "seeds", "max_runs", "minutes"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be positive")
    headless = [system for system in arguments.systems if system in WITHOUT_HEAD]
    if arguments.head_rate != "same" and headless:
        raise UserError(f"--head-rate {arguments.head_rate}: {headless[0]} has no weights in its head; name --systems")
    if arguments.table:
        for name, value in vars(arguments).items():
            if name not in ("table", "results") and value != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} does not go with --table, which trains nothing")
        from launch.paper.long_table import calibration_table, long_table  # torch, which --help need not wait for

        done = read_results(arguments.results)
        print(f"{long_table(done)}\n\n{calibration_table(done)}")
        return
    from filelock import FileLock, Timeout

    setting = Setting(arguments.image_tower, arguments.videos, arguments.steps)
    out = writable_dir(arguments.out).resolve()
    writable_dir(arguments.results.parent)
    began, count = time.monotonic(), 0
    try:
        with FileLock(out / "lock", timeout=0):
            while arguments.max_runs is None or count < arguments.max_runs:
                if arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes:
                    break
                done = read_results(arguments.results)
                systems, seeds, head = list(arguments.systems), arguments.seeds, arguments.head_rate
                run = next(missing_runs(done, setting, systems, seeds, head), None)
                if run is None:
                    break
                print(f"{time.strftime('%H:%M:%S')} {run.name}", flush=True)
                row = run_one(run, out)
                append_result(arguments.results, row)
                count += 1
                recalls = f"R@1 {row['t2v']['R@1']:.1f}, validation {row['val_R@1']:.1f}"
                print(f"  {recalls} ({', '.join(label_words(row))}), {row['minutes']} min", flush=True)
    except Timeout:
        raise UserError(f"another process works in {out}") from None
    print(f"{count} runs done: {arguments.results}")


if __name__ == "__main__":
    run_command(main)
