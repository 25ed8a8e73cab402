"""Batches of one rank, decoded straight into memory that the training process reads."""

# Shapes: B pairs, F frames, H W pixels, C colours, L tokens, T texts.

from __future__ import annotations

import contextlib
import mmap
import re
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from tmass_dist.config import DataConfig
from tmass_dist.data.index import Index
from tmass_dist.data.mixed_order import OneSetStreamingOrder, make_order
from tmass_dist.data.node_cache import NodeCache
from tmass_dist.data.remote import DownloadError
from tmass_dist.data.samples import DamagedError, read_into
from tmass_dist.data.streaming import StreamingOrder
from tmass_dist.errors import MachineError, PeerLostError, UserError
from tmass_dist.noise import text_key

Tokenize = Callable[[list[str]], Tensor]

PREFETCH = 2
"""Batches that each worker prepares ahead."""


@dataclass(frozen=True)
class Batch:
    """Pairs of one rank: row ``i`` of every field belongs to the same (video, caption)."""

    pixels_BFHWC: Tensor
    """uint8. The memory is reused: it holds this batch until the next one is requested."""
    tokens_BL: Tensor
    captions: list[str]
    video_ids: list[str]
    caption_slots: list[int]
    parts: list[int]
    """The part of a mixture from which each pair is; 0 without a mixture."""
    damaged: list[tuple[str, str]]
    """Id and reason of every damaged video that was replaced by another."""


@dataclass(frozen=True)
class _WorkerBatch:
    """What a worker returns of a batch; the pixels are in shared memory."""

    tokens_BL: np.ndarray
    captions: list[str]
    video_ids: list[str]
    caption_slots: list[int]
    parts: list[int]
    damaged: list[tuple[str, str]]


def shared_array(shape: tuple[int, ...], kind: type, file: int = -1) -> np.ndarray:
    """An array that several processes share; unlike /dev/shm it may use all memory.

    Args:
        shape, kind: of the array.
        file: descriptor of a file of its size; by default anonymous memory, shared with processes that are forked.
    """
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer(mmap.mmap(file, size), dtype=kind).reshape(shape)


class _RankBatches(Dataset):
    """Item ``step`` is this rank's part of global batch ``step``; its pixels go to ``pixels[step % len(pixels)]``."""

    def __init__(
        self, index: Index, config: DataConfig, rank: int, world_size: int, seed: int, tokenize: Tokenize, frames: int
    ) -> None:
        self.index, self.config, self.seed, self.tokenize = index, config, seed, tokenize
        local = config.batch_size // world_size
        self.positions = range(rank * local, (rank + 1) * local)
        # The memory is reused, because allocating it for each batch takes half as long as decoding. One batch is in
        # use, a GPU may still copy the one before, and each worker prepares PREFETCH.
        shape = (PREFETCH * config.num_workers + 2, local, frames, index.image_size, index.image_size, 3)
        self.pixels = shared_array(shape, np.uint8)
        # The sample that each worker reads, for the message about a worker that hangs.
        self.reading = shared_array((max(1, config.num_workers),), np.int64)
        self.reading[:] = -1
        self.order = make_order(index, config, seed)

    def __getitem__(self, step: int) -> _WorkerBatch:
        pixels_BFHWC = self.pixels[step % len(self.pixels)]
        captions, ids, slots, parts, damaged = [], [], [], [], []
        for row, (position, pair) in enumerate(zip(self.positions, self.order.pairs(step, self.positions).tolist())):
            candidates = self._candidates(pair, step, position)
            meta, number, slot = self._read_first(candidates, pixels_BFHWC[row], step, damaged)
            captions.append(meta["captions"][slot])
            ids.append(meta["id"])
            slots.append(slot)
            parts.append(self.index.part_of(number))
        self._note_reading(-1)
        return _WorkerBatch(self.tokenize(captions).numpy(), captions, ids, slots, parts, damaged)

    def _candidates(self, pair: tuple[int, int], step: int, position: int) -> Iterator[tuple[int, int]]:
        """The pair at this position of the global batch, then the pairs that may replace it."""
        yield pair
        yield from self.order.substitutes(step, position)

    def _read_first(
        self, candidates: Iterator[tuple[int, int]], out_FHWC: np.ndarray, step: int, damaged: list[tuple[str, str]]
    ) -> tuple[dict, int, int]:
        """Decode the first candidate that is not damaged, and add the others to ``damaged``.

        Returns:
            JSON, number and caption slot of the candidate.

        Raises:
            UserError: all candidates are damaged.
        """
        for number, slot in candidates:
            self._note_reading(number)
            try:
                meta = read_into(out_FHWC, self.index, number, self._random_frames(step, slot))
                return meta, number, slot
            except DamagedError as error:
                damaged.append((self.index.id_of(number), str(error)))
        raise UserError(f"{damaged[-1][1]}; and no video is left to replace it")

    def _note_reading(self, number: int) -> None:
        worker = get_worker_info()
        self.reading[worker.id if worker else 0] = number

    def _random_frames(self, step: int, slot: int) -> Callable[[str], np.random.Generator] | None:
        if self.config.frames == "uniform":
            return None
        return lambda video_id: np.random.default_rng(text_key(self.seed, step, video_id, slot))


class _StepsFrom(Sampler):
    """``start``, ``start + 1``, ... without end; nothing before ``start`` is set."""

    start: int | None = None

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while step is not None:
            yield step
            step += 1


def prepare_worker(_: int) -> None:
    # SLURM and Ctrl-C signal every process; only the training process may act on it.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def raised_in_worker(error: Exception) -> Exception | None:
    """The error that a decoding process raised, without the traceback that torch puts into its message.

    Returns:
        A user error, a failed download, or a MachineError for any other kind. None if ``error`` is not a worker's, but
        says for example that a worker was killed.
    """
    lines = str(error).strip().splitlines()
    if not lines or not re.match(r"Caught \w+ in DataLoader worker", lines[0]):
        return None
    kind, _, message = lines[-1].partition(": ")
    if isinstance(error, UserError | DownloadError):
        return type(error)(message)
    return MachineError(f"{kind.rpartition('.')[2]}: {message}")


def was_lost(error: Exception) -> bool:
    """Whether torch says by ``error`` that a decoding process ended or hangs."""
    return isinstance(error, RuntimeError | EOFError | ConnectionError) and not isinstance(error, MachineError)


def _pin(pixels: Tensor) -> None:
    """Lock memory in place, so that the GPU copies from it in the background; if that is refused, copies are slower."""
    if not torch.cuda.is_available():
        return
    cudart: Any = torch.cuda.cudart()
    if cudart.cudaHostRegister(pixels.data_ptr(), pixels.numel(), 0) != cudart.cudaError.success:
        # The error stays pending until a kernel is launched, which reports it as its own: let it be this one.
        with contextlib.suppress(RuntimeError):
            torch.zeros((), device="cuda")


class TrainLoader:
    """The batches of one rank, from any step on, without reading earlier ones.

    Args:
        index: the training split.
        config: batch size, workers and choice of frames.
        rank, world_size: rank ``r`` holds the ``r``-th contiguous part of every global batch.
        seed: seed of the order.
        tokenize: texts to token ids.
        num_frames: frames of a video; see :func:`~tmass_dist.data.samples.read_into`.
        timeout_s: longest time that a worker may take for a batch.
        node_ranks: the ranks of this node, which share ``data.cache``; None: all ranks.

    Raises:
        UserError: the ranks do not divide the batch or the lanes, the split has fewer pairs than one batch, or the
            cache is too small.

    Attributes:
        steps_per_epoch: global batches of an epoch.
        left_out: pairs of an epoch that fill no batch.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        seed: int,
        tokenize: Tokenize,
        num_frames: int = 12,
        timeout_s: float = 600,
        node_ranks: Sequence[int] | None = None,
    ) -> None:
        if config.batch_size % world_size:
            raise UserError(f"data.batch_size={config.batch_size} is not divisible by {world_size} ranks")
        if config.order == "streaming" and (config.lanes or config.batch_size) % world_size:
            raise UserError(f"data.lanes={config.lanes} is not divisible by {world_size} ranks")
        self._dataset = _RankBatches(index, config, rank, world_size, seed, tokenize, num_frames)
        self.steps_per_epoch, self.left_out = self._dataset.order.steps_per_epoch, self._dataset.order.left_out
        self._num_workers, self._timeout_s = config.num_workers, timeout_s
        self._cache = None
        if config.cache_gb is not None and isinstance(self._dataset.order, StreamingOrder | OneSetStreamingOrder):
            ranks = range(world_size) if node_ranks is None else node_ranks
            self._cache = NodeCache(index, self._dataset.order, config, rank, world_size, ranks)
            self._dataset.index = self._cache.reading(index)
        self._pixels = torch.from_numpy(self._dataset.pixels)
        self._sampler = _StepsFrom()
        self._loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._sampler,
            num_workers=self._num_workers,
            worker_init_fn=prepare_worker,
            multiprocessing_context="fork" if self._num_workers else None,
            prefetch_factor=PREFETCH if self._num_workers else None,
            persistent_workers=self._num_workers > 0,
            timeout=timeout_s if self._num_workers else 0,
        )
        self._iterator: Any = None

    def start_workers(self) -> None:
        """Start the decoding processes, which then wait for :meth:`batches`.

        They are forked. A process that uses CUDA, NCCL or other threads is not forked safely, so call this before.
        """
        self._iterator = iter(self._loader)

    def close(self) -> None:
        """End the decoding processes."""
        # They ignore SIGTERM, so they must be told to end before this process exits.
        getattr(self._iterator, "_shutdown_workers", lambda: None)()
        self._iterator = self._loader._iterator = None

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches ``start_step``, ``start_step + 1``, ... without end. Closing the generator ends the workers.

        Raises:
            UserError: a batch cannot be read; it names the shard.
            DownloadError: a shard could not be downloaded for ``data.retry_s`` seconds.
            PeerLostError: a worker was killed, or took longer than ``timeout_s``; it names what was being read.
        """
        fetcher = self._cache.start(start_step) if self._cache else None
        _pin(self._pixels)
        self._sampler.start = start_step
        self._iterator = batches = iter(self._loader)
        step, copied = start_step, None
        try:
            while True:
                if self._cache:
                    self._cache.note_step(step)
                batch = self._next(batches)  # from now on a worker may overwrite the batch before the last one
                yield Batch(
                    self._pixels[step % len(self._pixels)],
                    torch.from_numpy(batch.tokens_BL),
                    batch.captions,
                    batch.video_ids,
                    batch.caption_slots,
                    batch.parts,
                    batch.damaged,
                )
                step += 1
                if torch.cuda.is_available():
                    copied_before, copied = copied, torch.cuda.Event()
                    copied.record()
                    if copied_before is not None:
                        copied_before.synchronize()
        finally:
            self.close()
            if fetcher is not None:
                fetcher.close()

    def _next(self, batches: Iterator[_WorkerBatch]) -> _WorkerBatch:
        try:
            return next(batches)
        except Exception as error:
            if raised := raised_in_worker(error):
                raise raised from error
            if self._num_workers == 0 or not was_lost(error):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            raise PeerLostError(f"a decoding process ended or hangs{self._being_read()}: {message}") from error

    def _being_read(self) -> str:
        index = self._dataset.index
        numbers = [int(number) for number in self._dataset.reading if number >= 0]
        names = sorted({index.shards[index.sample(number).shard].name for number in numbers})
        return f" reading {', '.join(names)} of {index.directory}" if names else ""
