"""The authors' checkpoints into ours and back.

``python -m tmass_dist.convert model_best.pth best.safetensors`` (or ``--back best.safetensors model.pth``); then
``python -m tmass_dist.evaluate --run RUN --checkpoint best.safetensors``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tmass_dist.cli import program, run_command
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

HEAD_NAMES = {
    "cross_attn.q_proj": "query",
    "cross_attn.k_proj": "key",
    "cross_attn.v_proj": "value",
    "cross_attn.out_proj": "out",
    "linear_proj": "linear",
    "layer_norm1": "norm_in",
    "layer_norm2": "norm_attended",
    "layer_norm3": "norm_out",
}
"""Modules of the authors' pooling, ``pool_frames.*``, and ours, ``head.pooling.*``."""

_RADIUS = "stochastic.std_branch.linear_proj."
_DEAD = "stochastic.std_branch.learnable_scalar"
_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}
_BLOCK_NAMES = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OTHER_NAMES = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
}
_TRANSPOSED = {"text_projection", "visual.proj"}


def from_authors(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our ``state_dict`` of theirs (Hugging Face CLIP names below ``clip.``).

    Raises:
        UserError: names that belong to no part of their model, or parts that are missing.
    """
    import torch

    ours: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, value in theirs.items():
        if name == _DEAD or name.endswith("embeddings.position_ids"):
            continue  # the one is never used by their model, the other is a count
        part = re.fullmatch(r"clip\.(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name.startswith("pool_frames."):
            module, leaf = name.removeprefix("pool_frames.").rsplit(".", 1)
            target = f"head.pooling.{HEAD_NAMES[module]}.{leaf}" if module in HEAD_NAMES else None
        elif name.startswith(_RADIUS):
            target = f"head.mass.linear.{name.removeprefix(_RADIUS)}"
        elif part:
            tower, number, module, leaf = part.groups()
            block = f"towers.clip.{_TOWERS[tower]}.resblocks.{number}."
            if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                heads.setdefault(f"{block}attn.in_proj_{leaf}", {})[module[10]] = value
                continue
            target = f"{block}{_BLOCK_NAMES[module]}.{leaf}" if module in _BLOCK_NAMES else None
        else:
            short = _OTHER_NAMES.get(name.removeprefix("clip."))
            target = f"towers.clip.{short}" if short and name.startswith("clip.") else None
            value = value.T if short in _TRANSPOSED else value.reshape(1) if short == "logit_scale" else value
        if target is None:
            unknown.append(name)
        else:
            ours[target] = value
    for target, parts in heads.items():
        if set(parts) != set("qkv"):
            raise UserError(f"the checkpoint lacks a part of {target}: it has {', '.join(sorted(parts))} of q, k, v")
        ours[target] = torch.cat([parts[letter] for letter in "qkv"])
    missing = [
        part for part in ("towers.clip.visual.", "towers.clip.transformer.", "head.pooling.") if not _any(ours, part)
    ]
    if unknown or missing:
        raise UserError(
            f"this is no checkpoint of the authors' code: {len(unknown)} unknown names ({', '.join(unknown[:3])}), "
            f"nothing for {', '.join(missing) or 'nothing'}"
        )
    return {name: value.detach().float().contiguous() for name, value in ours.items()}


def to_authors(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their ``state_dict`` of ours, with the parameter that their model holds and never uses."""
    import torch

    head = {mine: name for name, mine in HEAD_NAMES.items()}
    blocks = {mine: name for name, mine in _BLOCK_NAMES.items()}
    other = {mine: name for name, mine in _OTHER_NAMES.items()}
    theirs: dict[str, Tensor] = {_DEAD: torch.ones(1)}
    for name, value in ours.items():
        part = re.fullmatch(r"towers\.clip\.(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if name.startswith("head.pooling."):
            module, leaf = name.removeprefix("head.pooling.").rsplit(".", 1)
            theirs[f"pool_frames.{head[module]}.{leaf}"] = value
        elif name.startswith("head.mass.linear."):
            theirs[_RADIUS + name.removeprefix("head.mass.linear.")] = value
        elif part:
            visual, number, module, leaf = part.groups()
            layer = f"clip.{'vision' if visual else 'text'}_model.encoder.layers.{number}."
            if module == "attn.in_proj":
                for letter, third in zip("qkv", value.chunk(3)):
                    theirs[f"{layer}self_attn.{letter}_proj.{leaf}"] = third
            else:
                theirs[f"{layer}{blocks[module]}.{leaf}"] = value
        else:
            short = name.removeprefix("towers.clip.")
            if short not in other:
                raise UserError(f"{name} has no place in the authors' model; only OpenAI's CLIP and T-MASS's head have")
            value = value.T if short in _TRANSPOSED else value.reshape(()) if short == "logit_scale" else value
            theirs[f"clip.{other[short]}"] = value
    return {name: value.contiguous() for name, value in theirs.items()}


def _any(names: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def read_authors(path: Path) -> dict[str, Tensor]:
    """The weights of a ``.pth`` of the authors' code, without unpickling anything but tensors and plain values.

    Raises:
        UserError: the file is torn, holds what is refused, or no weights.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("state_dict", content)
        return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as error:
        raise UserError(f"{path} is torn, or not a file of weights: {str(error).splitlines()[0]}") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.convert"), description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--back", action="store_true", help="from ours (.safetensors) to theirs (.pth)")
    arguments = parser.parse_args()
    import torch
    from safetensors.torch import load_file, save_file

    aside = arguments.target.with_name(arguments.target.name + ".tmp")
    if arguments.back:
        if not arguments.source.is_file():
            raise UserError(f"no file {arguments.source}")
        torch.save({"state_dict": to_authors(load_file(arguments.source))}, aside)
    else:
        save_file(from_authors(read_authors(arguments.source)), aside)
    aside.replace(arguments.target)
    print(f"{arguments.target} is written")


if __name__ == "__main__":
    run_command(main)
