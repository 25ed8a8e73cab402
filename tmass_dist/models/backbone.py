"""The only module that calls open_clip: the text tower, the frame tower and their tokenizer."""

# Shapes: B videos (or texts), F frames, H W pixels, C colours, L tokens, D embedding width.

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmass_dist.config import CONFIG_DIR
from tmass_dist.errors import UserError

_kept_libraries: list[Any] = []


def usable_torchvision() -> None:
    """Let torchvision be imported with a CPU build of torch; call it before anything that imports torchvision."""
    if torch.version.cuda is None and not _kept_libraries:
        # torchvision from PyPI contains CUDA operators, which a CPU build of torch does not load, and fails.
        # Declaring the two operators that it looks up is enough. The Library object must be kept.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_libraries.append(library)


def _open_clip() -> Any:
    usable_torchvision()
    import open_clip

    return open_clip


def find_file(path: str) -> Path:
    """The file of this path, else the one of this name in ``configs/``."""
    for candidate in (Path(path), CONFIG_DIR / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"no file {path}, neither here nor in configs/")


def read_description(architecture: str | dict[str, Any]) -> dict[str, Any]:
    """The description of towers as a dictionary.

    Raises:
        UserError: no such file, or it is not JSON.
    """
    if isinstance(architecture, dict):
        return architecture
    path = find_file(architecture)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a tower description: {error}") from error


class Towers(nn.Module):
    """The two towers of a CLIP; embeddings are raw, not normalised."""

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, clip: Any, embed_dim: int, context_length: int, normalisation: dict[str, Any]) -> None:
        super().__init__()
        self.clip = clip
        size = clip.visual.image_size
        self.image_size: int = size[0] if isinstance(size, tuple | list) else size
        self.context_length = context_length
        self.embed_dim = embed_dim
        if getattr(clip, "logit_bias", None) is not None:
            clip.logit_bias.requires_grad_(False)  # a parameter of SigLIP's loss; InfoNCE does not use it
        # The normalisation of the pretraining; CLIP's (Radford et al., 2021) if the weights state none.
        mean = normalisation.get("mean") or (0.48145466, 0.4578275, 0.40821073)
        std = normalisation.get("std") or (0.26862954, 0.26130258, 0.27577711)
        self.register_buffer("mean_C", torch.tensor(mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(std), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        """Log of the temperature, shape [1] (DeepSpeed refuses 0-dim parameters)."""
        return self.clip.logit_scale

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """``text_BD`` of token ids, which may be trimmed to the longest text of the batch: the result is the same."""
        length = tokens_BL.shape[1]
        if length == self.context_length:
            return self.clip.encode_text(tokens_BL)
        # open_clip's CLIP accepts full contexts only. In a causal tower no token attends to those after the end token.
        clip = self.clip
        cast = clip.transformer.get_cast_dtype()
        x_BLW = clip.token_embedding(tokens_BL).to(cast) + clip.positional_embedding[:length].to(cast)
        x_BLW = clip.ln_final(clip.transformer(x_BLW, attn_mask=clip.attn_mask[:length, :length]))
        rows_B = torch.arange(len(tokens_BL), device=tokens_BL.device)
        return x_BLW[rows_B, tokens_BL.argmax(dim=-1)] @ clip.text_projection

    def encode_frames(self, pixels_BFHWC: Tensor) -> Tensor:
        """``frames_BFD`` of uint8 frames. They are normalised here, so that bytes are copied to the device."""
        num_videos, num_frames = pixels_BFHWC.shape[:2]
        pixels = (pixels_BFHWC.flatten(0, 1).to(self.clip.logit_scale.dtype) / 255 - self.mean_C) / self.std_C
        return self.clip.encode_image(pixels.permute(0, 3, 1, 2)).unflatten(0, (num_videos, num_frames))


def build_towers(
    architecture: str | dict[str, Any], pretrained: str | None, *, without_weights: bool = False
) -> Towers:
    """Towers of an architecture of open_clip, or of a description in a JSON file.

    Args:
        architecture: ``ViT-B-32-quickgelu``, a JSON file (a path, or one of ``configs/``), or its content.
        pretrained: None, an open_clip tag such as ``openai``, or a weights file (.safetensors, .pt).
        without_weights: build what ``pretrained`` names (its normalisation of pixels) with random weights, for a
            checkpoint to fill: nothing is read or downloaded.

    Raises:
        UserError: an unknown architecture (the message lists similar names), or a file that is missing, damaged or of
            other shapes.
    """
    open_clip, normalisation = _open_clip(), {}
    if isinstance(architecture, dict) or architecture.endswith(".json"):
        description = read_description(architecture)
        clip = open_clip.CLIP(
            embed_dim=description["embed_dim"],
            vision_cfg=description["vision_cfg"],
            text_cfg=description["text_cfg"],
            quick_gelu=description.get("quick_gelu", False),
            nonscalar_logit_scale=True,
        )
        embed_dim, context_length = description["embed_dim"], description["text_cfg"]["context_length"]
    else:
        if architecture not in open_clip.list_models():
            near = difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.3)
            raise UserError(f"open_clip knows no architecture {architecture!r}; the nearest are {', '.join(near)}")
        tag = pretrained if pretrained and not pretrained.endswith((".safetensors", ".pt")) else None
        known = open_clip.list_pretrained_tags_by_model(architecture)
        if known:
            normalisation = open_clip.get_pretrained_cfg(architecture, tag if tag in known else known[0]) or {}
        if tag and tag not in known:
            raise UserError(f"open_clip has no weights {tag!r} of {architecture}; it has {', '.join(known) or 'none'}")
        try:
            clip = open_clip.create_model(architecture, pretrained=None if without_weights else tag)
        except Exception as error:
            if tag is None:
                raise
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"the weights {tag} of {architecture} are not available: {line}; set model.pretrained to a local file"
            ) from error
        # Published scalars have no dimension; DeepSpeed requires one.
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))
        embed_dim, context_length = open_clip.get_model_config(architecture)["embed_dim"], clip.context_length
        if getattr(clip, "logit_bias", None) is not None:
            clip.logit_bias = nn.Parameter(clip.logit_bias.detach().reshape(1))
        pretrained = None if tag else pretrained
    towers = Towers(clip, embed_dim, context_length, normalisation)
    if pretrained and not without_weights:
        _load(towers.clip, find_file(pretrained))
    return towers


def pretrained_normalisation(architecture: str, pretrained: str) -> dict[str, Any] | None:
    """Mean and standard deviation of the pixels of open_clip's weights; None where it does not say."""
    found = _open_clip().get_pretrained_cfg(architecture, pretrained) or {}
    return {"mean": list(found["mean"]), "std": list(found["std"])} if "mean" in found and "std" in found else None


def save_open_clip(towers: Towers, architecture: str | dict[str, Any], directory: Path) -> None:
    """Write towers as open_clip does: ``create_model_and_transforms("local-dir:DIRECTORY")`` loads them.

    Args:
        towers: the towers.
        architecture: open_clip's name of them, or their description.
        directory: it is created.
    """
    from safetensors.torch import save_file

    if isinstance(architecture, dict):
        names = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
        model_cfg = {name: architecture[name] for name in names if name in architecture}
    else:
        model_cfg = _open_clip().get_model_config(architecture)
    preprocess_cfg = {"mean": towers.mean_C.tolist(), "std": towers.std_C.tolist(), "interpolation": "bicubic"}
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in towers.clip.state_dict().items()}
    for name in ("logit_scale", "logit_bias"):
        if name in weights:
            weights[name] = weights[name].reshape(())  # ours have shape [1]
    save_file(weights, directory / "open_clip_model.safetensors")
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (directory / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _load(clip: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = _tensors(path)
        weights = {name: tensor.float() for name, tensor in weights.items()}
    except Exception as error:
        raise UserError(f"{path} is damaged, or not a file of weights: {str(error).splitlines()[0]}") from error
    for name in ("logit_scale", "logit_bias"):
        if name in weights:
            weights[name] = weights[name].reshape(1)
    load_weights(clip, weights, str(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    """Weights of a ``.pt``: a ``state_dict``, or the TorchScript archive in which OpenAI published CLIP."""
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


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """``load_state_dict`` with an error that lists the differences and the settings that fit the weights.

    Raises:
        UserError: names or shapes differ, or numbers are not finite.
    """
    own = module.state_dict()
    differing = [
        *(f"lacks {name}" for name in own if name not in weights),
        *(f"has an additional {name}" for name in weights if name not in own),
        *(
            f"{name} is {tuple(weights[name].shape)} and not {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ),
    ]
    if differing:
        settings = settings_of(weights)
        raise UserError(
            f"{source} is of another architecture; {len(differing)} weights differ: {'; '.join(differing[:3])}"
            + (f". Settings that fit it: {', '.join(settings)}" if settings else "")
        )
    check_finite({name: value for name, value in weights.items() if own[name].is_floating_point()}, source)
    module.load_state_dict(weights)


def settings_of(weights: dict[str, Tensor]) -> list[str]:
    """The settings that fit these weights, as far as their names and shapes show."""
    shapes = {name.removeprefix("towers.clip."): tuple(value.shape) for name, value in weights.items()}
    found = []
    if "visual.conv1.weight" in shapes and "text_projection" in shapes:
        width, patch = shapes["visual.conv1.weight"][0], shapes["visual.conv1.weight"][-1]
        embed_dim = shapes["text_projection"][1]
        for name in ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"):
            config = _open_clip().get_model_config(name)
            vision = config["vision_cfg"]
            if (vision["width"], vision["patch_size"], config["embed_dim"]) == (width, patch, embed_dim):
                found.append(f"model.architecture={name}")
    if any(name.startswith("head.") for name in shapes):
        found.append(f"model.pooling={'xpool' if 'head.pooling.query.weight' in shapes else 'mean'}")
        radius = shapes.get("head.mass.linear.weight")
        if "head.mass.scale" in shapes:
            found.append("model.radius=scaled_exp_mean")
        elif radius is None:
            found.append("model.radius=none or exp_mean")
        elif radius[0] == radius[1]:
            found.append("model.radius=variational")
        else:
            found += ["model.radius=exp_linear or linear", f"model.num_frames={radius[1]}"]
    return found


class WordTokenizer:
    """A tokenizer with a small vocabulary of words; the end token has the highest id, at which CLIP pools."""

    def __init__(self, vocabulary: list[str], context_length: int) -> None:
        self.ids = {word: number + 2 for number, word in enumerate(vocabulary)}  # 0 pads, 1 is an unknown word
        self.end, self.context_length = len(vocabulary) + 2, context_length

    def __call__(self, texts: list[str]) -> Tensor:
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids = [self.ids.get(word, 1) for word in re.findall(r"[a-z0-9]+", text.lower())]
            ids = [*ids[: self.context_length - 1], self.end]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens


class Trimmed:
    """A tokenizer that trims its result to the longest text of the call; the end token has the highest id."""

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self.tokenize = tokenize

    def __call__(self, texts: list[str]) -> Tensor:
        tokens = self.tokenize(texts)
        return tokens[:, : int(tokens.argmax(dim=1).max()) + 1].contiguous() if len(texts) else tokens


def _is_plain_clip(config: dict[str, Any]) -> bool:
    """Whether open_clip builds a ``CLIP`` with a causal text tower that pools at the end token, like OpenAI's."""
    text = config["text_cfg"]
    plain = text.get("pool_type", "argmax") == "argmax" and not text.get("proj_bias")
    return plain and not config.get("custom_text") and not {"hf_model_name", "no_causal_mask"} & set(text)


def build_tokenizer(architecture: str | dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """Texts to token ids ``(len(texts), L)``, for the towers of the same name.

    ``L`` is the longest text's length where the tower is causal and pools at the end token, else the context length.
    """
    if isinstance(architecture, dict) or architecture.endswith(".json"):
        description = read_description(architecture)
        return Trimmed(WordTokenizer(description["vocabulary"], description["text_cfg"]["context_length"]))
    try:
        tokenize = _open_clip().get_tokenizer(architecture)
        return Trimmed(tokenize) if _is_plain_clip(_open_clip().get_model_config(architecture)) else tokenize
    except ModuleNotFoundError as error:
        raise UserError(f"the tokenizer of {architecture} needs {error.name}: pip install -e '.[towers]'") from error
