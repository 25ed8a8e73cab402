"""The text tower, the frame tower and their tokenizer, built by open_clip."""

# Shapes: B videos (or texts), F frames, H W pixels, C colours, L tokens, D embedding width.

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmass_dist.errors import UserError
from tmass_dist.models import library
from tmass_dist.models.loading import load_weights, read_weights
from tmass_dist.models.pretrained import (
    check_architecture,
    check_tag,
    find_file,
    is_file,
    locate,
    pretrained_cfg,
)


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
        self.by_token = False
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

    def keep_tokens(self) -> None:
        """From now on a text is the embeddings of all its tokens; see :meth:`encode_text`.

        Raises:
            UserError: the text tower is not one of open_clip's ``CLIP``, with an end token.
        """
        clip = self.clip
        plain = isinstance(clip, library.open_clip().CLIP) and clip.text_pool_type == "argmax"
        if not plain or not isinstance(clip.text_projection, nn.Parameter):
            raise UserError("late interaction needs a text tower like CLIP's, which ends texts with a token")
        self.by_token = True

    @property
    def text_width(self) -> int:
        """Numbers of an encoded text."""
        return self.embed_dim * (self.context_length if self.by_token else 1)

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """``text_BD`` of token ids, which may be trimmed to the longest text of the batch: the result is the same.

        After :meth:`keep_tokens` a row holds as many vectors of width D as the context has tokens, one after the other:
        that of the end token, which is the embedding of the text, then those of the tokens before it, then zeros.
        """
        if self.by_token:
            return self._encode_tokens(tokens_BL)
        length = tokens_BL.shape[1]
        if length == self.context_length:
            return self.clip.encode_text(tokens_BL)
        rows_B = torch.arange(len(tokens_BL), device=tokens_BL.device)
        return self._token_features(tokens_BL)[rows_B, tokens_BL.argmax(dim=-1)] @ self.clip.text_projection

    def _token_features(self, tokens_BL: Tensor) -> Tensor:
        """The text tower's output at each token."""
        # open_clip's CLIP accepts full contexts only. In a causal tower no token attends to those after the end token.
        clip, length = self.clip, tokens_BL.shape[1]
        cast = clip.transformer.get_cast_dtype()
        x_BLW = clip.token_embedding(tokens_BL).to(cast) + clip.positional_embedding[:length].to(cast)
        return clip.ln_final(clip.transformer(x_BLW, attn_mask=clip.attn_mask[:length, :length]))

    def _encode_tokens(self, tokens_BL: Tensor) -> Tensor:
        vectors_BLD = self._token_features(tokens_BL) @ self.clip.text_projection
        place_L, end_B1 = torch.arange(tokens_BL.shape[1], device=tokens_BL.device), tokens_BL.argmax(dim=-1)[:, None]
        token_BL = torch.where(place_L == 0, end_B1, place_L - 1)
        rows_BLD = vectors_BLD.gather(1, token_BL[..., None].expand_as(vectors_BLD)) * (place_L <= end_B1)[..., None]
        return nn.functional.pad(rows_BLD, (0, 0, 0, self.context_length - tokens_BL.shape[1])).flatten(1)

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
    normalisation: dict[str, Any] = {}
    if isinstance(architecture, dict) or architecture.endswith(".json"):
        description = read_description(architecture)
        clip = library.open_clip().CLIP(
            embed_dim=description["embed_dim"],
            vision_cfg=description["vision_cfg"],
            text_cfg=description["text_cfg"],
            quick_gelu=description.get("quick_gelu", False),
            nonscalar_logit_scale=True,
        )
        embed_dim, context_length = description["embed_dim"], description["text_cfg"]["context_length"]
    else:
        check_architecture(architecture)
        tag = None if pretrained is None or is_file(pretrained) else pretrained
        if tag:
            check_tag(architecture, tag)
        normalisation = pretrained_cfg(architecture, pretrained)
        # A path, so that open_clip asks no server for what is here already.
        path = str(locate(architecture, tag)) if tag and not without_weights else None
        clip = library.open_clip().create_model(architecture, pretrained=path)
        # Published scalars have no dimension; DeepSpeed requires one.
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))
        embed_dim, context_length = library.open_clip().get_model_config(architecture)["embed_dim"], clip.context_length
        if getattr(clip, "logit_bias", None) is not None:
            clip.logit_bias = nn.Parameter(clip.logit_bias.detach().reshape(1))
        pretrained = None if tag else pretrained
    towers = Towers(clip, embed_dim, context_length, normalisation)
    if pretrained and not without_weights:
        _load(towers.clip, find_file(pretrained))
    return towers


def pretrained_normalisation(architecture: str, pretrained: str | None) -> dict[str, Any] | None:
    """Mean and standard deviation of the pixels of open_clip's weights; None where it does not say."""
    known = pretrained_cfg(architecture, pretrained)
    return {"mean": list(known["mean"]), "std": list(known["std"])} if "mean" in known and "std" in known else None


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
        model_cfg = library.open_clip().get_model_config(architecture)
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
    weights = {name: tensor.float() for name, tensor in read_weights(path).items()}
    for name in ("logit_scale", "logit_bias"):
        if name in weights:
            weights[name] = weights[name].reshape(1)
    load_weights(clip, weights, str(path))


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
        tokenize = library.open_clip().get_tokenizer(architecture)
        return Trimmed(tokenize) if _is_plain_clip(library.open_clip().get_model_config(architecture)) else tokenize
    except ModuleNotFoundError as error:
        raise UserError(f"the tokenizer of {architecture} needs {error.name}: pip install -e '.[towers]'") from error
