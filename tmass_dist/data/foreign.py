"""Samples of WebDataset tar files that other programs wrote: clips or numbered frames, with captions.

A sample is a clip (``KEY.mp4``, ``.webm``, ...) or numbered frames (``KEY.000.jpg``, ...), with its captions in
``KEY.txt`` (one caption) or under keys of ``KEY.json`` (a text or a list of texts).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tmass_dist.cli import is_utf8
from tmass_dist.data.tars import any_members, split_name
from tmass_dist.errors import UserError

TEXT = "txt"
"""The caption key that means the member ``KEY.txt``; others are keys of ``KEY.json``."""
CLIP_SUFFIXES = frozenset({"mp4", "webm", "mkv", "avi", "mov", "mpg", "mpeg", "m4v", "flv", "wmv", "ts"})
_FRAME = re.compile(r"(\d+)\.jpe?g")


def kind_of(suffixes: Iterable[str]) -> Literal["clip", "jpeg"] | None:
    """What a sample with these members stores, or None if it has neither a clip nor numbered frames."""
    suffixes = list(suffixes)
    if any(suffix in CLIP_SUFFIXES for suffix in suffixes):
        return "clip"
    return "jpeg" if any(map(_FRAME.fullmatch, suffixes)) else None


def captions_of(members: Mapping[str, bytes], caption_keys: Sequence[str]) -> list[str]:
    """The captions of a sample, in the order of ``caption_keys``; blank ones and missing keys are left out.

    Raises:
        ValueError: a member or a caption is not UTF-8, or a member is not a JSON object.
    """
    texts: list[Any] = []
    fields = _fields(members) if any(key != TEXT for key in caption_keys) else {}
    for key in caption_keys:
        if key == TEXT:
            texts.append(members.get(TEXT, b"").decode("utf-8-sig"))
        else:
            value = fields.get(key)
            texts += value if isinstance(value, list) else [value]
    captions = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    if wrong := [caption for caption in captions if not is_utf8(caption)]:
        raise UserError(f"its caption {wrong[0]!r} is not UTF-8")
    return captions


def _fields(members: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        fields = json.loads(members["json"].decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"its JSON is not valid: {error}") from error
    if not isinstance(fields, dict):
        raise UserError("its JSON is not an object")
    return fields


def members_of(raw: bytes, sample_id: str) -> dict[str, bytes]:
    """The members of a sample by suffix.

    Args:
        raw: the bytes of its members in the tar file.
        sample_id: the key of its members, or something before it and a slash.

    Raises:
        ValueError: the bytes are not those of one sample.
    """
    members: dict[str, bytes] = {}
    for name, content in any_members(raw):
        key, suffix = split_name(name)
        if key and key != sample_id and not sample_id.endswith(f"/{key}"):
            raise UserError(f"it has the member {name!r}")
        if key:
            members[suffix] = content
    return members


def read_foreign_sample(raw: bytes, sample_id: str, caption_keys: Sequence[str]) -> tuple[dict[str, Any], list[bytes]]:
    """Id, captions and source of a sample, and its frames in the order of their numbers, or its clip as only item.

    Args:
        raw, sample_id: as for :func:`members_of`.
        caption_keys: where its captions are.

    Raises:
        ValueError: the bytes are not those of one sample, or hold no video.
    """
    members = members_of(raw, sample_id)
    meta = {"id": sample_id, "captions": captions_of(members, caption_keys)}
    clip = next((suffix for suffix in members if suffix in CLIP_SUFFIXES), None)
    if clip is not None:
        return meta | {"source": f"{sample_id}.{clip}"}, [members[clip]]
    frames = sorted((int(match[1]), suffix) for suffix in members if (match := _FRAME.fullmatch(suffix)))
    if not frames:
        raise UserError("it has no clip and no numbered frames")
    return meta | {"source": f"{sample_id}.{frames[0][1]}"}, [members[suffix] for _, suffix in frames]
