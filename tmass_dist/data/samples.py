"""Reading one sample: its bytes from a shard, checked, and its frames decoded."""

# Shapes: F frames, H W pixels, C colours.

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from tmass_dist.cli import is_utf8
from tmass_dist.data.foreign import read_foreign_sample
from tmass_dist.data.frames import random_frame_indices, uniform_frame_indices
from tmass_dist.data.index import Index, Sample
from tmass_dist.data.square import square_jpeg
from tmass_dist.data.tars import plain_members
from tmass_dist.errors import UserError


class DamagedError(UserError):
    """The bytes of a sample are not those that were packed. The message names the shard and the sample."""


def safe_key(video_id: str) -> str:
    """The WebDataset key of an id: letters, digits, ``_`` and ``-``, unique for each id.

    webdataset cuts a file name at its first dot, so a key holds no dot.
    """
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", video_id)[:64]
    return clean if clean == video_id else f"{clean}-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"


def read_sample(index: Index, number: int) -> tuple[dict[str, Any], list[bytes]]:
    """The JSON of a sample, and its JPEG frames in time order, or its clip as the only item.

    Raises:
        DamagedError: the shard is damaged at this sample.
        DownloadError: the shard could not be downloaded.
    """
    video_id = index.id_of(number)
    index, number = index.locate(number)
    sample = index.sample(number)
    path, raw = _read_bytes(index, sample)
    if index.is_remote and zlib.crc32(raw) != sample.crc32:  # is it the local copy that is damaged?
        path, raw = _read_bytes(index, sample, verify=True)
    try:
        if zlib.crc32(raw) != sample.crc32:
            raise UserError("its checksum differs from the index")
        if index.caption_keys:
            meta, payload = read_foreign_sample(raw, sample.id, index.caption_keys)
        else:
            meta, payload = _read_own_sample(raw, sample.id)
        captions = [*meta["captions"], *index.extra_captions.get(sample.id, [])]
        if wrong := [text for text in captions if not isinstance(text, str) or not is_utf8(text)]:
            raise UserError(f"its caption {wrong[0]!r} is not a text")
        if len(captions) != sample.num_captions:
            raise UserError(f"it has {len(captions)} captions and the index says {sample.num_captions}")
        return meta | {"id": video_id, "captions": captions}, payload
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(f"shard {path} is damaged at sample {sample.id!r}: {error}") from error


def _read_own_sample(raw: bytes, sample_id: str) -> tuple[dict[str, Any], list[bytes]]:
    """JSON and frames (or the clip) of a sample that this project packed."""
    key, members = safe_key(sample_id), dict(plain_members(raw))
    if f"{key}.json" not in members or not all(name.startswith(f"{key}.") for name in members):
        raise UserError(f"its members are {', '.join(members)[:100]}, not those of {key}")
    meta = json.loads(members.pop(f"{key}.json"))
    return meta, list(members.values())


def _read_bytes(index: Index, sample: Sample, *, verify: bool = False) -> tuple[Path, bytes]:
    """The local path of a sample's shard, and the sample's bytes."""
    for attempt in range(3):
        path = index.path(sample, verify=verify)
        try:
            with path.open("rb") as shard:
                return path, os.pread(shard.fileno(), sample.size, sample.offset)
        except FileNotFoundError:  # a copy may be deleted just before it is opened
            if not index.is_remote or attempt == 2:
                raise
    raise AssertionError


def read_into(
    out_FHWC: np.ndarray, index: Index, number: int, rng_of: Callable[[str], np.random.Generator] | None = None
) -> dict[str, Any]:
    """Decode a sample's frames into ``out_FHWC`` (uint8, RGB) and return the sample's JSON.

    If more frames were packed than fit, one frame of each of F equal segments is taken: the middle one, or a random
    one if ``rng_of`` is given, which maps the sample's id to a random generator. Clips are decoded here.

    Raises:
        DamagedError: the bytes, the JSON or a frame of the sample are not what was packed.
    """
    meta, payload = read_sample(index, number)
    index, _ = index.locate(number)
    num_frames = len(out_FHWC)

    def pick(length: int) -> list[int]:  # may be called twice, with the same answer
        if rng_of is None:
            return uniform_frame_indices(length, num_frames)
        return random_frame_indices(length, num_frames, rng_of(meta["id"]))

    try:
        if index.store == "clip":
            _decode_clip(out_FHWC, payload[0], meta.get("frame_window"), pick)
        else:
            chosen = range(num_frames) if len(payload) == num_frames else pick(len(payload))
            for frame_HWC, position in zip(out_FHWC, chosen, strict=True):
                if index.caption_keys:
                    frame_HWC[:] = square_jpeg(payload[position], frame_HWC.shape[0])[..., :3]
                else:
                    decode_jpeg(payload[position], frame_HWC)
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"sample {meta['id']!r} of {index.directory} does not decode: {error}") from error
    return meta


def decode_jpeg(jpeg: bytes, out_HWC: np.ndarray) -> None:
    """Decode a JPEG into ``out_HWC`` (uint8, RGB).

    Raises:
        ValueError: it is not a JPEG of exactly this height and width.
    """
    # simplejpeg fills only a part of a larger buffer and says nothing: the rest would keep an older batch's pixels.
    decoded_HWC = simplejpeg.decode_jpeg(jpeg, buffer=out_HWC)
    if decoded_HWC.shape != out_HWC.shape:
        height, width = decoded_HWC.shape[:2]
        raise UserError(f"a frame has {width}x{height} pixels and the index says {out_HWC.shape[1]}x{out_HWC.shape[0]}")


def _decode_clip(
    out_FHWC: np.ndarray, clip: bytes, frame_window: list[int] | None, pick: Callable[[int], list[int]]
) -> None:
    """Decode frames of a clip, of the part that packing found or of the whole clip."""
    from tmass_dist.data.video import Timeline, read_video

    def choose(timeline: Timeline) -> list[int]:
        start, end = (0, len(timeline)) if frame_window is None else (int(edge) for edge in frame_window)
        return [start + position for position in pick(end - start)]

    frames, _ = read_video(clip, choose, out_FHWC.shape[1])
    for out_HWC, frame in zip(out_FHWC, frames, strict=True):
        out_HWC[:] = frame[..., :3]
