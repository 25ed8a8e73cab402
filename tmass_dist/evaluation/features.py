"""The features of a split, and the feature store: a directory that keeps them, memory-mapped and checked."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmass_dist.cli import is_utf8, replacing, write_json, writing
from tmass_dist.data.remote import sha256_of
from tmass_dist.errors import UserError
from tmass_dist.evaluation.arrays import map_array

VERSION = 2
INDEX, FRAMES, TEXTS, CAPTIONS, HEAD = "index.json", "frames.npy", "texts.npy", "captions.jsonl", "head.safetensors"
FILES = (FRAMES, TEXTS, CAPTIONS, HEAD)
"""Files of a store beside its index."""


@dataclass(frozen=True)
class Part:
    """Some encoded videos with their captions; row ``i`` of a tensor belongs to entry ``i`` of its list of ids."""

    video_ids: list[str]
    frames_VFD: Tensor
    caption_ids: list[tuple[str, int]]
    captions: list[str]
    text_TD: Tensor


@dataclass(frozen=True)
class Features:
    """The features of a whole split: videos in the split's order, the captions of each video in packed order."""

    video_ids: list[str]
    frames_VFD: Tensor
    """float32, or float16 in a store of that precision; may be memory-mapped: take a few videos at a time."""
    caption_ids: list[tuple[str, int]]
    captions: list[str]
    text_TD: Tensor
    owner_T: Tensor
    """Number of each text's video; non-decreasing."""

    @property
    def sentences(self) -> Tensor:
        """One embedding of each text: ``text_TD``, or its first vector where a text has one for each token."""
        return self.text_TD[:, : self.frames_VFD.shape[2]]


def merge(parts: Iterable[Part], video_ids: list[str]) -> Features:
    """One ``Features`` of all parts, in the order of ``video_ids``; a video that is in two parts counts once.

    Raises:
        UserError: videos missing from every part, videos without a caption, captions of unknown videos, features that
            are not finite; each counted and named.
    """
    frames: dict[str, Tensor] = {}
    texts: dict[str, dict[int, tuple[Tensor, str]]] = {}
    for part in parts:
        frames.update(zip(part.video_ids, part.frames_VFD))
        for (video_id, slot), text_D, caption in zip(part.caption_ids, part.text_TD, part.captions):
            texts.setdefault(video_id, {})[slot] = (text_D, caption)
    known = set(video_ids)
    for problem, ids in (
        ("videos were encoded by no rank", [v for v in video_ids if v not in frames]),
        ("videos have no caption", [v for v in video_ids if v not in texts]),
        ("captioned videos are not in the gallery", [v for v in texts if v not in known]),
    ):
        if ids:
            raise UserError(f"{len(ids)} {problem}: {', '.join(ids[:5])}")
    if not video_ids:
        raise UserError("the gallery is empty: there is no video to retrieve")
    rows = [(n, v, slot, *texts[v][slot]) for n, v in enumerate(video_ids) for slot in sorted(texts[v])]
    features = Features(
        video_ids=list(video_ids),
        frames_VFD=torch.stack([frames[video_id] for video_id in video_ids]),
        caption_ids=[(video_id, slot) for _, video_id, slot, _, _ in rows],
        captions=[caption for *_, caption in rows],
        text_TD=torch.stack([text_D for *_, text_D, _ in rows]),
        owner_T=torch.tensor([number for number, *_ in rows]),
    )
    check_finite(features)
    return features


def check_finite(features: Features) -> None:
    """Raise a UserError that names the videos and captions whose features are not finite."""
    bad_videos = ~torch.isfinite(features.frames_VFD).flatten(1).all(dim=1)
    bad_texts = ~torch.isfinite(features.text_TD).all(dim=1)
    names = [features.video_ids[i] for i in bad_videos.nonzero().flatten().tolist()]
    bad_ids = [features.caption_ids[i] for i in bad_texts.nonzero().flatten().tolist()]
    names += [f"{video_id} caption {slot}" for video_id, slot in bad_ids]
    if names:
        raise UserError(f"{len(names)} features are not finite numbers: {', '.join(names[:5])}")


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits of a hash of names, numbers and checksums."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save_part(path: Path, part: Part) -> None:
    """Write a part to a ``.safetensors`` file, by rename."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    ids = {"video_ids": part.video_ids, "caption_ids": part.caption_ids, "captions": part.captions}
    tensors = {"frames_VFD": part.frames_VFD.contiguous(), "text_TD": part.text_TD.contiguous()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"ids": json.dumps(ids)})


def load_part(path: Path) -> Part | None:
    """A part that :func:`save_part` wrote, or None where there is no readable one."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            ids = json.loads(file.metadata()["ids"])
            frames_VFD, text_TD = file.get_tensor("frames_VFD"), file.get_tensor("text_TD")
        caption_ids = [(video_id, slot) for video_id, slot in ids["caption_ids"]]
        return Part(ids["video_ids"], frames_VFD, caption_ids, ids["captions"], text_TD)
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None


class StoreWriter:
    """Writes the split's features into a store, some videos at a time and in the split's order.

    Args:
        directory: of the store; an index in it is removed, so that an unfinished store is never read.
        video_ids: every video of the split, in order.
        shape: ``(F, D)`` of a video's features.
        precision: ``float32`` or ``float16``.
    """

    def __init__(self, directory: Path, video_ids: list[str], shape: tuple[int, int], precision: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / INDEX).unlink(missing_ok=True)
        self.directory, self.video_ids, self.precision = directory, video_ids, precision
        whole = (len(video_ids), *shape)
        self._frames = np.lib.format.open_memmap(directory / FRAMES, "w+", np.dtype(precision), whole)
        _reserve(directory / FRAMES)
        self._texts: list[np.ndarray] = []
        self._captions = (directory / CAPTIONS).open("w", encoding="utf-8")
        self._num_videos = 0

    def add(self, features: Features) -> None:
        """The next videos of the split, with their captions.

        Raises:
            UserError: features that the precision cannot hold (named).
        """
        kind = getattr(torch, self.precision)
        if kind != torch.float32:
            rounded = replace(features, frames_VFD=features.frames_VFD.to(kind), text_TD=features.text_TD.to(kind))
            check_finite(rounded)
            features = rounded
        end = self._num_videos + len(features.video_ids)
        assert features.video_ids == self.video_ids[self._num_videos : end]
        self._frames[self._num_videos : end] = features.frames_VFD.numpy()
        self._texts.append(features.text_TD.numpy())
        with writing(self.directory / CAPTIONS):
            for (video_id, slot), caption in zip(features.caption_ids, features.captions):
                self._captions.write(json.dumps([video_id, slot, caption], ensure_ascii=True) + "\n")
        self._num_videos = end

    def finish(self, head: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write what is left, and the index last.

        Args:
            head: the head's ``state_dict``.
            about: what a reader needs to know of the store: ``fingerprint``, ``config`` (YAML), ``split``, ``shards``,
                ``checkpoint``, ``weights_sha256`` and what selected the checkpoint.
        """
        from safetensors.torch import save_file

        assert self._num_videos == len(self.video_ids)
        self._frames.flush()
        with writing(self.directory / CAPTIONS):
            self._captions.close()
        with writing(self.directory / TEXTS):
            np.save(self.directory / TEXTS, np.concatenate(self._texts))
        with writing(self.directory / HEAD):
            save_file({name: value.cpu().contiguous() for name, value in head.items()}, self.directory / HEAD)
        write_index(self.directory, {"video_ids": self.video_ids, "precision": self.precision, **about})


def _reserve(path: Path) -> None:
    """Reserve the space of a file that is memory-mapped: a full disk would end the process with SIGBUS."""
    with path.open("r+b") as file, writing(path):
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise


def write_index(directory: Path, about: dict[str, Any]) -> None:
    """Write ``index.json`` with the checksums of the store's files and of itself."""
    content = {**about, "version": VERSION, "files": {name: sha256_of(directory / name) for name in FILES}}
    write_json(directory / INDEX, content | {"checksum": fingerprint(content)})


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a store.

    Raises:
        UserError: there is none, it is damaged, or of another version.
    """
    path = directory / INDEX
    if not path.is_file():
        raise UserError(f"no features in {directory}: {INDEX} is missing; encode with --run RUN --features {directory}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); encode again") from error
    if version != VERSION:
        age = "a newer" if isinstance(version, int) and version > VERSION else "an older"
        raise UserError(f"{path} was written by {age} version ({version}); this one reads {VERSION}: encode again")
    checksum = content.pop("checksum", None)
    if checksum != fingerprint(content):
        raise UserError(f"{path} is damaged: its checksum differs; encode again")
    for key, kind in _INDEX_KEYS.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} is damaged: {key} is missing or of another type; encode again")
    return content


_INDEX_KEYS = {
    "fingerprint": str,
    "config": str,
    "checkpoint": str,
    "weights_sha256": str,
    "video_ids": list,
    "files": dict,
}


def selection_of(index: dict[str, Any]) -> dict[str, Any]:
    """What selected the checkpoint of a store: ``best.json`` of its run; empty where that is not known."""
    selection = index.get("selection")
    return selection if isinstance(selection, dict) else {}


def fingerprint_of(directory: Path) -> str | None:
    """What the store in ``directory`` was made from; None where there is no readable store."""
    try:
        return read_index(directory)["fingerprint"]
    except UserError:
        return None


def load_features(directory: Path) -> Features:
    """The store's features; the tensors stay on disk and are memory-mapped.

    Raises:
        UserError: a file that is missing or damaged (the checksum of every file is compared).
    """
    index = read_index(directory)
    for name in FILES:
        path = directory / name
        if not path.is_file() or sha256_of(path) != index["files"].get(name):
            state = "damaged" if path.is_file() else "missing"
            raise UserError(f"{path} is {state}; remove {directory / INDEX} and encode again")
    try:
        frames_VFD, text_TD = (torch.from_numpy(_mapped(directory / name)) for name in (FRAMES, TEXTS))
        rows = list(_caption_rows(directory / CAPTIONS))
        number_of = {_text(video_id, INDEX): number for number, video_id in enumerate(index["video_ids"])}
        owner_T = torch.tensor([number_of[video_id] for video_id, _, _ in rows], dtype=torch.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory} is no feature store: {error}; encode again") from error
    if len(frames_VFD) != len(number_of) or len(text_TD) != len(rows) or frames_VFD.dim() != 3 or text_TD.dim() != 2:
        raise UserError(f"{directory} is no feature store: ids and features differ in number; encode again")
    return Features(
        video_ids=index["video_ids"],
        frames_VFD=frames_VFD,
        caption_ids=[(video_id, slot) for video_id, slot, _ in rows],
        captions=[caption for *_, caption in rows],
        text_TD=text_TD,
        owner_T=owner_T,
    )


def _mapped(path: Path) -> np.ndarray:
    """An array of floats on disk; "c" maps it copy-on-write, which torch takes without a warning."""
    array = map_array(path, "c")
    if array.dtype not in (np.float32, np.float16):
        raise ValueError(f"{path.name} holds {array.dtype}")
    return array


def _caption_rows(path: Path) -> Iterator[tuple[str, int, str]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            video_id, slot, caption = json.loads(line)
            yield _text(video_id, CAPTIONS), int(slot), _text(caption, CAPTIONS)


def _text(value: Any, file: str) -> str:
    if not isinstance(value, str) or not is_utf8(value):
        raise ValueError(f"{file} holds {value!r}, which is not a text")
    return value
