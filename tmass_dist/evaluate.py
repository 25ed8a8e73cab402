"""Evaluate: encode -> score -> rank -> report.

``--run RUN`` evaluates a run's best checkpoint on its test split, sharded over the ranks; ``--features DIR`` scores
stored features again, without GPU, videos or CLIP; ``--similarities S.npy`` ranks a matrix of any program.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from tmass_dist.cli import program, run_command, share_of, writable_dir
from tmass_dist.config import load_config
from tmass_dist.errors import UserError
from tmass_dist.evaluation.settings import ENCODING_SETTINGS, REPORT_SETTINGS, SCORING_SETTINGS, check_overrides

MODES = {
    "--run": ("checkpoint", "features", "search", "compare_exact", "bank", "post_processing", "out", "allow_env"),
    "--features": ("shard", "search", "compare_exact", "bank", "post_processing", "out", "allow_env"),
    "--similarities": ("truth", "post_processing", "out"),
}
"""Options that apply to each of the three ways to evaluate; any other one is refused."""

EXCLUSIVE = (
    ("shard", "search", "a share writes blocks of exact scores, which --search does not need"),
    ("shard", "bank", "a share writes blocks of scores; give --bank to the command that ranks them"),
    ("shard", "post_processing", "a share writes blocks of scores; give it to the command that ranks them"),
    ("search", "bank", "--search has no post-processing"),
    ("search", "post_processing", "--search has no post-processing"),
)
"""Pairs of options that exclude each other, and why."""


def build_parser() -> argparse.ArgumentParser:
    """The command line; :func:`check_options` says which options go together."""
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.evaluate"), description=__doc__)
    parser.add_argument("--run", help="run directory, as written by train, or an export")
    parser.add_argument("--checkpoint", help="with --run: weights (.safetensors) to evaluate; default: the run's best")
    parser.add_argument("--features", type=Path, help="feature store to score; with --run: where to keep the features")
    parser.add_argument("--shard", metavar="I/N", help="with --features: compute share I of N of the scores, no more")
    parser.add_argument("--search", type=int, metavar="K", help="search as tmass search does, with K candidates")
    parser.add_argument("--compare-exact", action="store_true", help="with --search: also the exact scores, to compare")
    parser.add_argument("--bank", type=Path, help="feature store of training queries, for --post-processing qbnorm")
    parser.add_argument("--similarities", type=Path, metavar="S.npy", help="matrix, rows texts, columns videos")
    parser.add_argument(
        "--truth", type=Path, metavar="IDS.json", help="with --similarities: column of each row; default: the diagonal"
    )
    parser.add_argument("--post-processing", choices=("none", "dsl", "qbnorm"), help="evaluation.post_processing")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument(
        "--allow-env", action="store_true", help="let the saved settings read environment variables (${oc.env:NAME})"
    )
    parser.add_argument("overrides", nargs="*", help="overrides of settings, for example stochastic.num_trials=10")
    return parser


def main() -> None:
    arguments = build_parser().parse_intermixed_args()
    mode = check_options(arguments)
    overrides = list(arguments.overrides)
    if arguments.post_processing and mode != "--similarities":
        overrides.append(f"evaluation.post_processing={arguments.post_processing}")
    if arguments.out:
        writable_dir(arguments.out)
    if mode == "--similarities":
        from tmass_dist.evaluation.matrix import rank_matrix

        rank_matrix(arguments.similarities, arguments.truth, arguments.post_processing or "none", arguments.out)
    elif mode == "--run":
        _evaluate_run(arguments, overrides)
    else:
        _evaluate_features(arguments, overrides)


def check_options(arguments: argparse.Namespace) -> str:
    """The way to evaluate: a key of ``MODES``.

    Raises:
        UserError: none, two of them, or an option that does not apply.
    """
    modes = [mode for mode in MODES if getattr(arguments, mode[2:]) is not None]
    if not modes:
        raise UserError("say what to evaluate: --run RUN, --features DIR or --similarities S.npy")
    mode = modes[0]
    options = {name for names in MODES.values() for name in names} | {"run", "similarities"}
    used = {name for name in options if getattr(arguments, name) is not None and getattr(arguments, name) is not False}
    for name in sorted(used - {*MODES[mode], mode[2:]}):
        raise UserError(f"--{name.replace('_', '-')} does not apply to {mode}")
    for one, other, reason in EXCLUSIVE:
        if {one, other} <= used:
            raise UserError(f"--{one} and --{other.replace('_', '-')} exclude each other: {reason}")
    if "compare_exact" in used and "search" not in used:
        raise UserError("--compare-exact compares --search K with the exact scores; give both")
    keys = [override.partition("=")[0] for override in arguments.overrides]
    if mode == "--similarities" and keys:
        raise UserError(f"{arguments.overrides[0]} does not apply to --similarities: the scores are computed already")
    if "post_processing" in used and "evaluation.post_processing" in keys:
        raise UserError("--post-processing and evaluation.post_processing are one setting; give one of them")
    without_report = "shard" in used or ("search" in used and "compare_exact" not in used)
    for key in REPORT_SETTINGS if without_report else ():
        if key in keys and not (key == "data.cache" and mode == "--run"):
            raise UserError(f"{key} does not apply to --{'shard' if 'shard' in used else 'search'}: it has no report")
    return mode


def _evaluate_run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from tmass_dist.evaluation.run import evaluate_run

    saved = Path(arguments.run) / "config.yaml"
    if not saved.is_file() and saved.with_name("config.json").is_file():
        from tmass_dist.retrieval.model import read_export

        config = read_export(Path(arguments.run), overrides)
    elif saved.is_file():
        config = load_config(str(saved), overrides, allow_env=arguments.allow_env)
    else:
        raise UserError(f"{arguments.run} is no run directory and no export: it has no config.yaml and no config.json")
    check_overrides(overrides, config, (*SCORING_SETTINGS, *ENCODING_SETTINGS), "--run")
    evaluate_run(
        dataclasses.replace(config, run_dir=arguments.run),
        checkpoint=arguments.checkpoint,
        store=arguments.features,
        out=arguments.out,
        bank=arguments.bank,
        num_candidates=arguments.search,
        compare_exact=arguments.compare_exact,
    )


def _evaluate_features(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from tmass_dist.evaluation.evaluation import evaluate_store
    from tmass_dist.evaluation.stored import StoredSplit
    from tmass_dist.evaluation.two_stage import search_store

    share = share_of(arguments.shard, "--shard") if arguments.shard else None
    stored = StoredSplit(arguments.features, overrides, allow_env=arguments.allow_env)
    check_overrides(overrides, stored.config, SCORING_SETTINGS, "--features")
    out = arguments.out or arguments.features.parent
    if share is not None:
        blocks = stored.block_files(out)
        blocks.compute(*share)
        print(f"share {arguments.shard} is done: {blocks.directory}")
    elif arguments.search is not None:
        search_store(stored, out, arguments.search, compare_exact=arguments.compare_exact)
    else:
        evaluate_store(stored, out, bank=arguments.bank)


if __name__ == "__main__":
    run_command(main)
