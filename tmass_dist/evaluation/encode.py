"""Encode a split by the towers, over all ranks, and keep it as a feature store."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.config import Config, to_yaml
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tmass_dist.data.index import Index
    from tmass_dist.evaluation.features import Features, Part
    from tmass_dist.evaluation.ranking import Bank, Ranks
    from tmass_dist.models.tmass import RetrievalModel


def encode_part(model: RetrievalModel, index: Index, tokenize: Any, config: Config, device: torch.device) -> Part:
    """Encode this rank's share of a split, in batches that any number of ranks cuts the same."""
    import torch

    from tmass_dist.data.loader import iterate_videos
    from tmass_dist.data.transforms import resize_centre_crop
    from tmass_dist.distributed import rank, world_size
    from tmass_dist.evaluation.features import Part

    width, frames = model.towers.embed_dim, config.model.num_frames
    part = Part([], torch.empty(0, frames, width), [], [], torch.empty(0, width))
    frame_parts, text_parts = [part.frames_VFD], [part.text_TD]
    batches = iterate_videos(
        index,
        rank=rank(),
        world_size=world_size(),
        batch_size=config.data.eval_batch_size,
        tokenize=tokenize,
        num_frames=frames,
    )
    with torch.inference_mode():
        for batch in batches:
            pixels = resize_centre_crop(batch.pixels_BFHWC.to(device), model.towers.image_size)
            frame_parts.append(model.towers.encode_frames(pixels).float().cpu())
            text_parts.append(model.towers.encode_text(batch.tokens_TL.to(device)).float().cpu())
            part.video_ids.extend(batch.video_ids)
            part.caption_ids.extend(batch.caption_ids)
            part.captions.extend(batch.captions)
    return dataclasses.replace(part, frames_VFD=torch.cat(frame_parts).clone(), text_TD=torch.cat(text_parts).clone())


def encode(model: RetrievalModel, index: Index, tokenize: Any, config: Config, device: torch.device) -> Features:
    """Encode a split over all ranks; every rank gets all of it."""
    from tmass_dist.distributed import all_gather_objects
    from tmass_dist.evaluation.features import merge

    parts = all_gather_objects(encode_part(model, index, tokenize, config, device))
    return merge(parts, index.ids)


def ranks_of(head: Any, features: Features, config: Config, bank: Bank | None = None) -> Ranks:
    """Score and rank a split; each rank of the job scores every world-size-th block of texts."""
    import torch

    from tmass_dist.distributed import all_gather_objects, rank, world_size
    from tmass_dist.evaluation import ranking
    from tmass_dist.evaluation.blocks import Scorer

    scorer = Scorer(head, features, config)
    with torch.inference_mode():
        mine = {start: scorer.score(start) for start in scorer.starts[rank() :: world_size()]}
    blocks: dict[int, Tensor] = {}
    for part in all_gather_objects(mine):
        blocks |= part
    ordered = [blocks[start] for start in scorer.starts]
    post, num_videos = config.evaluation.post_processing, len(features.video_ids)
    return ranking.rank(lambda: ordered, features.owner_T, num_videos, post, bank)


def encode_run(config: Config, *, only: str | None = None, store: Path | None = None) -> Path:
    """Encode the test split by the best checkpoint of ``config.run_dir``; every rank calls it.

    A store that holds just these features is left as it is.

    Args:
        config: the run.
        only: a weights file in place of the run's best.
        store: where to keep them; by default ``<run>/evaluation/features``.

    Returns:
        The store; its index also holds the scores before training.

    Raises:
        UserError: no checkpoint, weights of another model, or a ``store`` that holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from tmass_dist.data.index import load_index
    from tmass_dist.data.remote import is_remote, sha256_of
    from tmass_dist.distributed import all_gather_objects, barrier, initialise, is_main, rank, world_size
    from tmass_dist.evaluation import features as feature_store
    from tmass_dist.evaluation.report import summary
    from tmass_dist.models.backbone import build_tokenizer, load_weights
    from tmass_dist.models.head import RetrievalHead
    from tmass_dist.models.pooling import MeanPool
    from tmass_dist.models.tmass import build_model

    weights = Path(only) if only else Path(config.run_dir) / "checkpoints" / "best.safetensors"
    if not weights.is_file():
        raise UserError(f"no checkpoint {weights}; train first, or name one with --checkpoint")
    device = initialise(config.engine.timeout_s)
    index = load_index(config.data.test, config.data.cache, config.data.retry_s)
    given, store = store, store or Path(config.run_dir) / "evaluation" / "features"
    made_from = feature_store.fingerprint(
        sha256_of(weights), [shard.sha256 for shard in index.shards], config.model.num_frames
    )
    there = all_gather_objects(feature_store.fingerprint_of(store) if is_main() else None)[0]
    if there == made_from:
        return store
    if there is not None and given is not None:
        raise UserError(
            f"{store} holds features of another model or split (fingerprint {there}, asked for {made_from}); "
            "give another directory, or remove it"
        )
    tokenize = build_tokenizer(config.model.architecture)
    model = build_model(config.model).to(device).eval()
    untrained = encode(model, index, tokenize, config, device)
    before = {
        "mean pooling, before training": summary(ranks_of(RetrievalHead(MeanPool(), None), untrained, config)),
        "zero-shot (untrained head)": summary(ranks_of(model.head, untrained, config)),
    }
    try:
        loaded = load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights} is torn, or not a file of weights: {error}") from error
    load_weights(model, loaded, str(weights))
    if is_main():
        (store / "index.json").unlink(missing_ok=True)
    barrier()
    feature_store.save_part(store, rank(), encode_part(model.to(device), index, tokenize, config, device))
    barrier()
    if is_main():
        head = {name: value.cpu().contiguous() for name, value in model.head.state_dict().items()}
        save_file(head, store / "head.safetensors")
        about = {
            "config": to_yaml(config),
            "split": index.split,
            "shards": index.directory if is_remote(index.directory) else str(Path(index.directory).resolve()),
            "checkpoint": str(weights),
            "before_training": before,
        }
        feature_store.save_index(store, world_size(), index.ids, made_from, about)
    barrier()
    return store


def evaluate(config: Config, *, only: str | None = None, store: Path | None = None, out: Path | None = None) -> None:
    """Encode, score and report; every rank calls it, rank 0 writes ``<run>/evaluation/`` and prints the tables.

    The road is that of a job array: each rank leaves its blocks of scores on disk, and rank 0 puts them together.
    """
    from tmass_dist.distributed import barrier, is_main, rank, world_size
    from tmass_dist.evaluation.stored import Stored

    store = encode_run(config, only=only, store=store)
    stored = Stored(store, [], out or Path(config.run_dir) / "evaluation")
    stored.tiles.compute(rank(), world_size())
    barrier()
    if is_main():
        stored.report()
    barrier()
