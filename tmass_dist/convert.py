"""Convert checkpoints of the authors' code.

``python -m tmass_dist.convert model_best.pth OUT`` writes a whole export, with its settings, to evaluate or search.
``model_best.pth best.safetensors`` writes the weights only. ``--back best.safetensors model.pth`` converts back.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tmass_dist.cli import program, run_command, writable_dir
from tmass_dist.config import load_config, make_config
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
    """Convert their ``state_dict`` (Hugging Face CLIP names below ``clip.``) to ours.

    Raises:
        UserError: a name that their model does not have, or parts that are missing.
    """
    import torch

    ours: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, value in theirs.items():
        if name == _DEAD or name.endswith("embeddings.position_ids"):
            continue  # their model never uses the first; the second is a constant
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
            f"this is not a checkpoint of the authors' code: {len(unknown)} unknown names ({', '.join(unknown[:3])}), "
            f"nothing for {', '.join(missing) or 'nothing'}"
        )
    return {name: value.detach().float().contiguous() for name, value in ours.items()}


def to_authors(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert our ``state_dict`` to theirs, with the parameter that their model has and never uses."""
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
                raise UserError(
                    f"{name} does not exist in the authors' model, which has OpenAI's CLIP and the T-MASS head only"
                )
            value = value.T if short in _TRANSPOSED else value.reshape(()) if short == "logit_scale" else value
            theirs[f"clip.{other[short]}"] = value
    return {name: value.contiguous() for name, value in theirs.items()}


def _any(names: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def read_authors(path: Path) -> dict[str, Tensor]:
    """Read the weights of a ``.pth`` of the authors' code; only tensors and plain values are unpickled.

    Raises:
        UserError: the file is damaged, has other objects, or no weights.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("state_dict", content)
        return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as error:
        raise UserError(f"{path} is damaged, or not a file of weights: {str(error).splitlines()[0]}") from error


def convert(source: Path, target: Path, page: str | None, overrides: list[str]) -> None:
    """Convert the authors' checkpoint ``source``.

    Args:
        source: a ``.pth`` of the authors' code.
        target: weights alone if it ends in ``.safetensors``, otherwise a directory for a whole export.
        page: config file of the training run; None: the architecture and the frames are those of the weights.
        overrides: further settings of the run, as ``stochastic.prior=normal``.

    Raises:
        UserError: the checkpoint is damaged, of another kind, or does not fit the settings.
    """
    from safetensors.torch import save_file

    weights = from_authors(read_authors(source))
    if target.suffix == ".safetensors":
        if page or overrides:
            raise UserError("settings belong to an export; name a directory and not a .safetensors file")
        temporary = target.with_name(target.name + ".tmp")
        save_file(weights, temporary)
        temporary.replace(target)
        return
    from tmass_dist.models.backbone import settings_of
    from tmass_dist.retrieval.model import TMass

    if page:
        config = load_config(page, overrides)
    else:
        # Where the weights fit two settings, the first is the authors' default.
        inferred = [setting.split(" or ")[0] for setting in settings_of(weights)]
        config = make_config({}, [*inferred, *overrides])
    trained = {"data": "the data of the authors' checkpoint", "results": f"Converted from `{source.name}`."}
    TMass.of_weights(config, weights, str(source), trained).save_pretrained(writable_dir(target))


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.convert"), description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a directory for a whole export, or a .safetensors file")
    parser.add_argument("--back", action="store_true", help="from ours (.safetensors, or an export) to theirs (.pth)")
    parser.add_argument("--config", help="config file of the training run; default: what the weights tell")
    parser.add_argument("overrides", nargs="*", help="further settings of the run, as stochastic.prior=normal")
    arguments = parser.parse_intermixed_args()
    if not arguments.back:
        convert(arguments.source, arguments.target, arguments.config, arguments.overrides)
    else:
        import torch
        from safetensors.torch import load_file

        if arguments.config or arguments.overrides:
            raise UserError("--back takes no settings")
        source = arguments.source / "model.safetensors" if arguments.source.is_dir() else arguments.source
        if not source.is_file():
            raise UserError(f"no file {source}")
        temporary = arguments.target.with_name(arguments.target.name + ".tmp")
        torch.save({"state_dict": to_authors(load_file(source))}, temporary)
        temporary.replace(arguments.target)
    print(f"{arguments.target} is written")


if __name__ == "__main__":
    run_command(main)
