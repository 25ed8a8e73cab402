"""Export a run: ``python -m tmass_dist.export RUN OUT`` writes its best weights, settings and a model card.

``from tmass_dist import TMass; TMass.from_pretrained("OUT")`` loads the export. DeepSpeed is not needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tmass_dist.cli import program, run_command, writable_dir


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.export"), description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--checkpoint", type=Path, help="weights (.safetensors) in place of the run's best")
    parser.add_argument("--open-clip", action="store_true", help="also write the towers in open_clip's form")
    parser.add_argument(
        "--allow-env",
        action="store_true",
        help="let the run's config.yaml read environment variables; the export then holds their values",
    )
    arguments = parser.parse_args()
    from tmass_dist.retrieval.model import TMass

    model = TMass.of_run(arguments.run, arguments.checkpoint, allow_env=arguments.allow_env)
    model.save_pretrained(writable_dir(arguments.out))
    if arguments.open_clip:
        model.save_open_clip(arguments.out)
    print(f"exported: {arguments.out}")


if __name__ == "__main__":
    run_command(main)
