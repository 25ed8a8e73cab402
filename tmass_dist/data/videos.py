"""The videos of a split in order, each once with all its captions, decoded by worker processes: for evaluation."""

# Shapes: B videos, F frames, H W pixels, C colours, L tokens, T texts.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tmass_dist.data.index import Index
from tmass_dist.data.loader import PREFETCH, Tokenize, prepare_worker, shared_array
from tmass_dist.data.samples import DamagedError, read_into
from tmass_dist.errors import PeerLostError


@dataclass(frozen=True)
class VideoBatch:
    """Some videos with all their captions; ``caption_ids`` are (video id, slot)."""

    pixels_BFHWC: Tensor
    """uint8, in memory that is reused: valid until the next batch is taken."""
    video_ids: list[str]
    tokens_TL: Tensor
    captions: list[str]
    caption_ids: list[tuple[str, int]]


@dataclass(frozen=True)
class _Decoded:
    """What a worker returns; the pixels are in the shared memory. A damaged sample comes as its message."""

    video_ids: list[str]
    tokens_TL: np.ndarray
    captions: list[str]
    caption_ids: list[tuple[str, int]]
    damage: str | None = None


class _Videos(Dataset):
    """Item ``i`` is batch ``batches[i]``; its pixels go to ``pixels[i % len(pixels)]``."""

    def __init__(
        self, index: Index, batches: Sequence[int], batch_size: int, tokenize: Tokenize, num_frames: int, workers: int
    ) -> None:
        self.index, self.batches, self.batch_size, self.tokenize = index, batches, batch_size, tokenize
        side = index.image_size
        num_buffers = PREFETCH * workers + 2
        self.pixels = shared_array((num_buffers, min(batch_size, len(index)), num_frames, side, side, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.batches)

    def numbers(self, item: int) -> range:
        start = self.batches[item] * self.batch_size
        return range(start, min(start + self.batch_size, len(self.index)))

    def __getitem__(self, item: int) -> _Decoded:
        pixels_BFHWC = self.pixels[item % len(self.pixels)]
        try:
            metas = [read_into(pixels_BFHWC[row], self.index, n) for row, n in enumerate(self.numbers(item))]
        except DamagedError as error:
            return _Decoded([], np.empty((0, 0)), [], [], str(error))
        rows = [(meta["id"], slot, text) for meta in metas for slot, text in enumerate(meta["captions"])]
        captions = [text for *_, text in rows]
        tokens_TL = self.tokenize(captions).numpy()
        return _Decoded([m["id"] for m in metas], tokens_TL, captions, [(video_id, slot) for video_id, slot, _ in rows])


def num_batches(index: Index, batch_size: int) -> int:
    """Batches of a split; the last one may be smaller."""
    return -(-len(index) // batch_size)


def iterate_videos(
    index: Index,
    *,
    batches: Sequence[int],
    batch_size: int,
    tokenize: Tokenize,
    num_frames: int = 12,
    num_workers: int = 0,
    timeout_s: float = 600,
) -> Iterator[VideoBatch]:
    """Decode some batches of a split. Which videos share a batch depends on the batch's number and size alone.

    Args:
        index: the split.
        batches: numbers of the batches, below :func:`num_batches`, in the order in which they are wanted.
        batch_size: videos of a batch.
        tokenize: texts to token ids.
        num_frames: frames of a video.
        num_workers: decoding processes; 0 decodes in this process.
        timeout_s: how long a worker may take for a batch.

    Raises:
        DamagedError: a sample is damaged; in evaluation no other video may replace it.
        PeerLostError: a worker was killed, or took longer than ``timeout_s``.
    """
    workers = min(num_workers, len(batches)) if len(batches) > 1 else 0
    videos = _Videos(index, batches, batch_size, tokenize, num_frames, workers)
    pixels = torch.from_numpy(videos.pixels)
    loader = iter(
        DataLoader(
            videos,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=prepare_worker,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=PREFETCH if workers else None,
            timeout=timeout_s if workers else 0,
        )
    )
    try:
        for item in range(len(videos)):
            try:
                decoded: _Decoded = next(loader)
            except (RuntimeError, EOFError, ConnectionError) as error:
                if workers == 0:
                    raise
                words = " ".join(str(error).split()) or type(error).__name__
                raise PeerLostError(f"a process that decodes {index.directory} ended or hangs: {words}") from error
            if decoded.damage:
                raise DamagedError(decoded.damage)
            yield VideoBatch(
                pixels[item % len(pixels)][: len(decoded.video_ids)],
                decoded.video_ids,
                torch.from_numpy(decoded.tokens_TL),
                decoded.captions,
                decoded.caption_ids,
            )
    finally:
        # Workers ignore SIGTERM, and would outlive an exit that does not wait for them.
        getattr(loader, "_shutdown_workers", lambda: None)()
