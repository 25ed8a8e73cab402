"""The training splits that ``data.train`` names: one, or a mixture of several."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tmass_dist.config.ranges import require

MAX_WEIGHT = 1000
"""The order of an epoch is planned in memory, for each pair as often as it is read."""


@dataclass(frozen=True)
class TrainPart:
    """One split of ``data.train``."""

    path: str
    """Directory or URL of its shards."""
    weight: int = 1
    """How many times an epoch reads each of its pairs."""


def train_parts(value: object) -> tuple[TrainPart, ...]:
    """The splits that ``data.train`` names.

    Raises:
        UserError: it is neither a path nor a list of paths and of ``{path: ..., weight: ...}``.
    """
    items = [value] if isinstance(value, str) else value
    what = "it is a path, or a list such as [{path: data/msrvtt/train, weight: 2}, data/vatex/train]"
    require(isinstance(items, (list, tuple)) and len(items) > 0, "data.train", value, what)
    assert isinstance(items, (list, tuple))
    parts = []
    for item in items:
        keys: Any = asdict(item) if isinstance(item, TrainPart) else {"path": item} if isinstance(item, str) else item
        valid = isinstance(keys, dict) and "path" in keys and keys.keys() <= {"path", "weight"}
        require(valid, "an entry of data.train", item, what)
        path, weight = keys["path"], keys.get("weight", 1)
        require(isinstance(path, str) and path.strip("/ ") != "", "a path of data.train", path, "it must be a path")
        require(
            type(weight) is int and 1 <= weight <= MAX_WEIGHT,
            f"the weight of {path} in data.train",
            weight,
            f"it is how many times an epoch reads each pair of the split, a whole number from 1 to {MAX_WEIGHT}; to "
            "read a split less often than another, raise the weight of the other",
        )
        parts.append(TrainPart(path, weight))
    paths = [part.path.rstrip("/") for part in parts]
    require(len({*paths}) == len(paths), "data.train", paths, "it names a split twice; give it a weight instead")
    return tuple(parts)
