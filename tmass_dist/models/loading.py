"""Files of weights: reading them, and loading them into a model with errors that say what differs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tmass_dist.errors import UserError
from tmass_dist.models import library

if TYPE_CHECKING:
    from torch import Tensor, nn


def weight_names(path: Path) -> list[str]:
    """Names of the tensors of a .safetensors file, from its header alone and without torch.

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def is_whole_model(names: Iterable[str]) -> bool:
    """Whether weights of these names are those of towers and head, as a run or an export has them."""
    return any(name.startswith(("head.", "towers.")) for name in names)


def whole_model_error(source: str) -> UserError:
    """The error of a whole model where towers alone are expected."""
    return UserError(
        f"{source} holds a whole model (towers and head), and model.pretrained takes towers alone; start from a whole "
        "model with init_from=PATH, where PATH is a run, an export or this file"
    )


def _damaged(path: Path, error: Exception) -> UserError:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{path} is damaged, or not a file of weights: {line}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file (.safetensors, or .pt) by name; nothing but tensors is unpickled.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return _tensors(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as error:
        raise _damaged(path, error) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    """Weights of a ``.pt``: a ``state_dict``, or the TorchScript archive in which OpenAI published CLIP."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content.get("state_dict", content)
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
    weights = torch.jit.load(str(path), map_location="cpu").state_dict()
    # Three numbers of the archive describe the architecture and are not weights.
    return {k: v for k, v in weights.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def check_finite(weights: dict[str, Tensor], source: str) -> None:
    """Raise a UserError that names the weights of ``source`` that are not floating point, or not finite."""
    bad = [name for name, value in weights.items() if not (value.is_floating_point() and value.isfinite().all())]
    if bad:
        raise UserError(f"{source} is damaged: {len(bad)} weights are not finite numbers: {', '.join(bad[:3])}")


def differences(own: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """In words, each weight that is missing in ``weights``, additional there, or of another shape than in ``own``."""
    return [
        *(f"lacks {name}" for name in own if name not in weights),
        *(f"has an additional {name}" for name in weights if name not in own),
        *(
            f"{name} is {tuple(weights[name].shape)} and not {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ),
    ]


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """``load_state_dict`` with an error that lists the differences and the settings that fit the weights.

    Raises:
        UserError: names or shapes differ, or numbers are not finite.
    """
    own = module.state_dict()
    differing = differences(own, weights)
    if differing:
        settings = settings_of(weights)
        if is_whole_model(weights) and not is_whole_model(own):
            raise whole_model_error(source)
        raise UserError(
            f"{source} is of another architecture; {len(differing)} weights differ: {'; '.join(differing[:3])}"
            + (f". Settings that fit it: {', '.join(settings)}" if settings else "")
        )
    check_finite({name: value for name, value in weights.items() if own[name].is_floating_point()}, source)
    module.load_state_dict(weights)


def settings_of(weights: dict[str, Tensor]) -> list[str]:
    """The settings that fit these weights, as far as their names and shapes show."""
    shapes = {name.removeprefix("towers.clip."): tuple(value.shape) for name, value in weights.items()}
    settings = []
    if "visual.conv1.weight" in shapes and "text_projection" in shapes:
        width, patch = shapes["visual.conv1.weight"][0], shapes["visual.conv1.weight"][-1]
        embed_dim = shapes["text_projection"][1]
        for name in ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"):
            config = library.open_clip().get_model_config(name)
            vision = config["vision_cfg"]
            if (vision["width"], vision["patch_size"], config["embed_dim"]) == (width, patch, embed_dim):
                settings.append(f"model.architecture={name}")
    if any(name.startswith("head.") for name in shapes):
        pooling = "mean or best_frame"  # neither has weights
        if "head.pooling.log_relative_tau" in shapes:
            pooling = "query_scored"
        elif "head.pooling.token_weight.weight" in shapes:
            pooling = "weighted_interaction"
        elif "head.pooling.query.weight" in shapes:
            pooling = "xpool_best_frame" if "head.pooling.log_relative_weight" in shapes else "xpool"
        settings.append(f"model.pooling={pooling}")
        radius = shapes.get("head.mass.linear.weight")
        if "head.mass.scale" in shapes:
            settings.append("model.radius=scaled_exp_mean")
        elif radius is None:
            settings.append("model.radius=none or exp_mean")
        elif radius[0] == radius[1]:
            settings.append("model.radius=variational")
        else:
            settings += ["model.radius=exp_linear or linear", f"model.num_frames={radius[1]}"]
    return settings
