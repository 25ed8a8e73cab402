"""Convert checkpoints of the authors' code.

``python -m tmass_dist.convert model_best.pth OUT`` writes a whole export, with its settings, to evaluate or search.
``model_best.pth best.safetensors`` writes the weights only. ``--back best.safetensors model.pth`` converts back.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tmass_dist.cli import program, replacing, run_command, writable_dir
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
    if unknown or not ours:
        raise UserError(
            f"this is not a checkpoint of the authors' code: {len(unknown)} unknown names ({', '.join(unknown[:3])})"
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


def check_weights(ours: dict[str, Tensor], source: str) -> None:
    """Check that ``ours`` are all weights of OpenAI's CLIP and of the T-MASS head, of shapes that fit together.

    Raises:
        UserError: weights that are missing, too many, of a wrong shape or not finite; the message names ``source``.
    """
    from tmass_dist.models.loading import check_finite

    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    expected = _expected_shapes(shapes, source)
    problems = [f"lacks {name}" for name in expected if name not in shapes]
    problems += [f"has {name} too" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shapes[name]} and not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        raise UserError(
            f"{source} is not a whole model with OpenAI's CLIP and the T-MASS head, in {len(problems)} weights: "
            f"{'; '.join(problems[:3])}"
        )
    check_finite(ours, source)


_SIZES = {
    "towers.clip.token_embedding.weight": 2,
    "towers.clip.positional_embedding": 2,
    "towers.clip.text_projection": 2,
    "towers.clip.visual.conv1.weight": 4,
    "towers.clip.visual.positional_embedding": 2,
    "head.mass.linear.weight": 2,
}
"""Weights, with their number of dimensions, whose shapes determine those of all others."""


def _expected_shapes(shapes: dict[str, tuple[int, ...]], source: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole model, of the sizes that some of its weights have."""
    for name, dimensions in _SIZES.items():
        if len(shapes.get(name, ())) != dimensions:
            raise UserError(
                f"{source} is not a whole model with OpenAI's CLIP and the T-MASS head: it lacks {name}, or its shape "
                f"{shapes.get(name)} has not {dimensions} dimensions"
            )
    vocabulary, text_width = shapes["towers.clip.token_embedding.weight"]
    embed_dim = shapes["towers.clip.text_projection"][1]
    image_width, _, patch, _ = shapes["towers.clip.visual.conv1.weight"]
    expected: dict[str, tuple[int, ...]] = {
        "towers.clip.logit_scale": (1,),
        "towers.clip.token_embedding.weight": (vocabulary, text_width),
        "towers.clip.positional_embedding": (shapes["towers.clip.positional_embedding"][0], text_width),
        "towers.clip.text_projection": (text_width, embed_dim),
        "towers.clip.visual.class_embedding": (image_width,),
        "towers.clip.visual.conv1.weight": (image_width, 3, patch, patch),
        "towers.clip.visual.positional_embedding": (
            shapes["towers.clip.visual.positional_embedding"][0],
            image_width,
        ),
        "towers.clip.visual.proj": (image_width, embed_dim),
        "head.mass.linear.weight": (embed_dim, shapes["head.mass.linear.weight"][1]),
        "head.mass.linear.bias": (embed_dim,),
    }
    norms = [("towers.clip.ln_final", text_width)]
    norms += [(f"towers.clip.visual.{name}", image_width) for name in ("ln_pre", "ln_post")]
    linears = []
    for module in HEAD_NAMES.values():
        name = f"head.pooling.{module}"
        if module.startswith("norm"):
            norms.append((name, embed_dim))
        else:
            linears.append((name, embed_dim, embed_dim))
    for tower, width in (("transformer", text_width), ("visual.transformer", image_width)):
        prefix = f"towers.clip.{tower}.resblocks."
        numbers = [int(n) for name in shapes if (n := name.removeprefix(prefix).partition(".")[0]).isdigit()]
        for block in range(max(numbers, default=0) + 1):
            name = f"{prefix}{block}"
            expected |= {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
            hidden = (shapes.get(f"{name}.mlp.c_fc.bias") or (0,))[0]
            linears += [(f"{name}.attn.out_proj", width, width)]
            linears += [(f"{name}.mlp.c_fc", hidden, width), (f"{name}.mlp.c_proj", width, hidden)]
            norms += [(f"{name}.{norm}", width) for norm in ("ln_1", "ln_2")]
    for name, width in norms:
        expected |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, rows, columns in linears:
        expected |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return expected


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
    check_weights(weights, str(source))
    if target.suffix == ".safetensors":
        if page or overrides:
            raise UserError("settings belong to an export; name a directory and not a .safetensors file")
        with replacing(target) as temporary:
            save_file(weights, temporary)
        return
    from tmass_dist.models.loading import settings_of
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

        from tmass_dist.models.loading import read_weights

        if arguments.config or arguments.overrides:
            raise UserError("--back takes no settings")
        source = arguments.source / "model.safetensors" if arguments.source.is_dir() else arguments.source
        weights = read_weights(source)
        check_weights(weights, str(source))
        theirs = to_authors(weights)
        with replacing(arguments.target) as temporary:
            torch.save({"state_dict": theirs}, temporary)
    print(f"{arguments.target} is written")


if __name__ == "__main__":
    run_command(main)
