"""Every text against every video in blocks of texts: each block is one file, kept over a kill, shared out over tasks.

A block's scores depend on nothing but the block: the same bits come from 1 task and from 64.
"""

# Shapes: T texts, V videos, M trials, D embedding width.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tmass_dist.config import Config
from tmass_dist.distributed import own_device
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.scoring import Gallery
from tmass_dist.noise import keyed_noise, text_key

if TYPE_CHECKING:
    from tmass_dist.models.head import RetrievalHead

# Texts and videos of a tile: on a processor what is in hand stays in its caches, a GPU wants few and large kernels.
TILES = {"cpu": (16, 128), "cuda": (64, 512)}
BLOCK = 64
"""Texts of a block; it bounds the noise bank (64 texts x 20 trials x 512 dimensions are 2.6 MB)."""


def caption_noise(
    captions: list[str], config: Config, width: int, device: torch.device, num_trials: int | None = None
) -> Tensor:
    """Evaluation noise ``(T, M, D)``: a function of the seed, the caption's text and the trial.

    It does not depend on the videos or on other captions, so a typed query is scored as an evaluation scores it.

    Args:
        captions: the texts.
        config: its ``seed`` and ``stochastic`` settings.
        width: D.
        device: of the result.
        num_trials: M; by default ``stochastic.num_trials``.
    """
    stochastic = config.stochastic
    num_trials = num_trials or stochastic.num_trials
    keys = torch.tensor([text_key("evaluation", caption) for caption in captions])
    # Uniform noise has the same bits on every device. Normal noise does not, so the CPU computes it.
    noise_TN = keyed_noise(
        keys.to(device if stochastic.prior == "uniform" else "cpu"),
        num_trials * width,
        seed=config.seed,
        prior=stochastic.prior,
        std=stochastic.prior_std,
    )
    return noise_TN.view(-1, num_trials, width).to(device)


@dataclass
class Scorer:
    """The similarities of a split, block by block."""

    head: RetrievalHead
    features: Features
    config: Config

    def __post_init__(self) -> None:
        self.device = own_device()
        self.head = self.head.to(self.device).eval()
        # The published protocol needs all captions of every video in one call; it is for parity on small sets.
        published = self.config.evaluation.protocol == "published_code"
        num_texts = len(self.features.text_TD)
        self.block = num_texts if published else BLOCK
        self.starts = list(range(0, num_texts, self.block))
        self._gallery: Gallery | None = None

    def gallery(self, frames_VFD: Tensor) -> Gallery:
        """Any videos, prepared where they will be scored."""
        return Gallery(self.head, frames_VFD.to(self.device), tile_videos=TILES[self.device.type][1])

    def score(self, start: int, gallery: Gallery | None = None) -> Tensor:
        """Similarity ``(block, V)``, on the CPU, of the texts from ``start`` on; see :func:`caption_noise`.

        Args:
            start: first text of the block.
            gallery: other videos than the whole split.
        """
        if gallery is None:
            self._gallery = gallery = self._gallery or self.gallery(self.features.frames_VFD)
        rows = slice(start, start + self.block)
        width = self.features.text_TD.shape[1]
        noise_TMD = None
        if self.head.mass is not None:
            noise_TMD = caption_noise(self.features.captions[rows], self.config, width, self.device)
        found = gallery.score(
            self.features.text_TD[rows].to(self.device),
            noise_TMD,
            protocol=self.config.evaluation.protocol,
            pooled_by=self.config.model.pooled_by,
            caption_owner_T=self.features.owner_T[rows],
            precision=getattr(torch, self.config.evaluation.precision),
            tile_texts=TILES[self.device.type][0],
        ).cpu()
        # The published protocol has no number where a video lacks a caption slot; such a video cannot win.
        return found.nan_to_num(-2.0) if self.config.evaluation.protocol == "published_code" else found


class Tiles:
    """Blocks on disk."""

    def __init__(self, directory: Path, scorer: Scorer, log: Any = print) -> None:
        self.directory, self.scorer, self.log = directory, scorer, log

    def _path(self, start: int) -> Path:
        return self.directory / f"rows-{start:09d}.safetensors"

    def _read(self, start: int) -> Tensor | None:
        """A finished block, or None; one that is damaged is named, and will be computed again."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(start)
        if not path.is_file():
            return None
        try:
            found = load_file(path)["similarity"]
        except (SafetensorError, KeyError, OSError) as error:
            self.log(f"{path} is damaged ({error}): computing it again")
            return None
        rows = len(self.scorer.features.text_TD[start : start + self.scorer.block])
        return found if found.shape == (rows, len(self.scorer.features.frames_VFD)) else None

    def compute(self, number: int, count: int) -> None:
        """Write the blocks of task ``number`` of ``count`` that are not there yet."""
        from safetensors.torch import save_file
        from tqdm import tqdm

        self.directory.mkdir(parents=True, exist_ok=True)
        mine = self.scorer.starts[number::count]
        for start in tqdm(mine, desc="score", unit="block", disable=number > 0 or len(mine) < 8):
            if self._read(start) is None:
                aside = self._path(start).with_suffix(f".{number}.tmp")
                save_file({"similarity": self.scorer.score(start)}, aside)
                aside.replace(self._path(start))

    def blocks(self) -> Iterator[Tensor]:
        """Every block in order; one that is missing is computed here."""
        for start in self.scorer.starts:
            found = self._read(start)
            yield self.scorer.score(start) if found is None else found
