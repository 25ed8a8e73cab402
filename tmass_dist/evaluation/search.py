"""Two-stage search: candidates by their best single frame, then the exact score of each candidate.

The first stage finds the frames nearest to the text in a graph index (usearch, HNSW with int8 vectors). It uses single
frames, and not the mean of a video, since a caption often describes one scene only. The second stage computes the same
score as the exact evaluation. What the first stage loses is measured against the exact ranks.
"""

# Shapes: T texts, V videos, F frames, K candidates, D embedding width.

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.cli import replacing
from tmass_dist.errors import UserError

SAME_FRAME = 0.98
"""Cosine from which a frame counts as a repetition of the one before it and is not indexed."""
EXHAUSTIVE = 50_000
"""Up to this many frames all are compared: as fast as the graph, and exact but for the 8 bits."""
VIDEOS_PER_CALL = 4096
"""Videos that are added to an index at a time; it bounds the memory."""
EXPANSION = 512
"""Fewest frames that a search of the graph keeps in hand; more find more and take longer."""
FRAMES_PER_CANDIDATE = 1.5
"""Frames searched for each candidate at first: near frames are often of the same video."""


def _usearch() -> Any:
    try:
        from usearch import index
    except ModuleNotFoundError as error:
        raise UserError("the search needs usearch: pip install 'tmass-dist[search]'") from error
    return index


def _int8(vectors: np.ndarray) -> np.ndarray:
    """Vectors in 8 bits, each scaled to its largest value; cosines do not depend on the scale."""
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    return np.rint(vectors * (127 / np.maximum(largest, 1e-12))).astype(np.int8)


class FrameIndex:
    """Frames of videos, to be searched by text embeddings. A video is a row number; its frames' keys are ``row F + f``.

    Args:
        num_frames: F.
        width: D.
        path: of a saved index, or None for an empty one.
        writable: whether it will be changed; otherwise the file is memory-mapped.

    Raises:
        UserError: usearch is not installed, or the file is damaged.
    """

    def __init__(self, num_frames: int, width: int, path: Path | None = None, *, writable: bool = True) -> None:
        self.num_frames, self.width = num_frames, width
        usearch = _usearch()
        self.index = usearch.Index(ndim=width, metric="cos", dtype="i8", connectivity=16, expansion_add=128)
        if path is not None:
            try:
                (self.index.load if writable else self.index.view)(str(path))
            except (RuntimeError, ValueError, FileNotFoundError) as error:
                raise UserError(f"{path} is damaged: {error}; make it again with tmass index") from error
            if self.index.ndim != width:
                raise UserError(f"{path} has width {self.index.ndim}, not {width}; make it again with tmass index")
        self._lock = threading.Lock()  # usearch gives two searches at once the same scratch memory

    def __len__(self) -> int:
        """Number of frames in the index."""
        return len(self.index)

    def add(self, rows: np.ndarray, frames_VFD: np.ndarray, threads: int = 0) -> None:
        """Add videos.

        Args:
            rows: row number of each video, not in the index yet.
            frames_VFD: their embeddings, of any norm, in time order.
            threads: 0: all cores. More than one makes the graph, and so its approximation, depend on chance.
        """
        if not len(rows):
            return
        frames = np.asarray(frames_VFD, np.float32)
        frames = frames / np.maximum(np.linalg.norm(frames, axis=-1, keepdims=True), 1e-12)
        new = np.ones(frames.shape[:2], bool)
        new[:, 1:] = (frames[:, 1:] * frames[:, :-1]).sum(axis=-1) < SAME_FRAME
        keys = np.asarray(rows, np.uint64)[:, None] * np.uint64(self.num_frames) + np.arange(
            self.num_frames, dtype=np.uint64
        )
        self.index.add(keys[new], _int8(frames[new]), threads=threads)

    def remove(self, rows: list[int]) -> None:
        """Remove videos; frames that were not indexed are ignored."""
        keys = [row * self.num_frames + frame for row in rows for frame in range(self.num_frames)]
        present = np.array([key for key in keys if key in self.index], np.uint64)
        if len(present):
            self.index.remove(present)

    def save(self, path: Path) -> None:
        """Write it to a temporary file and rename it."""
        with replacing(path) as temporary:
            self.index.save(str(temporary))

    @property
    def is_exhaustive(self) -> bool:
        """Whether a search compares all frames."""
        return len(self.index) <= EXHAUSTIVE

    def candidates(self, text_TD: np.ndarray, number: int, fewest: int | None = None) -> list[np.ndarray]:
        """Rows of the videos whose best frame is nearest to each text, nearest first.

        Args:
            text_TD: text embeddings, of any norm.
            number: K; fewer are returned where the index has fewer videos.
            fewest: in the graph, fewer than K are returned if there are so many among the ``FRAMES_PER_CANDIDATE * K``
                nearest frames: a second search of more frames takes longer than the first. By default all K.
        """
        query = _int8(np.asarray(text_TD, np.float32))
        size = len(self.index)
        frames = min(size, round(FRAMES_PER_CANDIDATE * number))
        enough = number if fewest is None or self.is_exhaustive else min(fewest, number)
        if not size:
            return [np.empty(0, np.int64) for _ in query]
        while True:
            with self._lock:
                self.index.expansion_search = max(EXPANSION, frames)
                found = self.index.search(query, frames, exact=self.is_exhaustive)
            keys = np.asarray(found.keys, np.int64).reshape(len(query), -1)
            counts = getattr(found, "counts", [keys.shape[1]])  # usearch has them only for several queries
            rows = [_first_of_each(line[:count] // self.num_frames)[:number] for line, count in zip(keys, counts)]
            # Videos with many near frames may leave too few videos among the frames.
            found_fewest = min(map(len, rows))
            if frames >= size or found_fewest >= enough:
                return rows
            # As many as should do, and no more: the time of a search grows with its frames.
            frames = min(size, max(frames * 5 // 4, frames * number * 6 // (5 * max(found_fewest, 1))) + 1)


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    """Every value once, in the order of its first place."""
    values, first = np.unique(rows, return_index=True)
    return values[np.argsort(first)]


def candidates(text_TD: Tensor, frames_VFD: Tensor, num_candidates: int) -> Tensor:
    """Numbers ``(T, K)`` of the videos with the best single frame for each text, best first.

    Raises:
        UserError: more candidates than videos, or usearch is not installed.
    """
    if not 1 <= num_candidates <= len(frames_VFD):
        raise UserError(f"--search is {num_candidates}; the gallery has {len(frames_VFD)} videos")
    index = FrameIndex(frames_VFD.shape[1], frames_VFD.shape[2])
    for start in range(0, len(frames_VFD), VIDEOS_PER_CALL):
        tile_VFD = frames_VFD[start : start + VIDEOS_PER_CALL].float()
        index.add(np.arange(start, start + len(tile_VFD)), tile_VFD.numpy(), threads=1)
    rows = index.candidates(F.normalize(text_TD.float(), dim=-1).numpy(), num_candidates)
    return torch.from_numpy(np.stack(rows))
