"""Batches of one rank, decoded straight into the memory that the training process reads."""

# Shapes: B pairs, F frames, H W pixels, C colours, L tokens, T texts.

from __future__ import annotations

import mmap
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from tmass_dist.data.frames import random_frame_indices, uniform_frame_indices
from tmass_dist.data.index import DamagedError, Index, read_sample
from tmass_dist.data.order import epoch_batches, substitutes
from tmass_dist.errors import PeerLostError, UserError
from tmass_dist.noise import text_key

Tokenize = Callable[[list[str]], Tensor]

PREFETCH = 2
"""Batches that each worker has in hand."""


@dataclass(frozen=True)
class Batch:
    """Pairs of one rank: row ``i`` of every field is one (video, caption)."""

    pixels_BFHWC: Tensor
    """In memory that is used again: it holds this batch until the next one is asked for."""
    tokens_BL: Tensor
    captions: list[str]
    video_ids: list[str]
    caption_slots: list[int]
    damaged: list[tuple[str, str]]
    """Id and reason of every video that another stands in for."""


@dataclass(frozen=True)
class VideoBatch:
    """Videos for evaluation with all their captions; ``caption_ids`` are (video id, slot)."""

    pixels_BFHWC: Tensor
    video_ids: list[str]
    tokens_TL: Tensor
    captions: list[str]
    caption_ids: list[tuple[str, int]]


def read_into(
    out_FHWC: np.ndarray, index: Index, number: int, rng_of: Callable[[str], np.random.Generator] | None = None
) -> dict:
    """Decode a sample's frames into ``out_FHWC`` (uint8) and return its JSON.

    Of more packed frames than fit, the middle of each segment is taken, or any of it when ``rng_of`` (the id) says
    which; a clip is decoded here.

    Raises:
        DamagedError: its bytes, its JSON or a frame are not what was packed.
    """
    meta, payload = read_sample(index, number)
    num_frames = len(out_FHWC)
    pick = uniform_frame_indices if rng_of is None else partial(random_frame_indices, rng=rng_of(meta["id"]))
    try:
        if index.store == "clip":
            from tmass_dist.data.video import read_video

            start, end = (int(edge) for edge in meta["frame_window"])
            chosen = [start + i for i in pick(end - start, num_frames)]
            for frame_HWC, picture in zip(out_FHWC, read_video(payload[0], lambda _: chosen, index.image_size)[0]):
                frame_HWC[:] = picture[..., :3]
            return meta
        chosen = range(num_frames) if len(payload) == num_frames else pick(len(payload), num_frames)
        for frame_HWC, i in zip(out_FHWC, chosen):
            simplejpeg.decode_jpeg(payload[i], buffer=frame_HWC)
    except ValueError as error:
        raise DamagedError(f"sample {meta['id']!r} of {index.directory} does not decode: {error}") from error
    return meta


@dataclass(frozen=True)
class _Read:
    """What a worker says of a batch; its pixels lie in the shared memory."""

    tokens_BL: np.ndarray
    captions: list[str]
    video_ids: list[str]
    caption_slots: list[int]
    damaged: list[tuple[str, str]]


def _shared(shape: tuple[int, ...], kind: type) -> np.ndarray:
    """Memory that this process and those it forks write and read; unlike /dev/shm, as large as the machine has."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype=kind).reshape(shape)


class _Steps(Dataset):
    """Item ``step`` is this rank's part of global batch ``step``; its pixels go to ``pixels[step % len(pixels)]``."""

    def __init__(
        self,
        index: Index,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        tokenize: Tokenize,
        num_frames: int,
        random_frames: bool,
        num_workers: int,
    ) -> None:
        self.num_frames, self.random_frames = num_frames, random_frames
        self.index, self.batch_size, self.seed, self.tokenize = index, batch_size, seed, tokenize
        local = batch_size // world_size
        self.mine = range(rank * local, (rank + 1) * local)
        # Written again and again: fresh memory for every batch costs as much as half of the decoding. One batch is
        # in use, a GPU may still fetch the one before, and each worker has PREFETCH in hand.
        shape = (PREFETCH * num_workers + 2, local, num_frames, index.image_size, index.image_size, 3)
        self.pixels = _shared(shape, np.uint8)
        # Which sample each worker reads, for the words about one that hangs.
        self.reading = _shared((max(1, num_workers),), np.int64)
        self.reading[:] = -1
        self.epoch, self.plan = -1, np.empty((0, 0, 2), np.int32)
        self.plan_of(0)
        self.steps_per_epoch = len(self.plan)

    def plan_of(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            self.plan = epoch_batches(self.index.num_captions, seed=self.seed, epoch=epoch, batch_size=self.batch_size)
            self.epoch = epoch
        return self.plan

    def __getitem__(self, step: int) -> _Read:
        epoch, number = divmod(step, self.steps_per_epoch)
        batch_B2 = self.plan_of(epoch)[number]
        pixels_BFHWC = self.pixels[step % len(self.pixels)]
        worker = get_worker_info()
        captions, ids, slots, damaged = [], [], [], []
        for row, position in enumerate(self.mine):
            pair = (int(batch_B2[position, 0]), int(batch_B2[position, 1]))
            stand_ins = None
            while True:
                self.reading[worker.id if worker else 0] = pair[0]
                try:
                    meta = read_into(pixels_BFHWC[row], self.index, pair[0], self._chance(step, pair[1]))
                    break
                except DamagedError as error:
                    damaged.append((self.index.id_of(pair[0]), str(error)))
                    stand_ins = stand_ins or substitutes(
                        self.index.num_captions, batch_B2, position, seed=self.seed, step=step
                    )
                    following = next(stand_ins, None)
                    if following is None:
                        raise UserError(f"{error}; and no video is left to stand in for it") from error
                    pair = following
            captions.append(meta["captions"][pair[1]])
            ids.append(meta["id"])
            slots.append(pair[1])
        self.reading[worker.id if worker else 0] = -1
        return _Read(self.tokenize(captions).numpy(), captions, ids, slots, damaged)

    def _chance(self, step: int, slot: int) -> Callable[[str], np.random.Generator] | None:
        if not self.random_frames:
            return None
        return lambda video_id: np.random.default_rng(text_key(self.seed, step, video_id, slot))


class _From(Sampler):
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


def _prepare_worker(_: int) -> None:
    # The whole SLURM step is signalled; only the training process may answer.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class TrainLoader:
    """This rank's batches, from any step on, without reading what came before.

    Args:
        index: the training split.
        batch_size: pairs of the global batch.
        rank, world_size: which contiguous part of every global batch is ours.
        seed: of the order.
        tokenize: texts to token ids.
        num_workers: decoding processes; 0 decodes here.
        num_frames: frames of a video; of more packed ones, one from each segment.
        random_frames: any frame of a segment, keyed by step and pair, in place of the middle one.
        timeout_s: how long a worker may take for a batch.

    Raises:
        UserError: the batch does not divide by the ranks, or there are fewer pairs than one batch.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        tokenize: Tokenize,
        num_workers: int,
        num_frames: int = 12,
        random_frames: bool = False,
        timeout_s: float = 600,
    ) -> None:
        if batch_size % world_size:
            raise UserError(f"data.batch_size={batch_size} is not divisible by {world_size} ranks")
        num_pairs = int(index.num_captions.sum())
        if num_pairs < batch_size:
            raise UserError(f"{index.directory} has {num_pairs} pairs, fewer than one batch of {batch_size}")
        self._steps = _Steps(
            index, batch_size, rank, world_size, seed, tokenize, num_frames, random_frames, num_workers
        )
        self.steps_per_epoch = self._steps.steps_per_epoch
        self._num_workers, self._timeout_s = num_workers, timeout_s
        self._pixels = torch.from_numpy(self._steps.pixels)
        if torch.cuda.is_available():  # pinned, so that a GPU fetches a batch while it works; a refusal costs only that
            torch.cuda.cudart().cudaHostRegister(  # pyright: ignore[reportOptionalMemberAccess]
                self._pixels.data_ptr(), self._pixels.numel(), 0
            )

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches ``start_step``, ``start_step + 1``, ... without an end; close it to end the workers.

        Raises:
            UserError: a batch cannot be read; it names the shard.
            PeerLostError: a worker was killed, or took longer than ``timeout_s``; it names what was being read.
        """
        batches = iter(
            DataLoader(
                self._steps,
                batch_size=None,
                sampler=_From(start_step),
                num_workers=self._num_workers,
                worker_init_fn=_prepare_worker,
                multiprocessing_context="fork" if self._num_workers else None,
                prefetch_factor=PREFETCH if self._num_workers else None,
                timeout=self._timeout_s if self._num_workers else 0,
            )
        )
        step = start_step
        try:
            while True:
                try:
                    read: _Read = next(batches)
                except (ValueError, OSError) as error:
                    if isinstance(error, ConnectionError):
                        raise PeerLostError(f"a decoding process ended{self._reading()}: {error}") from error
                    # A worker's error comes with its whole traceback; its last line is what it said.
                    raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
                except (RuntimeError, EOFError) as error:
                    if self._num_workers == 0:
                        raise
                    words = " ".join(str(error).split()) or type(error).__name__
                    raise PeerLostError(f"a decoding process ended or hangs{self._reading()}: {words}") from error
                yield Batch(
                    self._pixels[step % len(self._pixels)],
                    torch.from_numpy(read.tokens_BL),
                    read.captions,
                    read.video_ids,
                    read.caption_slots,
                    read.damaged,
                )
                step += 1
        finally:
            # Workers ignore SIGTERM, and so would outlive the exit of a process that was not patient with them.
            getattr(batches, "_shutdown_workers", lambda: None)()

    def _reading(self) -> str:
        index = self._steps.index
        numbers = [int(number) for number in self._steps.reading if number >= 0]
        names = sorted({index.shards[index.sample(number).shard].name for number in numbers})
        return f" reading {', '.join(names)} of {index.directory}" if names else ""


def iterate_videos(
    index: Index, *, rank: int, world_size: int, batch_size: int, tokenize: Tokenize, num_frames: int = 12
) -> Iterator[VideoBatch]:
    """Every video of the split once over all ranks, with all its captions; ranks take whole batches in turn.

    Which videos share a batch does not depend on the ranks, so neither do the last bits of what they are encoded to.

    Raises:
        DamagedError: a sample is damaged: nothing may stand in for it here.
    """
    for start in range(rank * batch_size, len(index), world_size * batch_size):
        numbers = range(start, min(start + batch_size, len(index)))
        pixels = torch.empty(len(numbers), num_frames, index.image_size, index.image_size, 3, dtype=torch.uint8)
        metas = [read_into(pixels[row].numpy(), index, number) for row, number in enumerate(numbers)]
        captions = [(meta["id"], slot, text) for meta in metas for slot, text in enumerate(meta["captions"])]
        yield VideoBatch(
            pixels,
            [meta["id"] for meta in metas],
            tokenize([text for *_, text in captions]),
            [text for *_, text in captions],
            [(video_id, slot) for video_id, slot, _ in captions],
        )
