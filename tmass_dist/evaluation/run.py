"""Evaluate a training run: encode its test split by a checkpoint, over all ranks, and score what was encoded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.config import Config, to_yaml
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    import torch

    from tmass_dist.data.index import Index


def encode_run(config: Config, *, checkpoint: str | None = None, store: Path | None = None) -> Path:
    """Encode the test split of ``config`` by a checkpoint; every rank calls it.

    A store that already holds these features is kept as it is.

    Args:
        config: of the run.
        checkpoint: a weights file; by default the run's best checkpoint.
        store: directory of the features; by default ``<run>/evaluation/features``.

    Returns:
        The store.

    Raises:
        UserError: no checkpoint, weights of another model, or a named ``store`` that holds other features.
    """
    from tmass_dist.data.index import load_index
    from tmass_dist.data.remote import is_remote
    from tmass_dist.distributed import barrier, initialise, is_main
    from tmass_dist.evaluation.encode import encode_to_store
    from tmass_dist.evaluation.features import fingerprint, fingerprint_of
    from tmass_dist.models.backbone import build_tokenizer
    from tmass_dist.models.loading import load_weights, read_weights
    from tmass_dist.models.tmass import build_model

    weights = _weights_path(config, checkpoint)
    device = initialise(config.engine.timeout_s)
    index = load_index(config.data.test, config.data.cache, config.data.retry_s)
    directory = store or Path(config.run_dir) / "evaluation" / "features"
    checksum = _from_main(lambda: _sha256(weights))
    encoding = encoding_settings(config)
    made_from = fingerprint(checksum, [shard.sha256 for shard in index.shards], encoding)
    stored = _from_main(lambda: fingerprint_of(directory))
    if stored is not None and stored != made_from and store is not None:
        raise UserError(
            f"{store} holds features of another model, split or setting (fingerprint {stored}, wanted {made_from}); "
            "give another directory, or remove it"
        )
    if stored != made_from:
        model = build_model(config.model, without_weights=True)
        load_weights(model, read_weights(weights), str(weights))
        about = {
            "fingerprint": made_from,
            "encoding": encoding,
            "config": to_yaml(config),
            "split": index.split,
            "shards": index.directory if is_remote(index.directory) else str(Path(index.directory).resolve()),
            "checkpoint": str(weights),
            "weights_sha256": checksum,
            "selection": {} if checkpoint else _selection(weights),
        }
        tokenize = build_tokenizer(config.model.architecture)
        encode_to_store(model.to(device).eval(), index, tokenize, config, device, directory, about)
    _add_scores_before_training(config, index, directory, device)
    if is_main():
        print(f"features: {directory} ({'kept' if stored == made_from else 'encoded'})")
    barrier()
    return directory


def evaluate_run(
    config: Config,
    *,
    checkpoint: str | None = None,
    store: Path | None = None,
    out: Path | None = None,
    bank: Path | None = None,
    num_candidates: int | None = None,
    compare_exact: bool = False,
) -> None:
    """Encode, score and report; every rank calls it. Rank 0 writes ``<run>/evaluation/`` and prints the tables.

    The scoring settings of ``config`` are applied at each call, also to features that were encoded before.

    Args:
        config: of the run.
        checkpoint: a weights file; by default the run's best checkpoint.
        store: directory of the features; by default ``<run>/evaluation/features``.
        out: directory of the results; by default ``<run>/evaluation``.
        bank: feature store of training queries, for qbnorm.
        num_candidates: of the two-stage search; None: exact scores alone.
        compare_exact: whether the two-stage search is compared with the exact scores.
    """
    from tmass_dist.distributed import barrier, is_main, rank, world_size
    from tmass_dist.evaluation.evaluation import check_request, evaluate_store
    from tmass_dist.evaluation.settings import scoring_overrides
    from tmass_dist.evaluation.stored import StoredSplit
    from tmass_dist.evaluation.two_stage import search_store

    check_request(config, None, bank=bank, num_candidates=num_candidates)
    directory = encode_run(config, checkpoint=checkpoint, store=store)
    stored = StoredSplit(directory, scoring_overrides(config))
    check_request(config, stored.num_videos, bank=bank, num_candidates=num_candidates)
    out = out or Path(config.run_dir) / "evaluation"
    if num_candidates is None or compare_exact:
        stored.block_files(out).compute(rank(), world_size())
        barrier()
    # The other ranks are done: they do not wait in a barrier while rank 0 writes the report.
    if not is_main():
        return
    if num_candidates is None:
        evaluate_store(stored, out, bank=bank)
    else:
        search_store(stored, out, num_candidates, compare_exact=compare_exact)


def encoding_settings(config: Config) -> dict[str, Any]:
    """The settings that the features depend on, beside weights and split."""
    not_encoded = ("pretrained", "dropout", "radius_start", "pooled_by")
    model = {key: value for key, value in dataclasses.asdict(config.model).items() if key not in not_encoded}
    return {"model": model, "precision": config.evaluation.feature_precision}


def _weights_path(config: Config, checkpoint: str | None) -> Path:
    best = Path(config.run_dir) / "checkpoints" / "best.safetensors"
    exported = Path(config.run_dir) / "model.safetensors"
    path = Path(checkpoint) if checkpoint else exported if exported.is_file() and not best.is_file() else best
    if not path.is_file():
        raise UserError(f"no checkpoint {path}; train first, or name one with --checkpoint")
    return path


def _sha256(path: Path) -> str:
    from tmass_dist.data.remote import sha256_of

    return sha256_of(path)


def _from_main(value: Any) -> Any:
    """What rank 0 gets from calling ``value``, on every rank."""
    from tmass_dist.distributed import all_gather_objects, is_main

    return all_gather_objects(value() if is_main() else None)[0]


def _selection(weights: Path) -> dict[str, Any]:
    """``best.json`` beside the run's best checkpoint: what selected it; empty where that cannot be read."""
    try:
        content = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _add_scores_before_training(config: Config, index: Index, store: Path, device: torch.device) -> None:
    """Score the split by the pretrained, untrained model and add the rows to the store's index, if asked for."""
    from tmass_dist.distributed import barrier, is_main
    from tmass_dist.evaluation.baselines import AUTOMATIC_PAIRS
    from tmass_dist.evaluation.encode import encode, ranks_of
    from tmass_dist.evaluation.features import read_index, write_index
    from tmass_dist.evaluation.report import summary
    from tmass_dist.models.backbone import build_tokenizer
    from tmass_dist.models.frame_pooling import MeanPool
    from tmass_dist.models.head import RetrievalHead
    from tmass_dist.models.tmass import build_model
    from tmass_dist.models.warm_start import start_from

    wanted = config.evaluation.baselines
    about = _from_main(lambda: read_index(store))
    small = int(index.num_captions.sum()) * len(index) <= AUTOMATIC_PAIRS
    if "before_training" in about or not (wanted == "all" or (wanted == "auto" and small and _is_local(config))):
        return
    plain = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(
            config.evaluation, protocol="query_conditioned", post_processing="none", precision="float32"
        ),
    )
    model = build_model(config.model, without_weights=config.init_from is not None)
    if config.init_from:
        start_from(model, config)
    model.to(device).eval()
    features = encode(model, index, build_tokenizer(config.model.architecture), config, device)
    sentences = dataclasses.replace(features, text_TD=features.sentences)
    trials = "" if not model.head.draws_samples else f", M = {config.stochastic.num_trials}"
    rows = {
        "mean pooling, before training": summary(ranks_of(RetrievalHead(MeanPool(), None), sentences, plain)),
        f"before training (init_from{trials})" if config.init_from else f"zero-shot (untrained head{trials})": summary(
            ranks_of(model.head, features, plain)
        ),
    }
    if is_main():
        about.pop("version")
        about.pop("files")
        write_index(store, {**about, "before_training": rows})
    barrier()


def _is_local(config: Config) -> bool:
    """Whether the weights before training are a file of this machine: nothing has to be downloaded."""
    from tmass_dist.models.pretrained import cached_weights, find_file, is_file

    if config.init_from:
        return Path(config.init_from).exists()
    pretrained = config.model.pretrained
    if pretrained is None:
        return True
    try:
        if is_file(pretrained):
            return find_file(pretrained).is_file()
        return cached_weights(config.model.architecture, pretrained) is not None
    except UserError:
        return False
