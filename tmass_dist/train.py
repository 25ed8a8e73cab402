"""Train a model: ``python -m tmass_dist.train --config demo.yaml [key=value ...]``.

Runs in one process, or on several ranks under torchrun or ``launch/submit.py``. Running the command again with the
same run directory resumes.
"""

from __future__ import annotations

import argparse

from tmass_dist.cli import INTERRUPTED, program, run_command
from tmass_dist.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.train"), description=__doc__)
    parser.add_argument("--config", required=True, help="a page of configs/, or a path")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, as optim.lr=1e-5")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    from tmass_dist.distributed import StopRequest, finish
    from tmass_dist.training.loop import train

    stop = StopRequest()
    is_complete = train(config, stop)
    finish()
    if stop.interrupted and not is_complete:
        raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    run_command(main)
