"""The annotations of each data set, in the form in which they were published: the rows to pack.

A row is ``id``, ``path`` (below the videos' directory), ``captions``, and where the file says so ``start`` and ``end``
in seconds. All other fields are kept in the sample's JSON, below ``fields``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.annotation_files import find_file, read_json, read_lines, read_table
from shards.own_videos import Row, files_passed_over, read_folder, read_manifest, seconds
from tmass_dist.cli import is_utf8
from tmass_dist.errors import UserError


@dataclass(frozen=True)
class Source:
    """A data set: how its files are read, and the published size of its splits."""

    read: Callable[[Path, Path, str], list[Row]]
    """Rows, from the annotations, the videos and the split."""
    videos: dict[str, int]
    """Published number of videos of each split; empty if any split may be named."""
    files: str
    """What ``--annotations`` must name; empty if it is not needed."""
    passed_over: Callable[[Path, Path], str] = lambda annotations, videos: ""
    """Says what is not packed, from the annotations and the videos."""


def read_rows(
    source: str, annotations: Path | None, videos: Path, split: str, *, allow_outside: bool = False
) -> tuple[list[Row], str]:
    """The rows of a split in the order of the file, and a line with their number beside the published one.

    Args:
        source: a key of :data:`SOURCES`.
        annotations: the data set's own file or directory.
        videos: the directory of the videos.
        split: its name.
        allow_outside: whether a row may name a file outside ``videos``.

    Raises:
        UserError: the file or line that is wrong, or the splits that exist.
    """
    known = SOURCES[source]
    if annotations is None:
        if known.files:
            raise UserError(f"--source {source} needs --annotations: {known.files}")
        annotations = videos
    if known.videos and split not in known.videos:
        raise UserError(f"{source} has no split {split!r}; it has {', '.join(known.videos)}")
    rows = known.read(annotations, videos, split)
    if not rows:
        raise UserError(f"{annotations} has no videos of split {split!r}")
    ids: set[str] = set()
    for row in rows:
        _check_row(row, annotations, allow_outside)
        if row["id"] in ids:
            raise UserError(f"{annotations}: the id {row['id']!r} occurs twice in split {split}")
        ids.add(row["id"])
    counts = f"{source} {split}: {len(rows)} videos, {sum(len(row['captions']) for row in rows)} captions"
    if known.videos:
        counts += f" (published: {known.videos[split]} videos)"
    passed_over = known.passed_over(annotations, videos)
    return rows, f"{counts}; {passed_over}" if passed_over else counts


def _check_row(row: Row, annotations: Path, allow_outside: bool) -> None:
    """Raise a UserError that names the row if a field has the wrong type, or the path leaves the directory."""
    name, path, captions = row["id"], row["path"], row["captions"]
    if not _is_text(name):
        raise UserError(f"{annotations}: the id {name!r} is not a text")
    if not captions or not isinstance(captions, list) or not all(map(_is_text, captions)):
        raise UserError(f"{annotations}: {name!r} has no caption, or one that is empty or not a text")
    if not _is_text(path) or "\0" in path:
        raise UserError(f"{annotations}: the path {path!r} of {name!r} is not a path")
    inside = os.path.normpath(path)
    if not is_utf8(json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{annotations}: {name!r} has a field that is not UTF-8")
    if not allow_outside and (os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir):
        raise UserError(
            f"{annotations}: the file {path} of {name!r} is outside the directory of the videos; "
            "--allow-outside permits that"
        )
    for edge in ("start", "end"):
        value = row.get(edge)
        if value is None:
            row.pop(edge, None)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise UserError(f"{annotations}: the {edge} of {name!r} is {value!r}, which is no number of seconds")
    if row.get("end", math.inf) <= row.get("start", 0):
        raise UserError(f"{annotations}: {name!r} ends at {row['end']} s, before it starts")


def _is_text(value: Any) -> bool:
    """Whether it is a string that is not blank and can be written in UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and is_utf8(value)


def _with_suffix(videos: Path, stem: str, default: str = ".mp4") -> str:
    """The file of an id below ``videos``, whatever its container; packing reports a missing one."""
    for suffix in (default, ".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg"):
        if "\0" not in stem and (videos / f"{stem}{suffix}").is_file():
            return f"{stem}{suffix}"
    return f"{stem}{default}"


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, text in pairs:
        groups.setdefault(key, []).append(text)
    return groups


def _entries(path: Path, value: Any, *keys: str) -> list[dict[str, Any]]:
    """``value`` as a list of objects that have all ``keys``, as strings.

    Raises:
        UserError: the first entry that is not.
    """
    if not isinstance(value, list):
        raise UserError(f"{path} does not hold a list of entries with {' and '.join(keys)}")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
            raise UserError(f"{path}: entry {number} has no {' and '.join(keys)} of texts")
    return value


def _msrvtt(annotations: Path, videos: Path, split: str) -> list[Row]:
    if split == "test":
        table = read_table(find_file(annotations, "MSRVTT_JSFUSION_test.csv"), "video_id", "sentence")
        captions = _grouped((row["video_id"], row["sentence"]) for _, row in table)
        ids = list(captions)
    else:
        name = {"train": "MSRVTT_train.9k.csv", "train-7k": "MSRVTT_train.7k.csv"}[split]
        ids = [row["video_id"] for _, row in read_table(find_file(annotations, name), "video_id")]
        path = find_file(annotations, "MSRVTT_data.json")
        content = read_json(path)
        sentences = content.get("sentences") if isinstance(content, dict) else None
        captions = _grouped((s["video_id"], s["caption"]) for s in _entries(path, sentences, "video_id", "caption"))
        _check_listed(ids, captions, path, name)
    return [{"id": i, "path": _with_suffix(videos, i), "captions": captions[i]} for i in ids]


def _check_listed(ids: list[str], captions: dict[str, list[str]], path: Path, name: str) -> None:
    missing = [video for video in ids if video not in captions]
    if missing:
        raise UserError(f"{path} has no caption of {len(missing)} videos of {name}: {', '.join(missing[:5])}")


def _lsmdc(annotations: Path, videos: Path, split: str) -> list[Row]:
    name = {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }[split]
    path = find_file(annotations, name)
    pairs = []
    for number, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) != 6:
            raise UserError(f"{path} line {number} has {len(fields)} fields and not 6, separated by tabs")
        pairs.append((fields[0].strip().replace('"', ""), fields[5].strip()))
    # In training and validation, several lines describe a clip: its sentences are put together.
    return [
        {"id": clip, "path": f"{clip.split('.')[0][:-3]}/{clip}.avi", "captions": sentences}
        for clip, sentences in _grouped(pairs).items()
    ]


def _didemo(annotations: Path, videos: Path, split: str) -> list[Row]:
    path = find_file(annotations, f"didemo_{split}_label.csv")
    rows = []
    for line, row in read_table(path, "video_path", "starts", "ends", "text"):
        name = Path(row["video_path"]).name  # the directory is another machine's
        stem, suffix = (name, "") if not re.search(r"\.\w{2,4}$", name) else name.rsplit(".", 1)
        start, end = (re.findall(r"-?[\d.]+", row[key]) for key in ("starts", "ends"))
        if not start or not end:
            raise UserError(f"{path} line {line}: {name} has no window: {row['starts']!r} to {row['ends']!r}")
        rows.append(
            {
                "id": stem,
                "path": _with_suffix(videos, stem, f".{suffix}" if suffix else ".mp4"),
                "captions": [" ".join(row["text"].split())],
                "start": seconds(start[0], f"{path} line {line}: starts"),
                "end": seconds(end[0], f"{path} line {line}: ends"),
            }
        )
    return rows


def _vatex(annotations: Path, videos: Path, split: str) -> list[Row]:
    captions: dict[str, list[str]] = {}
    files = [annotations] if annotations.is_file() else sorted(annotations.glob("vatex*.json"))
    for path in files:
        content = read_json(path)
        if isinstance(content, dict):
            entries = content
        else:
            entries = {entry["videoID"]: entry for entry in _entries(path, content, "videoID")}
        for video, entry in entries.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("enCap", []), list):
                raise UserError(f"{path}: enCap of {video} is not a list of captions")
            if "enCap" in entry:
                captions[video] = entry["enCap"]
    if not captions:
        raise UserError(f"no vatex*.json with English captions (enCap) in {annotations}")
    lists = annotations.parent if annotations.is_file() else annotations
    listed = find_file(lists, f"{split}_list.txt", f"vatex_{split}.txt", f"{split}.txt")
    ids = [line for _, line in read_lines(listed)]
    _check_listed(ids, captions, annotations, listed.name)
    return [{"id": i, "path": _with_suffix(videos, i), "captions": captions[i]} for i in ids]


def _charades(annotations: Path, videos: Path, split: str) -> list[Row]:
    path = find_file(annotations, f"Charades_v1_{split}.csv")
    rows = []
    for line, row in read_table(path, "id", "script", "descriptions", "actions"):
        texts = [" ".join(text.split()) for text in row["descriptions"].split(";") if text.strip()]
        # Retrieval papers take the descriptions, one paragraph a video; the script is what was acted.
        text = " ".join(texts) or " ".join(row["script"].split())
        actions = []
        for triplet in filter(str.strip, row["actions"].split(";")):
            action, *edges = triplet.split()
            if len(edges) != 2:
                raise UserError(f"{path} line {line}: the action {triplet!r} is not a class, a start and an end")
            actions.append([action, *(seconds(edge, f"{path} line {line}: an action's time") for edge in edges)])
        fields = {"script": row["script"], "actions": actions}
        rows.append({"id": row["id"], "path": _with_suffix(videos, row["id"]), "captions": [text], **fields})
    return rows


SOURCES = {
    "msrvtt": Source(
        _msrvtt,
        {"train": 9000, "train-7k": 7010, "test": 1000},
        "a directory with MSRVTT_data.json, MSRVTT_train.9k.csv, MSRVTT_train.7k.csv and MSRVTT_JSFUSION_test.csv",
    ),
    "lsmdc": Source(
        _lsmdc,
        {"train": 101079, "val": 7408, "test": 1000},
        "a directory with LSMDC16_annos_training.csv, LSMDC16_annos_val.csv and LSMDC16_challenge_1000_publictect.csv",
    ),
    "didemo": Source(_didemo, {"train": 8395, "val": 1065, "test": 1004}, "a directory with didemo_SPLIT_label.csv"),
    "vatex": Source(
        _vatex,
        {"train": 25991, "val": 1500, "test": 1500},
        "a directory with vatex*.json and the lists train_list.txt, val_list.txt and test_list.txt (the HGR split)",
    ),
    "charades": Source(
        _charades, {"train": 7985, "test": 1863}, "a directory with Charades_v1_train.csv and Charades_v1_test.csv"
    ),
    "manifest": Source(read_manifest, {}, "JSON lines: id, path, captions, split, and start and end in seconds"),
    "folder": Source(read_folder, {}, "", files_passed_over),
}
