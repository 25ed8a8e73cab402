"""Batches of one rank, in an order that belongs to the run and not to the machines."""

# Shapes: B pairs, F frames, H W pixels, C colours, L tokens, T texts.

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tmass_dist.cli import PeerLostError
from tmass_dist.data.frames import random_frame_indices, uniform_frame_indices
from tmass_dist.data.index import Index, read_sample
from tmass_dist.noise import text_key

Tokenize = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Batch:
    """Pairs of one rank: row ``i`` of every field is one (video, caption)."""

    pixels_BFHWC: Tensor
    tokens_BL: Tensor
    captions: list[str]
    video_ids: list[str]
    caption_slots: list[int]


@dataclass(frozen=True)
class VideoBatch:
    """Videos for evaluation with all their captions; ``caption_ids`` are (video id, slot)."""

    pixels_BFHWC: Tensor
    video_ids: list[str]
    tokens_TL: Tensor
    captions: list[str]
    caption_ids: list[tuple[str, int]]


def epoch_batches(index: Index, *, seed: int, epoch: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """The global batches of an epoch: pairs of (sample number, caption slot).

    Every pair comes at most once, the remainder that fills no batch is left out, and no video comes twice in a
    batch while another is left. It depends on the arguments alone: any world size cuts the same batches.
    """
    rng = np.random.default_rng((seed, epoch))
    counts = np.array([sample.num_captions for sample in index.samples])
    # Round r takes the r-th caption, in an order of its own, of every video that has one: within a round no video
    # repeats, and only a batch that spans two rounds can meet one twice; such a pair waits for the next batch.
    slots = [rng.permutation(int(count)) for count in counts]
    queue: list[tuple[int, int]] = []
    for number in range(int(counts.max(initial=0))):
        videos = np.flatnonzero(counts > number)
        queue += [(int(video), int(slots[video][number])) for video in rng.permutation(videos)]
    batches: list[list[tuple[int, int]]] = []
    waiting: list[tuple[int, int]] = []
    batch: list[tuple[int, int]] = []
    seen: set[int] = set()

    def take(pair: tuple[int, int]) -> None:
        nonlocal batch, seen
        batch.append(pair)
        seen.add(pair[0])
        if len(batch) == batch_size:
            batches.append(batch)
            batch, seen = [], set()

    for pair in queue:
        still: list[tuple[int, int]] = []
        for held in waiting:
            (still.append if held[0] in seen else take)(held)
        waiting = still
        (waiting.append if pair[0] in seen else take)(pair)
    for held in waiting:  # nothing else is left to take
        take(held)
    return batches


def _decode(jpegs: list[bytes], num_frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """``num_frames`` of the packed frames, the middle of each segment, or any of it when ``rng`` is given."""
    if len(jpegs) != num_frames:
        choose = uniform_frame_indices if rng is None else partial(random_frame_indices, rng=rng)
        jpegs = [jpegs[i] for i in choose(len(jpegs), num_frames)]
    return np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs])


class _Steps(Dataset):
    """Item ``step`` is this rank's part of global batch ``step``."""

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
    ) -> None:
        self.num_frames, self.random_frames = num_frames, random_frames
        self.index, self.located = index, index.located
        self.batch_size, self.seed, self.tokenize = batch_size, seed, tokenize
        local = batch_size // world_size
        self.mine = slice(rank * local, (rank + 1) * local)
        self.epoch, self.plan = -1, [[(0, 0)]]
        self.plan_of(0)
        self.steps_per_epoch = len(self.plan)

    def plan_of(self, epoch: int) -> list[list[tuple[int, int]]]:
        if epoch != self.epoch:
            self.plan = epoch_batches(self.index, seed=self.seed, epoch=epoch, batch_size=self.batch_size)
            self.epoch = epoch
        return self.plan

    def __getitem__(self, step: int) -> Batch:
        epoch, number = divmod(step, self.steps_per_epoch)
        pairs = self.plan_of(epoch)[number][self.mine]
        frames, captions, ids = [], [], []
        for video, slot in pairs:
            meta, jpegs = read_sample(*self.located[video])
            rng = np.random.default_rng(text_key(self.seed, step, meta["id"], slot)) if self.random_frames else None
            frames.append(_decode(jpegs, self.num_frames, rng))
            captions.append(meta["captions"][slot])
            ids.append(meta["id"])
        pixels = torch.from_numpy(np.stack(frames))
        return Batch(pixels, self.tokenize(captions), captions, ids, [slot for _, slot in pairs])


class _From(Sampler):
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


def _ignore_signals(_: int) -> None:
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
        ValueError: the batch does not divide by the ranks, or there are fewer pairs than one batch.
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
            raise ValueError(f"data.batch_size={batch_size} is not divisible by {world_size} ranks")
        num_pairs = sum(sample.num_captions for sample in index.samples)
        if num_pairs < batch_size:
            raise ValueError(f"{index.directory} has {num_pairs} pairs, fewer than one batch of {batch_size}")
        self._steps = _Steps(index, batch_size, rank, world_size, seed, tokenize, num_frames, random_frames)
        self.steps_per_epoch = self._steps.steps_per_epoch
        self._num_workers, self._timeout_s = num_workers, timeout_s

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches ``start_step``, ``start_step + 1``, ... without an end; close it to end the workers.

        Raises:
            ValueError: a shard is damaged; it is named.
            PeerLostError: a worker was killed, or took longer than ``timeout_s``.
        """
        batches = iter(
            DataLoader(
                self._steps,
                batch_size=None,
                sampler=_From(start_step),
                num_workers=self._num_workers,
                worker_init_fn=_ignore_signals,
                pin_memory=torch.cuda.is_available(),
                timeout=self._timeout_s if self._num_workers else 0,
            )
        )
        try:
            while True:
                try:
                    batch = next(batches)
                except ValueError as error:
                    # A worker's error comes with its whole traceback; its last line is what it said.
                    raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
                except (RuntimeError, ConnectionError, EOFError) as error:
                    if self._num_workers == 0:
                        raise
                    words = " ".join(str(error).split()) or type(error).__name__
                    raise PeerLostError(f"a decoding process ended or hangs: {words}") from error
                yield batch
        finally:
            # Workers ignore SIGTERM, and so would outlive the exit of a process that was not patient with them.
            getattr(batches, "_shutdown_workers", lambda: None)()


def iterate_videos(
    index: Index, *, rank: int, world_size: int, batch_size: int, tokenize: Tokenize, num_frames: int = 12
) -> Iterator[VideoBatch]:
    """Every video of the split once over all ranks, with all its captions; ranks take whole batches in turn.

    Which videos share a batch does not depend on the ranks, so neither do the last bits of what they are encoded to.
    """
    located = index.located
    for start in range(rank * batch_size, len(located), world_size * batch_size):
        read = [read_sample(*at) for at in located[start : start + batch_size]]
        ids = [meta["id"] for meta, _ in read]
        captions = [(meta["id"], slot, text) for meta, _ in read for slot, text in enumerate(meta["captions"])]
        yield VideoBatch(
            torch.from_numpy(np.stack([_decode(jpegs, num_frames) for _, jpegs in read])),
            ids,
            tokenize([text for *_, text in captions]),
            [text for *_, text in captions],
            [(video_id, slot) for video_id, slot, _ in captions],
        )
