"""Encode a split by the towers, over all ranks: in memory for validation, into a feature store for evaluation."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.config import Config
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tmass_dist.data.index import Index
    from tmass_dist.evaluation.features import Features, Part
    from tmass_dist.evaluation.ranking import Bank, Ranks
    from tmass_dist.models.tmass import RetrievalModel

BATCHES_PER_CHUNK = 4
"""Batches of a chunk. Ranks encode whole chunks in turn, each is a file: an encoding that was killed resumes there."""


def encode_batches(
    model: RetrievalModel,
    index: Index,
    tokenize: Any,
    config: Config,
    device: torch.device,
    batches: Sequence[int],
    on_batch: Callable[[], None] = lambda: None,
) -> Part:
    """Encode some batches of a split; the batches are the same for any number of ranks.

    Args:
        model: in evaluation mode, on ``device``.
        index: the split.
        tokenize: texts to token ids.
        config: of the run.
        device: on which to encode.
        batches: numbers of batches of ``data.eval_batch_size`` videos.
        on_batch: called after each batch; an exception that it raises ends the encoding.
    """
    import torch

    from tmass_dist.data.transforms import resize_centre_crop
    from tmass_dist.data.videos import iterate_videos
    from tmass_dist.evaluation.features import Part
    from tmass_dist.precision import tower_precision

    width, num_frames = model.towers.embed_dim, config.model.num_frames
    frame_parts, text_parts = [torch.empty(0, num_frames, width)], [torch.empty(0, model.towers.text_width)]
    video_ids: list[str] = []
    caption_ids: list[tuple[str, int]] = []
    captions: list[str] = []
    videos = iterate_videos(
        index,
        batches=batches,
        batch_size=config.data.eval_batch_size,
        tokenize=tokenize,
        num_frames=num_frames,
        num_workers=config.data.num_workers,
        timeout_s=config.engine.timeout_s,
    )
    with torch.inference_mode(), tower_precision(config.engine, device):
        for batch in videos:
            pixels = resize_centre_crop(batch.pixels_BFHWC.to(device), model.towers.image_size)
            frame_parts.append(model.towers.encode_frames(pixels).float().cpu())
            text_parts.append(model.towers.encode_text(batch.tokens_TL.to(device)).float().cpu())
            video_ids += batch.video_ids
            caption_ids += batch.caption_ids
            captions += batch.captions
            on_batch()
        frames_VFD, text_TD = torch.cat(frame_parts), torch.cat(text_parts)
    # Copies outside inference mode are ordinary tensors.
    return Part(video_ids, frames_VFD.clone(), caption_ids, captions, text_TD.clone())


def encode(model: RetrievalModel, index: Index, tokenize: Any, config: Config, device: torch.device) -> Features:
    """Encode a split over all ranks; every rank gets all features."""
    from tmass_dist.data.videos import num_batches
    from tmass_dist.distributed import all_gather_objects, rank, world_size
    from tmass_dist.evaluation.features import merge

    own = range(num_batches(index, config.data.eval_batch_size))[rank() :: world_size()]
    return merge(all_gather_objects(encode_batches(model, index, tokenize, config, device, own)), index.ids)


def ranks_of(head: Any, features: Features, config: Config, bank: Bank | None = None) -> Ranks:
    """Score and rank a split; each rank scores its share of the blocks, and the ranks exchange ranks, not scores."""
    import dataclasses

    import torch

    from tmass_dist.distributed import all_gather_objects, rank, share_failure, world_size
    from tmass_dist.evaluation import ranking
    from tmass_dist.evaluation.blocks import BlockScorer

    scorer = BlockScorer(head, features, config)
    own = scorer.blocks[rank() :: world_size()]
    failure = None
    own_scores: list[Tensor] = []
    with torch.inference_mode():
        own_scores = [scores_TV.clone() for scores_TV in scorer.scores(own)]
    try:
        for texts, scores_TV in zip(own, own_scores):
            ranking.check_numbers(scores_TV, texts.start)
    except UserError as error:
        failure = error
    share_failure(failure)

    def combine(values: Tensor, operation: str) -> Tensor:
        parts = torch.stack(all_gather_objects(values))
        return torch.logsumexp(parts, dim=0) if operation == "logsumexp" else getattr(parts, operation)(dim=0)

    owner_T = features.owner_T
    own_owner = torch.cat([owner_T[:0], *(owner_T[texts] for texts in own)])
    post = config.evaluation.post_processing
    found = ranking.rank(lambda: own_scores, own_owner, len(features.video_ids), post, bank, combine)
    t2v_T = torch.empty_like(owner_T)
    for parts in all_gather_objects(list(zip(own, found.t2v_T.split([texts.stop - texts.start for texts in own])))):
        for texts, ranks in parts:
            t2v_T[texts] = ranks
    return dataclasses.replace(found, t2v_T=t2v_T, owner_T=owner_T)


def encode_to_store(
    model: RetrievalModel,
    index: Index,
    tokenize: Any,
    config: Config,
    device: torch.device,
    store: Path,
    about: dict[str, Any],
) -> None:
    """Encode a split over all ranks into a feature store; chunks that an earlier, killed call left are used.

    Args:
        model: in evaluation mode, on ``device``.
        index, tokenize, config, device: as :func:`encode_batches` takes them.
        store: its directory.
        about: what the store's index says; ``fingerprint`` names what the features are made from.
    """
    from tmass_dist.data.videos import num_batches
    from tmass_dist.distributed import barrier, is_main, rank, share_failure, world_size
    from tmass_dist.evaluation.features import StoreWriter, load_part, merge, save_part

    size = config.data.eval_batch_size
    batches = range(num_batches(index, size))
    chunks = [batches[start : start + BATCHES_PER_CHUNK] for start in range(0, len(batches), BATCHES_PER_CHUNK)]
    directory = store / f"encoding-{about['fingerprint']}-{size}"
    paths = [directory / f"chunk-{number:06d}.safetensors" for number in range(len(chunks))]
    failure = None
    try:
        for chunk, path in list(zip(chunks, paths))[rank() :: world_size()]:
            if load_part(path) is None:
                save_part(path, encode_batches(model, index, tokenize, config, device, chunk))
    except UserError as error:
        failure = error
    share_failure(failure)
    if is_main():
        shape = (config.model.num_frames, model.towers.embed_dim)
        writer = StoreWriter(store, index.ids, shape, config.evaluation.feature_precision)
        for chunk, path in zip(chunks, paths):
            part = load_part(path)
            if part is None:
                raise UserError(f"{path} is missing or damaged; run the command again")
            writer.add(merge([part], index.ids[chunk.start * size : chunk.stop * size]))
        writer.finish(model.head.state_dict(), about)
        shutil.rmtree(directory)
    barrier()
