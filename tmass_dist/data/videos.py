"""The videos of a split in order, each once with all its captions, decoded by worker processes: for evaluation."""

# Shapes: B videos, F frames, H W pixels, C colours, L tokens, T texts.

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tmass_dist.data.index import Index
from tmass_dist.data.loader import PREFETCH, Tokenize, prepare_worker, raised_in_worker, shared_array, was_lost
from tmass_dist.data.samples import DamagedError, read_into
from tmass_dist.errors import PeerLostError

LOOK_S = 5.0
"""A worker of the fork server is no child of this process, which therefore gets no signal when it dies."""


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
        self.shape = (num_buffers, min(batch_size, len(index)), num_frames, side, side, 3)
        self.memory = -1  # anonymous memory, which forked workers share
        if workers and _start_method() != "fork":
            self.memory = os.memfd_create("videos")  # unlike /dev/shm it may use all memory
            os.truncate(self.memory, int(np.prod(self.shape)))  # a limit of the size of files counts here
        self.pixels = shared_array(self.shape, np.uint8, self.memory)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: it maps the same memory."""
        return {name: value for name, value in vars(self).items() if name != "pixels"} | {"memory": DupFd(self.memory)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.memory = state["memory"].detach()
        self.pixels = shared_array(self.shape, np.uint8, self.memory)

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
            multiprocessing_context=_start_method() if workers else None,
            prefetch_factor=PREFETCH if workers else None,
            timeout=min(timeout_s, LOOK_S) if workers else 0,
        )
    )
    try:
        for item in range(len(videos)):
            try:
                decoded = _next(loader, timeout_s)
            except Exception as error:
                if raised := raised_in_worker(error):
                    raise raised from error
                if workers == 0 or not was_lost(error):
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
        if videos.memory >= 0:
            os.close(videos.memory)


def _next(loader: Iterator[_Decoded], timeout_s: float) -> _Decoded:
    """The next batch. The loader looks whether its workers live when it has waited ``LOOK_S``."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return next(loader)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            if time.monotonic() > end:
                raise RuntimeError(f"no batch within {timeout_s:.0f} s") from error


def _start_method() -> str:
    """How workers start: not by a fork of this process if it uses CUDA, whose threads may hold locks at that moment."""
    if not torch.cuda.is_initialized():
        return "fork"
    multiprocessing.set_forkserver_preload([__name__])  # the imports take seconds, once
    return "forkserver"
