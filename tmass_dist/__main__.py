"""The command line ``tmass COMMAND ...``, the same as ``python -m tmass_dist COMMAND ...``.

A command's module is imported only when the command runs, so ``tmass --help`` imports no library.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

from tmass_dist import __version__
from tmass_dist.cli import run_command
from tmass_dist.errors import UserError

COMMANDS = {
    "train": ("tmass_dist.train", "train a model in this process, or on several ranks under torchrun"),
    "evaluate": ("tmass_dist.evaluate", "evaluate a run, stored features or a similarity matrix"),
    "audit": ("tmass_dist.audit", "check an evaluation's similarity function for leaks"),
    "doctor": ("tmass_dist.doctor", "say what works on this machine and what is missing"),
    "weights": ("tmass_dist.weights", "fetch pretrained towers for machines without internet"),
    "export": ("tmass_dist.export", "write a trained model with its config and model card"),
    "convert": ("tmass_dist.convert", "convert checkpoints of the authors' code, and back"),
    "index": ("tmass_dist.index", "encode videos into a gallery that can be searched"),
    "search": ("tmass_dist.search", "search a gallery by text"),
    "serve": ("tmass_dist.serve", "search a gallery in the browser"),
    "config": ("tmass_dist.settings", "list every setting with its type, default and meaning"),
    "pack": ("shards.make_shards", "pack videos and captions into shards"),
    "index-shards": ("shards.index_shards", "index WebDataset tar files of other programs, to train on them"),
    "verify": ("shards.verify_shards", "check packed shards"),
    "inspect": ("shards.inspect_shards", "draw a contact sheet of packed shards"),
    "caption": ("shards.caption_videos", "write extra captions with a vision-language model"),
    "submit": ("launch.submit", "run jobs on SLURM, or on this machine with --cluster local"),
    "status": ("launch.status", "show the state of a run"),
    "cancel": ("launch.cancel", "cancel the jobs of a run"),
    "compare": ("launch.compare", "compare runs: settings that differ, and metrics"),
    "reproduce": ("launch.reproduce", "reproduce the tables and figures of the paper"),
}
"""Module and one-line description of each command."""

ROOT = Path(__file__).resolve().parents[1]


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tmass COMMAND ...",
            "",
            "Text-video retrieval with T-MASS: training, evaluation and search.",
            "",
            *lines,
            "",
            "`tmass COMMAND --help` describes a command; `tmass --version` prints the version.",
        ]
    )


def main() -> None:
    """Run the command named by the first argument.

    Raises:
        UserError: an unknown command, or one that needs a checkout of the repository where there is none.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, *rest = arguments
    if name == "--version":
        print(f"tmass-dist {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"tmass has no command {name!r}; {hint}")
    module = COMMANDS[name][0]
    if not module.startswith("tmass_dist."):
        script = Path(*module.split(".")).with_suffix(".py")
        if not (ROOT / script).is_file():
            raise UserError(f"tmass {name} needs a checkout of the repository; run it there as python {script}")
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
    sys.argv = [f"tmass {name}", *rest]
    importlib.import_module(module).main()


def entry() -> None:
    """The console script ``tmass``."""
    run_command(main)


if __name__ == "__main__":
    entry()
