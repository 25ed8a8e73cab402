"""The annotation files of each data set, as published, with their oddities: rows to pack.

A row is ``id``, ``path`` (below the videos' directory), ``captions``, and where the file says so ``start`` and ``end``
in seconds; every further field is kept in the sample's JSON, below ``fields``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmass_dist.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set: how its files are read, and what was published of its splits."""

    read: Callable[[Path, Path, str], list[Row]]
    """Of the annotations, the videos and the split."""
    videos: dict[str, int]
    """Videos of each split of the literature."""
    files: str
    """What ``--annotations`` names."""


def read_rows(source: str, annotations: Path | None, videos: Path, split: str) -> tuple[list[Row], str]:
    """The rows of a split, in the file's order, and a line that sets their number beside the published one.

    Raises:
        UserError: in one line, the file or line that is wrong, or the splits there are.
    """
    known = SOURCES[source]
    if annotations is None:
        if known.files:
            raise UserError(f"--source {source} needs --annotations: {known.files}")
        annotations = videos
    if known.videos and split not in known.videos:
        raise UserError(f"{source} has no split {split!r}; it has {', '.join(known.videos)}")
    rows = known.read(annotations, videos, split)
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise UserError(f"{annotations}: the id {row['id']!r} is there twice in split {split}")
        seen.add(row["id"])
        if not row["captions"] or not all(isinstance(text, str) and text.strip() for text in row["captions"]):
            raise UserError(f"{annotations}: {row['id']!r} has no caption, or an empty one")
    counts = f"{source} {split}: {len(rows)} videos, {sum(len(row['captions']) for row in rows)} captions"
    if known.videos:
        counts += f" (published: {known.videos[split]} videos)"
    return rows, counts


def _file(directory: Path, *names: str) -> Path:
    """The first of ``names`` that is there; ``directory`` itself where it is a file."""
    if directory.is_file():
        return directory
    for name in names:
        if (directory / name).is_file():
            return directory / name
    there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) if directory.is_dir() else "it does not exist"
    raise UserError(f"no {' or '.join(names)} in {directory}: {there}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _table(path: Path, *columns: str) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise UserError(f"{path} lacks the column {', '.join(sorted(missing))}; it has {reader.fieldnames}")
        return list(reader)


def _with_suffix(videos: Path, stem: str, default: str = ".mp4") -> str:
    """The file of an id below ``videos``, whatever its container; one that is missing is named by the packing."""
    for suffix in (default, ".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v"):
        if (videos / f"{stem}{suffix}").is_file():
            return f"{stem}{suffix}"
    return f"{stem}{default}"


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, text in pairs:
        groups.setdefault(key, []).append(text)
    return groups


def _msrvtt(annotations: Path, videos: Path, split: str) -> list[Row]:
    if split == "test":
        table = _table(_file(annotations, "MSRVTT_JSFUSION_test.csv"), "video_id", "sentence")
        captions = _grouped((row["video_id"], row["sentence"]) for row in table)
        ids = list(captions)
    else:
        name = {"train": "MSRVTT_train.9k.csv", "train-7k": "MSRVTT_train.7k.csv"}[split]
        ids = [row["video_id"] for row in _table(_file(annotations, name), "video_id")]
        path = _file(annotations, "MSRVTT_data.json")
        captions = _grouped((s["video_id"], s["caption"]) for s in _json(path)["sentences"])
        lacking = [video for video in ids if video not in captions]
        if lacking:
            raise UserError(f"{path} has no caption of {len(lacking)} videos of {name}: {', '.join(lacking[:5])}")
    return [{"id": i, "path": _with_suffix(videos, i), "captions": captions[i]} for i in ids]


def _lsmdc(annotations: Path, videos: Path, split: str) -> list[Row]:
    name = {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }[split]
    path = _file(annotations, name)
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.strip("\r\n").split("\t")
        if len(fields) != 6:
            raise UserError(f"{path} line {number} has {len(fields)} fields and not 6, separated by tabs")
        pairs.append((fields[0].strip().replace('"', ""), fields[5].strip()))
    # A clip has several lines in training and validation: its sentences, together.
    return [
        {"id": clip, "path": f"{clip.split('.')[0][:-3]}/{clip}.avi", "captions": sentences}
        for clip, sentences in _grouped(pairs).items()
    ]


def _didemo(annotations: Path, videos: Path, split: str) -> list[Row]:
    path = _file(annotations, f"didemo_{split}_label.csv")
    rows = []
    for row in _table(path, "video_path", "starts", "ends", "text"):
        name = Path(row["video_path"]).name  # the directory is another machine's
        stem, suffix = (name, "") if not re.search(r"\.\w{2,4}$", name) else name.rsplit(".", 1)
        found = _with_suffix(videos, stem, f".{suffix}" if suffix else ".mp4")
        start, end = (re.findall(r"-?[\d.]+", row[key]) for key in ("starts", "ends"))
        if not start or not end:
            raise UserError(f"{path}: {name} has no window: {row['starts']!r} to {row['ends']!r}")
        rows.append(
            {
                "id": stem,
                "path": found,
                "captions": [" ".join(row["text"].split())],
                "start": float(start[0]),
                "end": float(end[0]),
            }
        )
    return rows


def _vatex(annotations: Path, videos: Path, split: str) -> list[Row]:
    captions: dict[str, list[str]] = {}
    files = [annotations] if annotations.is_file() else sorted(annotations.glob("vatex*.json"))
    for path in files:
        content = _json(path)
        pairs = content.items() if isinstance(content, dict) else ((entry["videoID"], entry) for entry in content)
        captions |= {video: entry["enCap"] for video, entry in pairs if "enCap" in entry}
    if not captions:
        raise UserError(f"no vatex*.json with English captions (enCap) in {annotations}")
    lists = annotations.parent if annotations.is_file() else annotations
    listed = _file(lists, f"{split}_list.txt", f"vatex_{split}.txt", f"{split}.txt").read_text(encoding="utf-8")
    ids = [line.strip() for line in listed.splitlines() if line.strip()]
    lacking = [video for video in ids if video not in captions]
    if lacking:
        raise UserError(f"{annotations} has no caption of {len(lacking)} listed videos: {', '.join(lacking[:5])}")
    return [{"id": i, "path": _with_suffix(videos, i), "captions": captions[i]} for i in ids]


def _charades(annotations: Path, videos: Path, split: str) -> list[Row]:
    table = _table(_file(annotations, f"Charades_v1_{split}.csv"), "id", "script", "descriptions", "actions")
    rows = []
    for row in table:
        texts = [" ".join(text.split()) for text in row["descriptions"].split(";") if text.strip()]
        # Retrieval papers take the descriptions, one paragraph a video; the script is what was acted.
        text = " ".join(texts) or " ".join(row["script"].split())
        actions = [triplet.split() for triplet in row["actions"].split(";") if triplet.strip()]
        about = {"script": row["script"], "actions": [[a, float(s), float(e)] for a, s, e in actions]}
        rows.append({"id": row["id"], "path": _with_suffix(videos, row["id"]), "captions": [text], **about})
    return rows


def _lines(path: Path, needed: set[str]) -> list[tuple[int, Row]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = needed - set(row)
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        if missing:
            raise UserError(f"{path} line {number} lacks {', '.join(sorted(missing))}")
        rows.append((number, row))
    return rows


def _manifest(annotations: Path, videos: Path, split: str) -> list[Row]:
    if not annotations.is_file():
        raise UserError(f"no annotations {annotations}")
    rows, splits, seen = [], set(), set()
    for number, row in _lines(annotations, {"id", "path", "captions", "split"}):
        if not isinstance(row["captions"], list) or not row["captions"]:
            raise UserError(f"{annotations} line {number}: captions must be a list with at least one text")
        splits.add(row["split"])
        if row["split"] == split:
            if row["id"] in seen:
                raise UserError(f"{annotations} line {number}: the id {row['id']!r} is there twice")
            seen.add(row["id"])
            rows.append({key: value for key, value in row.items() if key != "split"})
    if not rows:
        raise UserError(f"{annotations} has no row of split {split!r}; it has {', '.join(sorted(splits)) or 'none'}")
    return rows


def _folder(annotations: Path, videos: Path, split: str) -> list[Row]:
    """Videos beside ``captions.jsonl`` or ``captions.csv``, or each with a ``.txt`` of its name, a caption a line."""
    if annotations.is_file():
        table = annotations
    else:
        table = next((p for p in (annotations / f"captions{s}" for s in (".jsonl", ".csv")) if p.is_file()), None)
    if table is None:
        texts = {text.stem: text.read_text(encoding="utf-8").splitlines() for text in sorted(annotations.glob("*.txt"))}
        entries = [
            {"file": video.name, "caption": line.strip()}
            for video in sorted(videos.iterdir())
            if video.suffix != ".txt" and video.stem in texts
            for line in texts[video.stem]
            if line.strip()
        ]
        if not entries:
            raise UserError(f"{annotations} has no captions.jsonl, no captions.csv and no .txt named as a video")
    elif table.suffix == ".csv":
        entries = [{k: v for k, v in row.items() if v and k} for row in _table(table, "file", "caption")]
        lacking = [number for number, row in enumerate(entries, start=2) if not {"file", "caption"} <= set(row)]
        if lacking:
            raise UserError(f"{table} row {lacking[0]} has no file or no caption")
    else:
        entries = [row for _, row in _lines(table, {"file", "caption"})]
    splits = {str(entry["split"]) for entry in entries if "split" in entry}
    chosen = [entry for entry in entries if str(entry.get("split", split)) == split]
    if not chosen:
        raise UserError(f"{table} has no row of split {split!r}; it has {', '.join(sorted(splits))}")
    rows: dict[str, Row] = {}
    for entry in chosen:
        further = {key: value for key, value in entry.items() if key not in ("file", "caption", "split")}
        for edge in ("start", "end"):
            if edge in further:
                further[edge] = float(further[edge])
        name = str(entry["file"])
        row = rows.setdefault(name, {"id": name.rsplit(".", 1)[0], "path": name, "captions": [], **further})
        row["captions"].append(entry["caption"])
    stems = [row["id"] for row in rows.values()]
    for row in rows.values():  # a.mp4 and a.avi are two videos
        if stems.count(row["id"]) > 1:
            row["id"] = row["path"]
    return list(rows.values())


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
    "manifest": Source(_manifest, {}, "JSON lines: id, path, captions, split, and start and end in seconds"),
    "folder": Source(_folder, {}, ""),
}
