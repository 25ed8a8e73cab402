"""Reproduce the paper's supplementary: train the missing runs, and write one page of published and measured numbers.

``python launch/reproduce.py --all --data demo --cluster local --size ci``. Running the command again resumes: finished
runs are kept.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.paper.layout import Layout  # noqa: E402
from launch.paper.systems import DATA, PARTS, SIZES, systems_of  # noqa: E402
from tmass_dist.cli import program, run_command, writable_dir  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402


def _chosen_parts(arguments: argparse.Namespace) -> list[str]:
    """Keys of ``PARTS`` that the options choose.

    Raises:
        UserError: none.
    """
    if arguments.all:
        return list(PARTS)
    chosen = [f"table {number}" for number in arguments.table]
    chosen += [f"figure {min(number, 3)}" for number in arguments.figure]
    chosen += [f"section {number}" for number in arguments.section] + (["gain"] if arguments.gain else [])
    if not chosen:
        raise UserError("nothing to reproduce: give --all, --table N, --figure N, --section N or --gain")
    return list(dict.fromkeys(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python launch/reproduce.py"), description=__doc__)
    parser.add_argument("--all", action="store_true", help="everything")
    parser.add_argument("--table", type=int, action="append", default=[], choices=range(1, 6), metavar="1-5")
    parser.add_argument("--figure", type=int, action="append", default=[], choices=range(1, 11), metavar="1-10")
    parser.add_argument("--section", type=int, action="append", default=[], choices=(2, 3), metavar="2|3")
    parser.add_argument(
        "--gain", action="store_true", help="T-MASS and its variants against X-Pool under query_conditioned"
    )
    parser.add_argument("--data", choices=DATA, default="demo", help="the embedded benchmark, or a real data set")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="local")
    parser.add_argument(
        "--submit",
        default="",
        metavar="OPTIONS",
        help="options of launch/submit.py, as '--nodes 4 --gpus 8'",
    )
    parser.add_argument("--seeds", type=int, help="number of seeds (ci: 1, full: 3)")
    parser.add_argument("--size", choices=sorted(SIZES), default="ci")
    parser.add_argument("--steps", type=int, help="training steps at batch 32; default: those of the size")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--page-only", action="store_true", help="train nothing; write the page from the finished runs")
    arguments = parser.parse_args()
    parts, size = _chosen_parts(arguments), SIZES[arguments.size]
    for name in ("seeds", "steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; at least 1")
    steps = arguments.steps or (size.steps if arguments.data == "demo" or arguments.size == "ci" else None)
    out = writable_dir(arguments.out).resolve()
    layout = Layout(arguments.data, arguments.size, arguments.seeds or size.seeds, steps, out)
    writable_dir(layout.base)
    systems = systems_of(parts, size.largest_batch)
    from launch.paper.runs import prepare_data, prepare_towers, train_missing

    missing_data = layout.missing_data()
    failed: dict[Path, str] = {}
    if missing_data is None and not arguments.page_only:
        if arguments.data == "demo":
            prepare_data(layout.base / "data", layout.size.videos)
            prepare_towers(layout, systems)
        failed = train_missing(layout, systems, arguments.cluster, shlex.split(arguments.submit))
    from launch.paper.page import write_page

    page = write_page(layout, parts, missing_data)
    print(f"{page}\n{page.with_suffix('.md')}")
    if failed:
        run, message = next(iter(failed.items()))
        raise UserError(f"{len(failed)} runs failed; the first, {run}: {message}")
    if arguments.cluster == "slurm" and missing_data is None:
        print("the missing runs are submitted; run the same command again to collect them")


if __name__ == "__main__":
    run_command(main)
