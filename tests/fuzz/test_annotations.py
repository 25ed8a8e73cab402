"""Hostile annotation files of every form."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.sources import read_rows
from tests.fuzz.inputs import CHANGES, OBJECTS, TEXTS, VALUES
from tests.fuzz.rule import cases, result_or_error

IDS = st.sampled_from(["v1", "v2", "v3", "v4.x", "v 5"])


def _read(form: str, source: str, files: dict[str, bytes], name: str = "") -> list[dict[str, Any]] | None:
    """The rows of the training split of a directory with these files; the message of an error names the directory."""
    with tempfile.TemporaryDirectory() as directory:
        for file, content in files.items():
            (Path(directory) / file).write_bytes(content)
        annotations = Path(directory, name) if name else Path(directory)
        rows = result_or_error(form, lambda: read_rows(source, annotations, Path(directory), "train")[0], directory)
    for row in rows or ():  # what every form promises
        assert row["id"].strip() and row["path"] and row["captions"]
        assert all(isinstance(text, str) and text.strip() for text in row["captions"])
    return rows


def _table(rows: list[list[str]]) -> bytes:
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue().encode("utf-8", "surrogatepass")


def _text(value: str) -> str:
    """A cell as it is read: without byte-order marks, and without line breaks at its ends."""
    return value.replace("\ufeff", "").strip("\n")


@given(rows=st.lists(st.lists(TEXTS, min_size=1, max_size=4), max_size=4))
@cases(600)
def test_a_table_that_csv_wrote_is_read_alike_or_refused(rows: list[list[str]]) -> None:
    """The independent reading is what was written."""
    result = _read("captions.csv", "folder", {"captions.csv": _table([["file", "caption"], *rows])})
    if result is not None:
        written = [row for row in rows if any(cell.replace("\ufeff", "") for cell in row)]
        assert all(len(row) == 2 for row in written)
        captions = [caption for row in result for caption in row["captions"]]
        assert sorted(map(_text, captions)) == sorted(_text(caption) for _, caption in written)


@given(content=st.text(max_size=200) | st.binary(max_size=200))
@cases(250)
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "v.txt"])
def test_any_bytes_are_read_or_refused(name: str, content: str | bytes) -> None:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    header = b"file,caption\n" if name.endswith(".csv") else b""
    result = _read(f"{name}, any bytes", "folder", {name: header + raw, "v.mp4": b""})
    if result is not None and name == "v.txt" and b"\xff" not in raw and b"\xfe" not in raw:
        lines = [line.strip() for line in raw.decode().replace("\ufeff", "").split("\n")]
        assert result[0]["captions"] == [line for line in lines if line]


@given(rows=st.lists(st.fixed_dictionaries({"file": IDS, "caption": VALUES}, optional={"split": st.just("train")})))
@cases(250)
def test_lines_of_json_are_read_alike_or_refused(rows: list[dict]) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    result = _read("captions.jsonl", "folder", {"captions.jsonl": content})
    if result is not None:
        captions = {row["path"]: row["captions"] for row in result}
        assert captions == {name: [r["caption"] for r in rows if r["file"] == name] for name in captions}
        assert captions.keys() == {row["file"] for row in rows}


@given(rows=st.lists(st.dictionaries(st.sampled_from(["id", "path", "captions", "split", "start", "end"]), VALUES)))
@cases(300)
def test_any_manifest_is_read_or_refused(rows: list[dict]) -> None:
    content = "".join(json.dumps({"split": "train", **row}) + "\n" for row in rows).encode()
    _read("manifest", "manifest", {"manifest.jsonl": content}, "manifest.jsonl")


MANIFEST = [
    {
        "id": f"v{k}",
        "path": f"v{k}.mp4",
        "captions": [f"caption {k}", "two"],
        "split": "train",
        "start": k,
        "end": k + 2,
    }
    for k in range(3)
]


@given(change=CHANGES, number=st.integers(0, 2), key=st.sampled_from(["captions", "start", "end", "x"]), value=OBJECTS)
@cases(400)
def test_a_changed_manifest_is_read_alike_or_refused(change: Any, number: int, key: str, value: Any) -> None:
    lines = [json.dumps(row if k != number else row | {key: value}).encode() for k, row in enumerate(MANIFEST)]
    result = _read("manifest, one value changed", "manifest", {"m.jsonl": b"\n".join(lines)}, "m.jsonl")
    if result is not None:
        expected = json.loads(lines[number])
        del expected["split"]
        kept = {name: value for name, value in expected.items() if value is not None or name not in ("start", "end")}
        assert result[number] == kept or value != value  # not a number differs from itself
    _read("manifest, damaged", "manifest", {"m.jsonl": change(b"\n".join(lines))}, "m.jsonl")


@given(entries=VALUES | st.lists(st.fixed_dictionaries({}, optional={"videoID": VALUES, "enCap": VALUES}), max_size=3))
@cases(150)
def test_any_vatex_file_is_read_or_refused(entries: object) -> None:
    files = {"vatex.json": json.dumps(entries).encode(), "train_list.txt": b"a\nv.mp4\n"}
    _read("VATEX, any JSON", "vatex", files)


@given(captions=st.dictionaries(IDS, st.lists(TEXTS, max_size=3) | VALUES), listed=st.lists(IDS), change=CHANGES)
@cases(150)
def test_vatex_is_read_alike_or_refused(captions: dict[str, Any], listed: list[str], change: Any) -> None:
    content = json.dumps([{"videoID": name, "enCap": texts} for name, texts in captions.items()]).encode()
    files = {"vatex.json": content, "train_list.txt": "\n".join(listed).encode()}
    result = _read("VATEX", "vatex", files)
    if result is not None:
        assert [(row["id"], row["captions"]) for row in result] == [(name, captions[name]) for name in listed]
    _read("VATEX, damaged", "vatex", files | {"vatex.json": change(content)})


@given(sentences=st.lists(st.tuples(IDS, TEXTS), max_size=6), listed=st.lists(IDS, max_size=4), change=CHANGES)
@cases(200)
def test_msrvtt_is_read_alike_or_refused(sentences: list[tuple[str, str]], listed: list[str], change: Any) -> None:
    content = json.dumps({"sentences": [{"video_id": v, "caption": c} for v, c in sentences]}).encode()
    files = {"MSRVTT_data.json": content, "MSRVTT_train.9k.csv": _table([["video_id"], *([v] for v in listed)])}
    result = _read("MSR-VTT", "msrvtt", files)
    if result is not None:
        assert [row["id"] for row in result] == listed
        assert [row["captions"] for row in result] == [[c for v, c in sentences if v == name] for name in listed]
    damaged = files | {"MSRVTT_train.9k.csv": change(files["MSRVTT_train.9k.csv"])}
    _read("MSR-VTT, damaged", "msrvtt", damaged)


@given(rows=st.lists(st.tuples(IDS, TEXTS), max_size=5), change=CHANGES)
@cases(150)
def test_lsmdc_is_read_alike_or_refused(rows: list[tuple[str, str]], change: Any) -> None:
    lines = [f"movie_{name}\t0\t1\t2\t3\t{text}" for name, text in rows]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    result = _read("LSMDC", "lsmdc", {"LSMDC16_annos_training.csv": content})
    if result is not None:
        whole = [caption for row in result for caption in row["captions"]]
        assert len(whole) == len(rows)
        assert sorted(whole) == sorted(text.replace("\ufeff", "").strip() for _, text in rows)
    _read("LSMDC, damaged", "lsmdc", {"LSMDC16_annos_training.csv": change(content)})


NUMBERS = st.integers(-3, 40).map(str) | st.floats().map(str) | TEXTS


@given(rows=st.lists(st.tuples(IDS, TEXTS, NUMBERS, NUMBERS), max_size=4, unique_by=lambda row: row[0]), change=CHANGES)
@cases(200)
def test_didemo_is_read_alike_or_refused(rows: list[tuple[str, str, str, str]], change: Any) -> None:
    table = [["video_path", "starts", "ends", "text"]]
    table += [[f"/data/{name}.mp4", f"[{start}]", f"[{end}]", text] for name, text, start, end in rows]
    result = _read("DiDeMo", "didemo", {"didemo_train_label.csv": _table(table)})
    if result is not None:
        assert [row["captions"] for row in result] == [[" ".join(_text(text).split())] for _, text, _, _ in rows]
        assert all(0 <= row["start"] < row["end"] < float("inf") for row in result)
    _read("DiDeMo, damaged", "didemo", {"didemo_train_label.csv": change(_table(table))})


@given(rows=st.lists(st.tuples(IDS, TEXTS, TEXTS, NUMBERS), max_size=4, unique_by=lambda row: row[0]), change=CHANGES)
@cases(200)
def test_charades_is_read_alike_or_refused(rows: list[tuple[str, str, str, str]], change: Any) -> None:
    table = [["id", "script", "descriptions", "actions"]]
    table += [[name, script, text, f"c001 0 {number}"] for name, script, text, number in rows]
    result = _read("Charades", "charades", {"Charades_v1_train.csv": _table(table)})
    if result is not None:
        for row, (name, script, text, _) in zip(result, rows, strict=True):
            texts = [" ".join(part.split()) for part in _text(text).split(";") if part.strip()]
            assert row["id"] == name and row["captions"] == [" ".join(texts) or " ".join(_text(script).split())]
    _read("Charades, damaged", "charades", {"Charades_v1_train.csv": change(_table(table))})
