"""Hostile annotation files, videos and tar files."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.foreign_tars import read_tar
from shards.sources import read_rows
from tests.fuzz.rule import CASES, result_or_error
from tests.videos import encode, moving_pictures
from tmass_dist.data.tars import scan_tar
from tmass_dist.data.video import read_video, uniform

SPLICES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 3000), st.binary(max_size=40) | st.just(bytes(2000))), max_size=4
)
"""Where to change bytes (a share of the file), how many are removed, and what is put in their place."""
TEXTS = st.text(max_size=20) | st.sampled_from(["a, b", 'a "b" c', '"', "\u2028", "\ufeff", "\x00", "\n", "v.mp4"])
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(), lambda inner: st.lists(inner, max_size=3)
)


def _splice(content: bytes, splices: list[tuple[float, int, bytes]]) -> bytes:
    for share, removed, added in splices:
        position = int(share * len(content))
        content = content[:position] + added + content[position + removed :]
    return content


@given(rows=st.lists(st.lists(TEXTS, min_size=1, max_size=4), max_size=4))
@CASES
def test_what_csv_writes_is_read_alike_or_refused(rows: list[list[str]]) -> None:
    """The independent reading is what was written."""
    with tempfile.TemporaryDirectory() as directory:
        table = io.StringIO(newline="")
        writer = csv.writer(table, lineterminator="\n")
        writer.writerows([["file", "caption"], *rows])
        path = Path(directory) / "captions.csv"
        path.write_bytes(table.getvalue().encode("utf-8"))
        result = result_or_error(lambda: read_rows("folder", None, Path(directory), "train"), directory)
    if result is not None:
        written = [row for row in rows if any(row)]
        assert all(len(row) == 2 for row in written)
        captions = [caption for row in result[0] for caption in row["captions"]]
        clean = sorted(caption.replace("\ufeff", "").strip("\n") for _, caption in written)
        assert sorted(caption.strip("\n") for caption in captions) == clean


@given(content=st.text(max_size=200) | st.binary(max_size=200))
@CASES
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "v.txt"])
def test_any_bytes_are_read_or_refused(name: str, content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        header = b"file,caption\n" if name.endswith(".csv") else b""
        (Path(directory) / name).write_bytes(header + raw)
        (Path(directory) / "v.mp4").touch()
        result_or_error(lambda: read_rows("folder", None, Path(directory), "train"), directory)


@given(rows=st.lists(st.dictionaries(st.sampled_from(["id", "path", "captions", "split", "start", "end"]), VALUES)))
@CASES
def test_any_manifest_is_read_or_refused(rows: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "manifest.jsonl"
        path.write_text("".join(json.dumps({"split": "train", **row}) + "\n" for row in rows))
        result = result_or_error(lambda: read_rows("manifest", path, Path(directory), "train"), directory)
    for row in result[0] if result else ():
        assert row["id"] and row["captions"] and all(isinstance(text, str) for text in row["captions"])


@given(entries=VALUES | st.lists(st.fixed_dictionaries({}, optional={"videoID": VALUES, "enCap": VALUES}), max_size=3))
@CASES
def test_any_vatex_file_is_read_or_refused(entries: object) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "vatex.json").write_text(json.dumps(entries))
        (Path(directory) / "train_list.txt").write_text("a\nv.mp4\n")
        result_or_error(lambda: read_rows("vatex", Path(directory), Path(directory), "train"), directory)


@cache
def _video(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        encode(Path(directory) / "v", moving_pictures(30), name)
        return (Path(directory) / "v").read_bytes()


@given(splices=SPLICES)
@CASES
@pytest.mark.parametrize("name", ["mp4", "mkv", "avi", "mpg", "flv"])
def test_any_video_is_decoded_or_refused(name: str, splices: list[tuple[float, int, bytes]]) -> None:
    result = result_or_error(lambda: read_video(_splice(_video(name), splices), uniform(4), 32))
    if result is not None:
        frames, facts = result
        assert len(frames) == 4 and all(frame.shape == (32, 32, 4) for frame in frames)
        assert max(facts["frame_indices"]) < facts["num_decoded_frames"]
        assert np.isfinite(facts["seconds"])


@cache
def _tar() -> bytes:
    from webdataset.writer import TarWriter

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.tar"
        with TarWriter(str(path)) as writer:
            for k in range(3):
                writer.write({"__key__": f"k{k}", "mp4": bytes(700), "txt": f"text {k}", "json": {"caption": "a"}})
        return path.read_bytes()


@given(splices=SPLICES)
@CASES
def test_any_tar_is_read_or_refused(splices: list[tuple[float, int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.tar"
        path.write_bytes(_splice(_tar(), splices))
        result_or_error(lambda: scan_tar(path), "x.tar")
        tar = result_or_error(lambda: read_tar(str(path), ("txt", "caption")))
        assert not tar.damage or "x.tar" in tar.damage
        for sample in tar.samples:
            assert (sample.kind and sample.captions) or sample.reason
