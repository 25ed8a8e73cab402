"""Start a training run from the weights of another one: ``init_from=PATH``."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tmass_dist.config import Config, load_config, make_config
from tmass_dist.errors import UserError
from tmass_dist.models.backbone import pretrained_normalisation
from tmass_dist.models.loading import check_finite, differences, is_whole_model, read_weights, weight_names
from tmass_dist.models.tmass import RetrievalModel

EXPORTED_WEIGHTS = "model.safetensors"


class Source(NamedTuple):
    """A trained model on this machine."""

    weights: Path
    config: Config | None
    """Settings of its training; None if there is only a file of weights."""
    normalisation: dict[str, list[float]] | None
    """Mean and standard deviation of the pixels; None if not known."""


def find_source(path: str | Path) -> Source:
    """The model in a run directory, an export, or a ``.safetensors`` file.

    Raises:
        UserError: there is none, or its settings are damaged.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"init_from={path} is not a .safetensors file; `tmass convert {path} OUT` converts a checkpoint of the "
                "authors' code, then set init_from=OUT"
            )
        if not is_whole_model(weight_names(path)):
            raise UserError(
                f"init_from={path} holds no whole model of this program; model.pretrained takes a file of towers alone"
            )
        return Source(path, None, None)
    run, export = path / "config.yaml", path / "config.json"
    if (path / EXPORTED_WEIGHTS).is_file() and export.is_file():
        content = read_export_config(export)
        config = make_config(content["settings"], name=str(export), allow_env=False)
        return Source(path / EXPORTED_WEIGHTS, config, content.get("normalisation"))
    best = path / "checkpoints" / "best.safetensors"
    if run.is_file() and best.is_file():
        config = load_config(str(run), allow_env=False)
        return Source(best, config, normalisation_of(config))
    if run.is_file():
        raise UserError(f"init_from={path}: the run has no {best.relative_to(path)} yet, which validation writes")
    raise UserError(f"init_from={path} is no run directory, no export and no file of weights")


def read_export_config(path: Path) -> dict[str, Any]:
    """The content of an export's ``config.json``; it and the weights beside it are compared with their checksums.

    An export of version 0.1 has no checksums: it is read, and a line in the log says so.

    Raises:
        UserError: a file is missing, damaged or was changed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["settings"], dict):
            raise TypeError("its settings are no mapping")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from error
    checksum, weights_sha256 = content.pop("checksum", None), content.get("weights_sha256")
    if checksum is None and weights_sha256 is None:
        logging.getLogger(__name__).warning(
            "%s has no checksums: it was exported by an older version; `tmass export` writes them", path
        )
        return content
    if checksum != export_checksum(content):
        raise UserError(f"{path} is damaged or was edited: its checksum differs; export the run again")
    weights = path.parent / EXPORTED_WEIGHTS
    if not weights.is_file() or _sha256(weights) != weights_sha256:
        raise UserError(f"{weights} is missing or damaged: its checksum differs; export the run again")
    return content


def export_checksum(content: dict[str, Any]) -> str:
    """Checksum of the content of an export's ``config.json``."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def normalisation_of(config: Config) -> dict[str, list[float]] | None:
    """Mean and standard deviation of the pixels that the towers of ``config`` take; None for towers of a JSON file."""
    if config.model.architecture.endswith(".json"):
        return None
    return pretrained_normalisation(config.model.architecture, config.model.pretrained)


def start_from(model: RetrievalModel, config: Config) -> str:
    """Load the weights of ``config.init_from`` into ``model``.

    The towers must be of the same architecture. The pooling and the text mass are loaded if they are of the same kind
    and shape; otherwise they keep their initial weights.

    Returns:
        One line for the log: what was loaded, and what starts fresh for which reason.

    Raises:
        UserError: there is no such model, it is damaged, or its towers differ.
    """
    assert config.init_from is not None
    source = find_source(config.init_from)
    weights, own = read_weights(source.weights), model.state_dict()
    towers = {name: value for name, value in weights.items() if name.startswith("towers.")}
    own_towers = {name: value for name, value in own.items() if name.startswith("towers.")}
    if differing := differences(own_towers, towers):
        there = f"; model.architecture is {source.config.model.architecture} there" if source.config else ""
        raise UserError(
            f"init_from={config.init_from}: its towers are not of model.architecture={config.model.architecture}; "
            f"{len(differing)} weights differ: {'; '.join(differing[:3])}{there}"
        )
    _check_normalisation(model, source, config)
    loaded, names, fresh = dict(towers), ["towers"], []
    for part in ("head.pooling", "head.mass"):
        there = {name: value for name, value in weights.items() if name.startswith(f"{part}.")}
        here = {name: value for name, value in own.items() if name.startswith(f"{part}.")}
        reason = _difference_of(part, source.config, config) or _difference_of_shapes(here, there)
        if not here:
            continue
        if reason:
            fresh.append(f"{part} ({reason})")
        else:
            loaded |= there
            names.append(part)
    check_finite(loaded, str(source.weights))
    model.load_state_dict({**own, **loaded})
    line = f"init_from={config.init_from}: {', '.join(names)} loaded from {source.weights}"
    return f"{line}; {', '.join(fresh)} starts fresh" if fresh else line


def _check_normalisation(model: RetrievalModel, source: Source, config: Config) -> None:
    """Raise a UserError if the towers of ``source`` were trained with pixels normalised in another way."""
    if source.normalisation is None or source.config is None:
        return
    mean, std = (torch.tensor(source.normalisation[key]) for key in ("mean", "std"))
    if not (torch.equal(mean, model.towers.mean_C.cpu()) and torch.equal(std, model.towers.std_C.cpu())):
        there = source.config.model.pretrained
        raise UserError(
            f"init_from={config.init_from}: its towers take pixels that are normalised in another way than those of "
            f"model.pretrained={config.model.pretrained}; set model.pretrained={there}, whose weights are not read"
        )


def _difference_of(part: str, there: Config | None, here: Config) -> str:
    """The settings of a part that differ, as text; empty if none does or the other settings are not known."""
    keys = ("pooling", "num_heads") if part == "head.pooling" else ("radius",)
    pairs = {key: (getattr(there.model, key), getattr(here.model, key)) for key in keys} if there else {}
    return ", ".join(f"model.{key} is {a} there and {b} here" for key, (a, b) in pairs.items() if a != b)


def _difference_of_shapes(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> str:
    radius = "head.mass.linear.weight"
    if radius in here and radius in there and here[radius].shape[0] == there[radius].shape[0]:
        frames = (there[radius].shape[1], here[radius].shape[1])
        if frames[0] != frames[1]:
            return f"model.num_frames is {frames[0]} there and {frames[1]} here"
    differing = differences(here, there)
    return f"{len(differing)} weights differ: {differing[0]}" if differing else ""
