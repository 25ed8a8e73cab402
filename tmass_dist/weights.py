"""Fetch pretrained towers: ``python -m tmass_dist.weights fetch ViT-B-32-quickgelu openai --out weights``.

Run it on a machine with internet, copy the file to the machine that trains, and set ``model.pretrained`` to its path.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tmass_dist.cli import program, run_command, writable_dir


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.weights"), description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser(
        "fetch", help="download weights of open_clip, and their tokenizer if it is not included"
    )
    fetch.add_argument("architecture", help="name of an open_clip model, as ViT-B-32-quickgelu")
    fetch.add_argument("tag", help="tag of its weights, as openai; an unknown one lists those that there are")
    fetch.add_argument("--out", type=Path, default=Path("weights"), help="directory to write to (weights)")
    arguments = parser.parse_args()
    from tmass_dist.models import pretrained

    path = pretrained.fetch(arguments.architecture, arguments.tag, writable_dir(arguments.out))
    tokenizer = pretrained.fetch_tokenizer(arguments.architecture)
    print(f"{path} is written; on the machine that trains, set model.pretrained to its path there")
    if tokenizer is not None:
        print(f"the tokenizer is in {tokenizer}; copy this directory into hub/ of HF_HOME (~/.cache/huggingface) there")


if __name__ == "__main__":
    run_command(main)
