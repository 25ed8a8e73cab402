"""The feature store: texts and frames encoded once, in safetensors parts keyed by id, with an index that is checked."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmass_dist.data.remote import sha256_of
from tmass_dist.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Part:
    """What one rank encoded; row ``i`` of the tensors belongs to entry ``i`` of the lists."""

    video_ids: list[str]
    frames_VFD: Tensor
    caption_ids: list[tuple[str, int]]
    captions: list[str]
    text_TD: Tensor


@dataclass(frozen=True)
class Features:
    """A whole split: videos in the order asked for, the captions of each in the order of their slots."""

    video_ids: list[str]
    frames_VFD: Tensor
    caption_ids: list[tuple[str, int]]
    captions: list[str]
    text_TD: Tensor
    owner_T: Tensor
    """Number of each text's video; never falls."""


def merge(parts: Iterable[Part], video_ids: list[str]) -> Features:
    """Put the parts together in the order of ``video_ids``; a video that came twice counts once.

    Raises:
        UserError: videos that no part holds, videos without a caption, captions of unknown videos: counted and named.
    """
    frames: dict[str, Tensor] = {}
    texts: dict[str, dict[int, tuple[Tensor, str]]] = {}
    for part in parts:
        frames.update(zip(part.video_ids, part.frames_VFD))
        for (video_id, slot), text_D, caption in zip(part.caption_ids, part.text_TD, part.captions):
            texts.setdefault(video_id, {})[slot] = (text_D, caption)
    wanted = set(video_ids)
    for what, ids in (
        ("videos were encoded by no rank", [v for v in video_ids if v not in frames]),
        ("videos have no caption", [v for v in video_ids if v not in texts]),
        ("captioned videos are not in the gallery", [v for v in texts if v not in wanted]),
    ):
        if ids:
            raise UserError(f"{len(ids)} {what}: {', '.join(ids[:5])}")
    if not video_ids:
        raise UserError("the gallery is empty: there is no video to retrieve")
    rows = [(n, v, slot, *texts[v][slot]) for n, v in enumerate(video_ids) for slot in sorted(texts[v])]
    return Features(
        video_ids=list(video_ids),
        frames_VFD=torch.stack([frames[video_id] for video_id in video_ids]),
        caption_ids=[(video_id, slot) for _, video_id, slot, _, _ in rows],
        captions=[caption for *_, caption in rows],
        text_TD=torch.stack([text_D for *_, text_D, _ in rows]),
        owner_T=torch.tensor([number for number, *_ in rows]),
    )


def fingerprint(*parts: Any) -> str:
    """Of names, numbers and files' checksums: what features were made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save_part(directory: Path, number: int, part: Part) -> None:
    """Write one rank's part aside and rename it."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    ids = {"video_ids": part.video_ids, "caption_ids": part.caption_ids, "captions": part.captions}
    tensors = {"frames_VFD": part.frames_VFD.contiguous(), "text_TD": part.text_TD.contiguous()}
    aside = directory / f"part-{number:05d}.tmp"
    save_file(tensors, aside, metadata={"ids": json.dumps(ids)})
    aside.replace(directory / f"part-{number:05d}.safetensors")


def save_index(directory: Path, num_parts: int, video_ids: list[str], made_from: str, about: dict[str, Any]) -> None:
    """Write the index, last: a store without one is not believed.

    Args:
        directory: of the store.
        num_parts: parts that were written.
        video_ids: every video of the split, in order.
        made_from: fingerprint of the weights and the split.
        about: what else a reader needs: the config as YAML, the split's name, the checkpoint.
    """
    names = [f"part-{number:05d}.safetensors" for number in range(num_parts)]
    content = {
        "version": VERSION,
        "fingerprint": made_from,
        "video_ids": video_ids,
        "parts": {name: sha256_of(directory / name) for name in names},
        **about,
    }
    aside = directory / "index.json.tmp"
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(directory / "index.json")


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a store.

    Raises:
        UserError: there is none, it is damaged, or of a newer version.
    """
    path = directory / "index.json"
    if not path.is_file():
        raise UserError(
            f"no features in {directory}: index.json is missing; encode with --run RUN --features {directory}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] > VERSION:
            raise UserError(f"{path} was written by a newer version ({content['version']}); this one reads {VERSION}")
        return content | {"parts": dict(content["parts"]), "video_ids": list(content["video_ids"])}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); encode again") from error


def fingerprint_of(directory: Path) -> str | None:
    """What the store there was made from; None where there is none that can be read."""
    try:
        return read_index(directory)["fingerprint"]
    except (ValueError, KeyError):
        return None


def load_features(directory: Path) -> Features:
    """Read every part, check it, and put the split together.

    Raises:
        UserError: a part that is missing or damaged, ids that no part holds, features that are not numbers.
    """
    from safetensors import SafetensorError, safe_open

    index = read_index(directory)
    parts = []
    for name, checksum in index["parts"].items():
        path = directory / name
        if not path.is_file() or sha256_of(path) != checksum:
            state = "damaged" if path.is_file() else "missing"
            raise UserError(f"{path} is {state}; remove {directory / 'index.json'} and encode again")
        try:
            with safe_open(path, "pt") as file:
                ids = json.loads(file.metadata()["ids"])
                frames_VFD, text_TD = file.get_tensor("frames_VFD"), file.get_tensor("text_TD")
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is no part of a feature store: {error}") from error
        caption_ids = [(video_id, slot) for video_id, slot in ids["caption_ids"]]
        parts.append(Part(ids["video_ids"], frames_VFD, caption_ids, ids["captions"], text_TD))
    features = merge(parts, index["video_ids"])
    bad = torch.isnan(features.frames_VFD).flatten(1).any(dim=1).nonzero().flatten().tolist()
    ids = [features.video_ids[i] for i in bad]
    bad = torch.isnan(features.text_TD).any(dim=1).nonzero().flatten().tolist()
    ids += [f"{features.caption_ids[i][0]} caption {features.caption_ids[i][1]}" for i in bad]
    if ids:
        raise UserError(f"{len(ids)} features are not numbers: {', '.join(ids[:5])}")
    return features
