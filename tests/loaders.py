"""Loaders of all ranks in one process, for tests of the order and of the loader."""

from dataclasses import fields, replace

from tmass_dist.config import DataConfig
from tmass_dist.data.index import Index
from tmass_dist.data.loader import Batch, TrainLoader
from tmass_dist.models.backbone import WordTokenizer

TOKENIZE = WordTokenizer(["a"], 8)


def make_loaders(index: Index, world_size: int, **options) -> list[TrainLoader]:
    """A loader for each rank; ``options`` are fields of ``DataConfig`` or arguments of ``TrainLoader``."""
    known = {field.name for field in fields(DataConfig)}
    settings = {"batch_size": 4, "num_workers": 0} | {name: options.pop(name) for name in [*options] if name in known}
    arguments = {"seed": 1, "tokenize": TOKENIZE, "world_size": world_size} | options
    return [TrainLoader(index, DataConfig(**settings), rank=rank, **arguments) for rank in range(world_size)]


def copied(batch: Batch) -> Batch:
    """The loader reuses the memory of a batch, so its pixels must be copied."""
    return replace(batch, pixels_BFHWC=batch.pixels_BFHWC.clone())


def global_batches(loaders: list[TrainLoader], start: int, steps: int) -> list[list[Batch]]:
    streams = [loader.batches(start) for loader in loaders]
    steps_by_rank = [[copied(next(stream)) for stream in streams] for _ in range(steps)]
    for stream in streams:
        stream.close()
    return steps_by_rank
