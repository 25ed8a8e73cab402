"""Annotations for your own videos: a manifest of JSON lines, or a folder with captions beside the videos."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from shards.annotation_files import read_json_objects, read_lines, read_table
from tmass_dist.errors import UserError

Row = dict[str, Any]

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4"}
    | {".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
"""Which files of a folder are videos; a table of captions may name others."""


def read_manifest(annotations: Path, videos: Path, split: str) -> list[Row]:
    """JSON lines with ``id``, ``path``, ``captions`` and ``split``."""
    if not annotations.is_file():
        raise UserError(f"no annotations {annotations}")
    rows, splits = [], set()
    first_line: dict[str, int] = {}
    for number, row in read_json_objects(annotations, {"id", "path", "captions", "split"}):
        if not isinstance(row["captions"], list) or not row["captions"]:
            raise UserError(f"{annotations} line {number}: captions must be a list with at least one text")
        if not isinstance(row["split"], str) or not isinstance(row["id"], str):
            raise UserError(f"{annotations} line {number}: id and split must be strings")
        splits.add(row["split"])
        if row["split"] != split:
            continue
        if row["id"] in first_line:
            raise UserError(
                f"{annotations} line {number}: the id {row['id']!r} occurs twice; first in line {first_line[row['id']]}"
            )
        first_line[row["id"]] = number
        rows.append({key: value for key, value in row.items() if key != "split"})
    if not rows:
        raise UserError(f"{annotations} has no row of split {split!r}; it has {', '.join(sorted(splits))}")
    return rows


def read_folder(annotations: Path, videos: Path, split: str) -> list[Row]:
    """Videos beside ``captions.jsonl`` or ``captions.csv``, or each with a ``.txt`` of its name, a caption a line."""
    table = _table_of(annotations)
    if table is None:
        entries = _entries_of_texts(annotations, videos)
    elif table.suffix == ".csv":
        entries = []
        for number, cells in read_table(table, "file", "caption"):
            entry: Row = {key: value for key, value in cells.items() if value and key}
            if not {"file", "caption"} <= entry.keys():
                raise UserError(f"{table} line {number} has no file or no caption")
            entries.append((f"{table} line {number}", entry))
    else:
        objects = read_json_objects(table, {"file", "caption"})
        entries = [(f"{table} line {number}", entry) for number, entry in objects]
    splits = {str(entry["split"]) for _, entry in entries if "split" in entry}
    chosen = [(place, entry) for place, entry in entries if str(entry.get("split", split)) == split]
    if not chosen:
        raise UserError(f"{table} has no row of split {split!r}; it has {', '.join(sorted(splits))}")
    rows: dict[str, Row] = {}
    for place, entry in chosen:
        fields = {key: value for key, value in entry.items() if key not in ("file", "caption", "split")}
        for edge in ("start", "end"):
            if edge in fields:
                fields[edge] = seconds(fields[edge], f"{place}: {edge}")
        name = str(entry["file"])
        row = rows.setdefault(name, {"id": name.rsplit(".", 1)[0], "path": name, "captions": [], **fields})
        row["captions"].append(entry["caption"])
    stems = Counter(row["id"] for row in rows.values())
    for row in rows.values():  # a.mp4 and a.avi are two videos
        if stems[row["id"]] > 1:
            row["id"] = row["path"]
    return list(rows.values())


def _table_of(annotations: Path) -> Path | None:
    if annotations.is_file():
        return annotations
    return next((p for p in (annotations / f"captions{s}" for s in (".jsonl", ".csv")) if p.is_file()), None)


def _entries_of_texts(annotations: Path, videos: Path) -> list[tuple[str, Row]]:
    texts = {text.stem: text for text in sorted(annotations.glob("*.txt"))}
    entries = [
        (str(texts[video.stem]), {"file": video.name, "caption": line})
        for video in sorted(videos.iterdir())
        if video.suffix.lower() in VIDEO_SUFFIXES and video.stem in texts
        for _, line in read_lines(texts[video.stem])
    ]
    if not entries:
        raise UserError(f"{annotations} has no captions.jsonl, no captions.csv and no .txt named as a video")
    return entries


def files_passed_over(annotations: Path, videos: Path) -> str:
    """What a folder holds that is not packed: other files, videos without a text, texts without a video."""
    if _table_of(annotations) is not None:
        return ""
    files = [path for path in videos.iterdir() if path.is_file() and not path.name.startswith(".")]
    found = {path.stem for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    texts = {text.stem for text in annotations.glob("*.txt")}
    others = Counter(path.suffix for path in files if path.suffix.lower() not in {*VIDEO_SUFFIXES, ".txt"})
    parts = []
    if others:
        kinds = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in sorted(others.items()))
        parts.append(f"{others.total()} files that are no videos ({kinds})")
    if without := found - texts:
        parts.append(f"{len(without)} videos without a .txt")
    if without := texts - found:
        parts.append(f"{len(without)} .txt files without a video")
    return f"passed over: {', '.join(parts)}" if parts else ""


def seconds(value: Any, name: str) -> float:
    """A number of seconds, of text or of JSON.

    Raises:
        UserError: it is none; ``name`` says which one.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is {value!r}, which is no number of seconds") from error
