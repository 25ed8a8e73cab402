"""Hostile videos, tar files, indexes and samples."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from shards.foreign_tars import read_tar
from shards.shard_writer import ShardWriter
from tests.fuzz.inputs import CHANGES, OBJECTS
from tests.fuzz.rule import cases, result_or_error
from tests.videos import encode, moving_pictures
from tmass_dist.data.index import NAME, Index, load_index, make_columns
from tmass_dist.data.index_checks import checksum
from tmass_dist.data.samples import read_into
from tmass_dist.data.tars import scan_tar
from tmass_dist.data.video import read_video, uniform

Change = Callable[[bytes], bytes]


@cache
def _video(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        encode(Path(directory) / "v", moving_pictures(30), name)
        return (Path(directory) / "v").read_bytes()


@given(change=CHANGES)
@cases(100)
@pytest.mark.parametrize("name", ["mp4", "mkv", "avi", "mpg", "flv", "ts", "h264", "hevc", "vp9", "mjpeg", "wmv2"])
def test_any_video_is_decoded_or_refused(name: str, change: Change) -> None:
    content = change(_video(name))

    def work() -> tuple[int, int, list[int], float]:
        frames, facts = read_video(content, uniform(4), 32)
        assert all(frame.shape == (32, 32, 4) for frame in frames)
        return len(frames), facts["num_decoded_frames"], list(facts["frame_indices"]), float(facts["seconds"])

    result = result_or_error(f"video, {name}", work)
    if result is not None:
        number, decoded, indices, length = result
        assert number == 4 and max(indices) < decoded and np.isfinite(length)


@cache
def _tar() -> bytes:
    from webdataset.writer import TarWriter

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.tar"
        with TarWriter(str(path)) as writer:
            for k in range(3):
                writer.write({"__key__": f"k{k}", "mp4": bytes(700), "txt": f"text {k}", "json": {"caption": "a"}})
        return path.read_bytes()


@given(change=CHANGES)
@cases(400)
def test_any_tar_is_read_or_refused(change: Change) -> None:
    content = change(_tar())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.tar"
        path.write_bytes(content)
        places = result_or_error(
            "tar of this project", lambda: [(s.offset, s.size) for s in scan_tar(path).samples], "x.tar"
        )
        for offset, size in places or ():
            assert offset >= 0 and offset + size <= len(content)

        def read() -> tuple[str | None, list[tuple[bool, list[str], str | None]]]:
            tar = read_tar(str(path), ("txt", "caption"))
            return tar.damage, [(bool(s.kind), list(s.captions), s.reason) for s in tar.samples]

        damage, samples = result_or_error("tar of other programs", read)
        assert damage is None or damage == "" or "x.tar" in damage
        for has_video, captions, reason in samples:
            assert bool(has_video and captions) != bool(reason)


def _facts(index: Index) -> dict[str, object]:
    columns = {name: column.tolist() for name, column in index.columns.items()}
    return {"ids": index.ids, "shards": index.shards, "store": index.store, "side": index.image_size, **columns}


@given(change=CHANGES)
@cases(350)
def test_any_index_is_that_which_was_written_or_refused(split: Path, change: Change) -> None:
    content = (split / NAME).read_bytes()
    with tempfile.TemporaryDirectory() as directory:
        for path in split.iterdir():
            (Path(directory) / path.name).symlink_to(path)
        (Path(directory) / NAME).unlink()
        (Path(directory) / NAME).write_bytes(change(content))
        result = result_or_error("index, damaged", lambda: _facts(load_index(directory)), directory)
    if result is not None:
        assert result == _facts(load_index(split))


COLUMN_VALUES = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 5) | st.integers(500, 5000)


@given(
    name=st.sampled_from(["shard", "offset", "size", "num_captions", "crc32", "id_end"]),
    row=st.integers(0, 3),
    value=COLUMN_VALUES,
    key=st.sampled_from(["split", "num_frames", "image_size", "store", "shards", "version", "caption_keys", "x"]),
    header=OBJECTS,
    changed=st.sampled_from(["column", "header", "both"]),
)
@cases(350)
def test_an_index_of_others_with_a_right_checksum_is_read_or_refused(
    split: Path, name: str, row: int, value: int, key: str, header: object, changed: str
) -> None:
    """What passes the checks lies inside the shards, so that reading a sample raises nothing but a UserError."""
    with safe_open(split / NAME, framework="numpy") as file:
        columns = {c: file.get_tensor(c) for c in file.keys() if c != "sha256"}  # noqa: SIM118
        about = json.loads(file.metadata()["index"])
    if changed != "header":
        info = np.iinfo(columns[name].dtype)
        columns[name] = columns[name].copy()
        columns[name][row] = min(max(value, info.min), info.max)
    if changed != "column":
        about[key] = header
    with tempfile.TemporaryDirectory() as directory:
        for path in split.glob("*.tar"):
            (Path(directory) / path.name).symlink_to(path)
        text = json.dumps(about)
        digest = np.frombuffer(checksum(text, columns).encode(), np.uint8)
        save_file(columns | {"sha256": digest}, Path(directory) / NAME, metadata={"index": text})

        def work() -> int:
            index = load_index(directory)
            out = np.zeros((2, 16, 16, 3), np.uint8)
            return sum(len(read_into(out, index, number)["captions"]) for number in range(len(index)))

        captions = result_or_error("index of others", work, directory)
    assert captions in (None, 8)


@given(
    change=CHANGES,
    side=st.sampled_from([16, 15, 17, 8, 64]),
    meta=st.none() | st.dictionaries(st.sampled_from(["id", "captions", "frame_window", "fields"]), OBJECTS),
)
@cases(400)
def test_a_hostile_sample_with_a_right_checksum_is_decoded_or_refused(
    split: Path, change: Change, side: int, meta: dict | None
) -> None:
    """No pixel of the memory keeps its old value."""
    jpeg = change(simplejpeg.encode_jpeg(np.full((side, side, 3), 90, np.uint8), colorspace="RGB"))
    with tempfile.TemporaryDirectory() as directory:
        writer = ShardWriter(Path(directory) / "shard-000000.tar")
        good = simplejpeg.encode_jpeg(np.full((16, 16, 3), 90, np.uint8), colorspace="RGB")
        try:
            json.dumps(meta, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair is in no file
            meta = None
        writer.add({"id": "v", "path": "v.mp4", "captions": ["a"]}, {"000.jpg": good, "001.jpg": jpeg}, meta or {})
        shard, [sample] = writer.close()
        raw = (Path(directory) / shard.name).read_bytes()[sample.offset : sample.offset + sample.size]
        index = Index(
            directory, "train", 2, 16, "jpeg", (shard,), make_columns([replace(sample, crc32=zlib.crc32(raw))])
        )

        def work() -> tuple[int, bool]:
            out = np.full((2, 16, 16, 3), 255, np.uint8)
            out[..., 1] = 0  # no JPEG of grey pixels has this colour
            found = read_into(out, index, 0)
            return len(found["captions"]), bool(((out[..., 0] == 255) & (out[..., 1] == 0)).all())

        result = result_or_error("sample, damaged JPEG or JSON", work, directory)
    if result is not None:
        assert result[0] == 1 and not result[1]
