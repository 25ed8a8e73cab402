"""A mixture of splits: several indexes read as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from tmass_dist.data.index import Index, NoCaptionsError
from tmass_dist.data.index_checks import COLUMNS
from tmass_dist.data.remote import is_remote
from tmass_dist.errors import UserError


@dataclass(frozen=True)
class Mixture(Index):
    """The samples of several splits, one split after the other; so are their shards.

    ``columns`` lacks the ids. The id of a sample is the name of its part and its own id (``msrvtt/train/video7``),
    because two splits may use the same ids.
    """

    parts: tuple[Index, ...] = ()
    names: tuple[str, ...] = ()
    """Names of the parts: the end of their paths, as long as it takes to tell them apart."""
    weights: tuple[int, ...] = ()
    """How many times an epoch reads each pair of a part."""

    @property
    def first_samples(self) -> np.ndarray:
        """Number of the first sample of each part, and the number of samples."""
        return np.cumsum([0, *(len(part) for part in self.parts)])

    @property
    def first_shards(self) -> np.ndarray:
        """Number of the first shard of each part, and the number of shards."""
        return np.cumsum([0, *(len(part.shards) for part in self.parts)])

    def part_of(self, number: int) -> int:
        """The part that holds a sample."""
        return int(np.searchsorted(self.first_samples, number, side="right")) - 1

    def locate(self, number: int) -> tuple[Index, int]:
        """The part that holds a sample, and the sample's number there."""
        place = self.part_of(number)
        part, first_shard = self.parts[place], int(self.first_shards[place])
        wait = self.wait_for_shard
        if wait is not None:
            part = replace(part, wait_for_shard=lambda shard: wait(first_shard + shard))
        return part, number - int(self.first_samples[place])

    def id_of(self, number: int) -> str:
        part, own_number = self.locate(number)
        return f"{self.names[self.part_of(number)]}/{part.id_of(own_number)}"

    def take(self, numbers: Sequence[int] | np.ndarray) -> Mixture:
        """Some of the samples, with the parts in their old order; a part without any is left out."""
        numbers, first = np.asarray(numbers, dtype=np.int64), self.first_samples
        own = [numbers[(low <= numbers) & (numbers < high)] - low for low, high in pairwise(first)]
        kept = [k for k, part_numbers in enumerate(own) if len(part_numbers)]
        parts = [self.parts[k].take(own[k]) for k in kept]
        return _join(parts, [self.names[k] for k in kept], [self.weights[k] for k in kept])

    def with_captions(self, path: str | Path) -> Mixture:
        """The same samples, with the captions of a file appended to their own.

        Args:
            path: as for one split. A file in the directory of a part is for that part. A file elsewhere is for the
                part that has its ids.

        Raises:
            UserError: no such file, an invalid line, or a file elsewhere that has ids of no part, or of several parts.
        """
        as_given = Path(path).is_file()
        own = [k for k, part in enumerate(self.parts) if (Path(part.directory) / path).is_file()]
        if as_given:
            folder = Path(path).resolve().parent
            own = [k for k, part in enumerate(self.parts) if Path(part.directory).resolve() == folder]
        elif not own:
            directories = ", ".join(part.directory for part in self.parts)
            raise UserError(f"no file of captions {path}, neither as given nor in one of {directories}")
        changed: dict[int, Index] = {}
        for k in own or range(len(self.parts)):
            try:
                changed[k] = self.parts[k].with_captions(path)
            except NoCaptionsError:
                if own:
                    raise
        if not changed:
            raise NoCaptionsError(f"{path} has no caption for any video of {self.directory}")
        if not own and len(changed) > 1:
            names = " and of ".join(self.names[k] for k in changed)
            raise UserError(f"{path} has ids of {names}; put a file for each split into its directory")
        parts = [changed.get(k, part) for k, part in enumerate(self.parts)]
        return _join(parts, self.names, self.weights)


def make_mixture(parts: Sequence[Index], weights: Sequence[int]) -> Mixture:
    """A mixture of splits that were loaded.

    Raises:
        UserError: a split is named twice or has no video, or they differ in the size of their frames.
    """
    places = [part.directory if is_remote(part.directory) else str(Path(part.directory).resolve()) for part in parts]
    for k, place in enumerate(places):
        if place in places[:k]:
            raise UserError(f"data.train names {place} twice; give it a weight instead")
        if not len(parts[k]):
            raise UserError(f"{parts[k].directory} of data.train has no video")
        if parts[k].image_size != parts[0].image_size:
            raise UserError(
                f"the splits of data.train differ in the size of their frames: {parts[0].directory} has "
                f"{parts[0].image_size} pixels and {parts[k].directory} has {parts[k].image_size}; pack one of them "
                "again with --image-size"
            )
    return _join(parts, part_names(places), weights)


def part_names(places: Sequence[str]) -> list[str]:
    """The end of each path, as long as it takes to tell the paths apart."""
    components = [PurePosixPath(place.split("://")[-1]).parts for place in places]
    for length in range(1, max(map(len, components)) + 1):
        names = ["/".join(parts[-length:]).lstrip("/") for parts in components]
        if len({*names}) == len(names):
            return names
    return list(places)


def describe_parts(index: Index) -> list[str]:
    """A line for each part of a mixture: its pairs, its weight and its share of an epoch; nothing for a plain split."""
    if not isinstance(index, Mixture):
        return []
    num_pairs = [int(part.num_captions.sum()) for part in index.parts]
    total = sum(pairs * weight for pairs, weight in zip(num_pairs, index.weights))
    return [
        f"{name}: {pairs} pairs, weight {weight}, {pairs * weight / total:.1%} of an epoch"
        for name, pairs, weight in zip(index.names, num_pairs, index.weights)
    ]


def _join(parts: Sequence[Index], names: Sequence[str], weights: Sequence[int]) -> Mixture:
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS}
    first_shards = np.cumsum([0, *(len(part.shards) for part in parts[:-1])])
    columns["shard"] += np.repeat(first_shards, [len(part) for part in parts]).astype(np.int32)
    first = parts[0]
    return Mixture(
        directory=" + ".join(part.directory for part in parts),
        split=first.split,
        num_frames=min(part.num_frames for part in parts),
        image_size=first.image_size,
        store=first.store,
        shards=tuple(
            replace(shard, directory=shard.directory or part.directory) for part in parts for shard in part.shards
        ),
        columns=columns,
        cache=first.cache,
        retry_s=first.retry_s,
        parts=tuple(parts),
        names=tuple(names),
        weights=tuple(weights),
    )
