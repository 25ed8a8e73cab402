"""Blocks of scores: some texts against every video. A block is one file, kept after a kill and shared out over tasks.

The scores of a block depend on that block alone: the same bits come from 1 task and from 64.
"""

# Shapes: T texts, V videos, M trials, D embedding width.

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tmass_dist.cli import replacing
from tmass_dist.config import Config
from tmass_dist.distributed import own_device
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.scoring import Gallery
from tmass_dist.models.frame_pooling import FramePool
from tmass_dist.models.late_interaction import LateInteraction
from tmass_dist.models.pooling import XPool
from tmass_dist.noise import keyed_noise, text_key

if TYPE_CHECKING:
    from tmass_dist.models.head import RetrievalHead

TILE_SIZES = {"cpu": (16, 128), "cuda": (64, 512)}
"""Texts and videos scored at a time: on a CPU a tile stays in the caches, a GPU wants few and large kernels."""

TEXTS_PER_BLOCK = 64
"""Most texts of a block, unless one video has more; it bounds the noise (64 texts x 20 trials x 512 x 4 B = 2.6 MB)."""

LOWEST = -1e4
"""Score of a pair that the published protocol leaves undefined."""

GALLERY_BYTES = 2**29
"""A prepared gallery larger than this is not kept: its videos are prepared again, a tile at a time, for each group of
blocks."""

GROUP_BYTES = 2**29
"""Scores and noise of a group of blocks, which are computed together where the gallery is not kept."""


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


def split_into_blocks(owner_T: Tensor, limit: int = TEXTS_PER_BLOCK) -> list[slice]:
    """Cut texts into blocks of at most ``limit``, all captions of a video in one block.

    Args:
        owner_T: number of each text's video; non-decreasing.
        limit: most texts of a block; a video with more captions has a block of its own.
    """
    counts = owner_T.unique_consecutive(return_counts=True)[1].tolist()
    blocks, start, end = [], 0, 0
    for count in counts:
        if end > start and end + count - start > limit:
            blocks.append(slice(start, end))
            start = end
        end += count
    return [*blocks, slice(start, end)] if end > start else blocks


class BlockScorer:
    """The similarities of a split, block by block.

    Args:
        head: scores on this process's device, in evaluation mode.
        features: of the split.
        config: protocol, precision, noise and seed.
    """

    def __init__(self, head: RetrievalHead, features: Features, config: Config) -> None:
        self.features, self.config = features, config
        self.device = own_device()
        self.head = head.to(self.device).eval()
        self.tile_texts, self.tile_videos = TILE_SIZES[self.device.type]
        # The published protocol needs all captions of every video in one call; it is for parity on small sets.
        published = config.evaluation.protocol == "published_code"
        self.blocks = [slice(0, len(features.owner_T))] if published else split_into_blocks(features.owner_T)
        """The rows of each block; they cover all texts in order."""
        self._whole_gallery: Gallery | None = None

    def gallery(self, frames_VFD: Tensor) -> Gallery:
        """Any videos, prepared on this process's device."""
        return Gallery(self.head, frames_VFD.to(self.device).float(), tile_videos=self.tile_videos)

    def score(self, texts: slice, gallery: Gallery | None = None) -> Tensor:
        """Similarity ``(block, V)``, on the CPU, of some texts with every video; see :func:`caption_noise`.

        Args:
            texts: rows of the texts, usually one of ``blocks``.
            gallery: videos other than the whole split.
        """
        if gallery is None:
            self._whole_gallery = self._whole_gallery or self.gallery(self.features.frames_VFD)
            gallery = self._whole_gallery
        return self._score(texts, self._noise(texts), gallery)

    def scores(self, blocks: Iterable[slice] | None = None) -> Iterator[Tensor]:
        """The similarities ``(block, V)`` of ``blocks`` (by default all of them), in order.

        Where the prepared gallery is larger than ``GALLERY_BYTES``, the memory is that of one group of blocks and one
        tile of videos; the scores are the same bits.
        """
        blocks = list(self.blocks if blocks is None else blocks)
        if self._gallery_bytes() <= GALLERY_BYTES or self.config.evaluation.protocol == "published_code":
            yield from map(self.score, blocks)
            return
        frames_VFD = self.features.frames_VFD
        for group in self._groups(blocks):
            noises = [self._noise(texts) for texts in group]
            rows = [torch.empty(texts.stop - texts.start, len(frames_VFD)) for texts in group]
            for start in range(0, len(frames_VFD), self.tile_videos):
                videos = slice(start, start + self.tile_videos)
                gallery = self.gallery(frames_VFD[videos])
                for texts, noise_TMD, row_TV in zip(group, noises, rows):
                    row_TV[:, videos] = self._score(texts, noise_TMD, gallery)
            yield from rows

    def scores_of(self, text: int) -> Tensor:
        """Similarity ``(V,)`` of one text with every video, from its block."""
        [block] = [block for block in self.blocks if block.start <= text < block.stop]
        return next(self.scores([block]))[text - block.start]

    def _score(self, texts: slice, noise_TMD: Tensor | None, gallery: Gallery) -> Tensor:
        published = self.config.evaluation.protocol == "published_code"
        similarity_TV = gallery.score(
            self.features.text_TD[texts].to(self.device).float(),
            noise_TMD,
            protocol=self.config.evaluation.protocol,
            pooled_by=self.config.model.pooled_by,
            caption_owner_T=self.features.owner_T[texts],
            precision=getattr(torch, self.config.evaluation.precision),
            tile_texts=self.tile_texts,
        ).cpu()
        # The published protocol gives NaN where a video lacks a caption slot; such a video cannot win.
        return similarity_TV.nan_to_num(LOWEST) if published else similarity_TV

    def _noise(self, texts: slice) -> Tensor | None:
        """Noise ``(block, M, D)`` of some texts; None for a head that draws no samples."""
        if not self.head.draws_samples:
            return None
        return caption_noise(self.features.captions[texts], self.config, self.features.frames_VFD.shape[2], self.device)

    def _gallery_bytes(self) -> int:
        """About what the prepared gallery takes: frames and their directions, and the pooling's keys and basis."""
        num_videos, num_frames, width = self.features.frames_VFD.shape
        pool = self.head.pooling
        vectors = num_frames if isinstance(pool, FramePool | LateInteraction) else 1
        if isinstance(pool, XPool):
            vectors = (pool.num_heads + (1 if pool.best_frame is None else 3)) * num_frames + 2
        return 4 * num_videos * width * (2 * num_frames + vectors)

    def _groups(self, blocks: list[slice]) -> Iterator[list[slice]]:
        """Blocks whose scores and noise together take at most ``GROUP_BYTES``; at least one."""
        num_videos, _, width = self.features.frames_VFD.shape
        num_values = num_videos + self.config.stochastic.num_trials * width
        limit = GROUP_BYTES // (4 * num_values)
        group: list[slice] = []
        for texts in blocks:
            if group and sum(t.stop - t.start for t in (*group, texts)) > limit:
                yield group
                group = []
            group.append(texts)
        if group:
            yield group


class BlockFiles:
    """Blocks of scores in a directory, one file each.

    Args:
        directory: of the files; its name stands for everything that the scores depend on.
        scorer: computes the blocks that are missing.
        log: is told of damaged files.
    """

    def __init__(self, directory: Path, scorer: BlockScorer, log: Any = print) -> None:
        self.directory, self.scorer, self.log = directory, scorer, log

    def compute(self, number: int, count: int) -> None:
        """Write the blocks of task ``number`` of ``count`` that are not there yet."""
        from safetensors.torch import save_file
        from tqdm import tqdm

        self.directory.mkdir(parents=True, exist_ok=True)
        own = self.scorer.blocks[number::count]
        missing = [texts for texts in own if self._read(texts) is None]
        quiet = True if number > 0 or len(own) < 8 else None  # None: a bar on a terminal only
        scores = self.scorer.scores(missing)
        for texts, block_TV in tqdm(zip(missing, scores), "score", len(missing), unit="block", disable=quiet):
            with replacing(self._path(texts), f".{number}") as temporary:
                save_file({"similarity": block_TV}, temporary, metadata={"sha256": _sha256(block_TV)})

    def blocks(self) -> Iterator[Tensor]:
        """Every block in order; one that is missing or damaged is computed here."""
        for texts in self.scorer.blocks:
            block_TV = self._read(texts)
            yield next(self.scorer.scores([texts])) if block_TV is None else block_TV

    def scores_of(self, text: int) -> Tensor:
        """Similarity ``(V,)`` of one text with every video."""
        [texts] = [block for block in self.scorer.blocks if block.start <= text < block.stop]
        block_TV = self._read(texts)
        return self.scorer.scores_of(text) if block_TV is None else block_TV[text - texts.start]

    def _path(self, texts: slice) -> Path:
        return self.directory / f"rows-{texts.start:09d}.safetensors"

    def _read(self, texts: slice) -> Tensor | None:
        """A finished block, or None; a damaged one is named, and will be computed again."""
        from safetensors import SafetensorError, safe_open

        path = self._path(texts)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                block_TV, checksum = file.get_tensor("similarity"), (file.metadata() or {})["sha256"]
            if block_TV.shape != (texts.stop - texts.start, len(self.scorer.features.video_ids)):
                raise ValueError(f"its shape is {tuple(block_TV.shape)}")
            if _sha256(block_TV) != checksum:
                raise ValueError("its checksum differs")
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            self.log(f"{path} is damaged ({error}): computing it again")
            return None
        return block_TV


def _sha256(block_TV: Tensor) -> str:
    return hashlib.sha256(block_TV.contiguous().numpy().data).hexdigest()
