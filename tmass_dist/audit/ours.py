"""The scoring of this project as a function to audit: the path of an evaluation from features to scores."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tmass_dist.config import Config, load_config
from tmass_dist.errors import UserError
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.blocks import BlockScorer
from tmass_dist.evaluation.features import Features
from tmass_dist.models.head import RetrievalHead, build_head


@dataclass(frozen=True)
class Ours:
    """A function to audit, and the shapes that its head is built for."""

    name: str
    similarity: Callable[[Tensor, Tensor, Tensor], Tensor]
    width: int
    num_frames: int


def similarity_of(head: RetrievalHead, config: Config) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The scores that an evaluation with this head and config computes."""

    def similarity(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        slots: dict[int, int] = {}
        caption_ids = []
        for owner in owner_T.tolist():
            caption_ids.append((f"video {owner}", slots.setdefault(owner, 0)))
            slots[owner] += 1
        # Noise is keyed by the caption's text; here an embedding has no text, so its bytes stand for it.
        if config.model.by_token:
            # One vector has no tokens; its rotations stand for them, and a vector of zeros for the end of the context.
            tokens = [text_TD, text_TD.roll(1, dims=1), text_TD.roll(2, dims=1), torch.zeros_like(text_TD)]
            text_TD = torch.cat(tokens, dim=1)
        captions = [hashlib.sha256(text_D.numpy().tobytes()).hexdigest() for text_D in text_TD]
        video_ids = [f"video {number}" for number in range(len(frames_VFD))]
        features = Features(video_ids, frames_VFD, caption_ids, captions, text_TD, owner_T)
        scorer = BlockScorer(head, features, config)
        return torch.cat([*scorer.scores()])

    return similarity


def ranks_of_ours(similarity_TV: Tensor, owner_T: Tensor) -> Tensor:
    """Text-to-video ranks as our evaluation counts them."""
    return ranking.rank(lambda: [similarity_TV], owner_T, similarity_TV.shape[1]).t2v_T


def similarity_of_run(run: Path, overrides: list[str]) -> Ours:
    """The scoring of a trained run's best checkpoint.

    Args:
        run: its directory.
        overrides: of its config, as ``evaluation.protocol=published_code``.

    Raises:
        UserError: no run, or no weights that belong to its config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tmass_dist.models.loading import load_weights

    page, path = run / "config.yaml", run / "checkpoints" / "best.safetensors"
    for needed in (page, path):
        if not needed.is_file():
            raise UserError(f"{run} is not a trained run: {needed} is missing")
    config = load_config(str(page), overrides, allow_env=False)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is incomplete or not a file of weights: {error}") from error
    projection = weights.get("towers.clip.text_projection")
    if projection is None:
        raise UserError(f"{path} holds no towers.clip.text_projection, which gives the width of the embeddings")
    width = projection.shape[-1]
    head = build_head(config.model, width).eval()
    head_weights = {name.removeprefix("head."): value for name, value in weights.items() if name.startswith("head.")}
    load_weights(head, head_weights, str(path))
    name = f"{run}, protocol {config.evaluation.protocol}"
    return Ours(name, similarity_of(head, config), width, config.model.num_frames)
