"""Evaluation: encode -> score -> rank -> report.

``--run RUN`` evaluates a run's best checkpoint on its test split, sharded over the ranks; ``--features DIR`` scores
again what was encoded, without GPU, videos or CLIP; ``--similarities S.npy`` ranks a matrix from anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from tmass_dist.cli import program, run_command, share_of, writable_dir
from tmass_dist.config import load_config
from tmass_dist.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.evaluate"), description=__doc__)
    parser.add_argument("--run", help="run directory, as train wrote it")
    parser.add_argument("--checkpoint", help="weights (.safetensors) to evaluate; the run's best by default")
    parser.add_argument("--features", type=Path, help="feature store to score again; with --run, where to keep it")
    parser.add_argument("--shard", metavar="I/N", help="with --features: only the I-th of N shares of the scores")
    parser.add_argument("--search", type=int, metavar="K", help="with --features: also try candidates, then re-ranking")
    parser.add_argument("--bank", type=Path, help="feature store of training queries, for qbnorm")
    parser.add_argument("--similarities", type=Path, metavar="S.npy", help="matrix, rows texts, columns videos")
    parser.add_argument("--truth", type=Path, metavar="IDS.json", help="column of each row; default: the diagonal")
    parser.add_argument("--post-processing", choices=("none", "dsl", "qbnorm"))
    parser.add_argument("--out", type=Path, help="where to write the results")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, as stochastic.num_trials=10")
    arguments = parser.parse_intermixed_args()
    if arguments.post_processing:
        arguments.overrides.append(f"evaluation.post_processing={arguments.post_processing}")
    if arguments.out:
        writable_dir(arguments.out)
    if arguments.similarities:
        from tmass_dist.evaluation.matrix import rank_matrix

        rank_matrix(arguments.similarities, arguments.truth, arguments.post_processing or "none", arguments.out)
    elif arguments.run:
        from tmass_dist.evaluation.encode import evaluate

        saved = Path(arguments.run) / "config.yaml"
        if not saved.is_file():
            raise UserError(f"{arguments.run} is no run directory: it has no config.yaml")
        config = dataclasses.replace(load_config(str(saved), arguments.overrides), run_dir=arguments.run)
        evaluate(config, only=arguments.checkpoint, store=arguments.features, out=arguments.out)
    elif arguments.features:
        from tmass_dist.evaluation.stored import Stored

        share = share_of(arguments.shard, "--shard") if arguments.shard else None
        stored = Stored(arguments.features, arguments.overrides, arguments.out)
        if share is None:
            stored.report(arguments.bank, arguments.search)
        else:
            stored.tiles.compute(*share)
            print(f"share {arguments.shard} is done: {stored.tiles.directory}")
    else:
        raise UserError("say what to evaluate: --run RUN, --features DIR or --similarities S.npy")


if __name__ == "__main__":
    run_command(main)
