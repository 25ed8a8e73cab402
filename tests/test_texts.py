"""Texts that cannot be written as UTF-8 (half a surrogate pair) are refused where they enter, in one line."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from shards.foreign_tars import read_tar
from shards.shard_writer import ShardWriter
from shards.sources import read_rows
from tests.conftest import ROOT
from tests.stores import write_store
from tmass_dist.data.index import Index, make_columns
from tmass_dist.data.samples import DamagedError, read_sample
from tmass_dist.errors import UserError
from tmass_dist.evaluation.features import CAPTIONS, INDEX, load_features, read_index, write_index
from tmass_dist.retrieval.searcher import check_query
from tmass_dist.retrieval.videos import files_of

HALF = "a cat \ud800"


def _one_line(work: Callable[[], Any], *names: str) -> None:
    with pytest.raises(UserError) as error:
        work()
    line = str(error.value)
    assert "\n" not in line and all(name in line for name in names), line


@pytest.mark.parametrize("caption", [HALF, 5, None])
def test_a_caption_of_a_store_names_the_file(tmp_path: Path, caption: object) -> None:
    store = write_store(tmp_path / "features")
    rows = [json.loads(line) for line in (store / CAPTIONS).read_text().splitlines()]
    rows[3][2] = caption
    (store / CAPTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_index(store, {key: value for key, value in read_index(store).items() if key not in ("files", "version")})
    _one_line(lambda: load_features(store), str(store), f"{CAPTIONS} holds {caption!r}")


def test_an_id_of_a_store_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "features")
    about = read_index(store)
    monkeypatch.setattr("tmass_dist.evaluation.features.read_index", lambda _: about | {"video_ids": [HALF]})
    _one_line(lambda: load_features(store), str(store), f"{INDEX} holds {HALF!r}")


@pytest.mark.parametrize("caption", [b'"\\ud800  "', b"         5"])
def test_a_caption_of_a_sample_names_the_shard(tmp_path: Path, caption: bytes) -> None:
    jpeg = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8), colorspace="RGB")
    writer = ShardWriter(tmp_path / "shard-000000.tar")
    writer.add({"id": "v", "path": "v.mp4", "captions": ["a cat XX"]}, {"000.jpg": jpeg}, {})
    shard, [sample] = writer.close()
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes().replace(b'"a cat XX"', caption))
    raw = path.read_bytes()[sample.offset : sample.offset + sample.size]
    columns = make_columns([replace(sample, crc32=zlib.crc32(raw))])
    index = Index(str(tmp_path), "train", 1, 16, "jpeg", (shard,), columns)
    with pytest.raises(DamagedError, match=r"shard-000000\.tar is damaged at sample 'v': its caption .* is not a text"):
        read_sample(index, 0)


def test_a_caption_in_a_tar_file_of_others_is_a_reason(tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "k", "mp4": bytes(700), "json": json.dumps({"caption": HALF}).encode()})
    [sample] = read_tar(str(tmp_path / "x.tar"), ("caption",)).samples
    assert not sample.kind and "is not UTF-8" in (sample.reason or "")


@pytest.mark.parametrize("field", ["id", "captions", "title"])
def test_a_line_of_a_manifest_names_the_file(tmp_path: Path, field: str) -> None:
    row: dict[str, Any] = {"id": "v", "path": "v.mp4", "captions": ["a cat"], "split": "train"}
    row[field] = [HALF] if field == "captions" else HALF
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    work = lambda: read_rows("manifest", tmp_path / "m.jsonl", tmp_path, "train")  # noqa: E731
    _one_line(work, "m.jsonl", repr(row["id"]))


@pytest.mark.parametrize("caption", [HALF, 5, ["a"]])
def test_a_further_caption_names_file_and_line(tmp_path: Path, caption: object) -> None:
    jpeg = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8), colorspace="RGB")
    writer = ShardWriter(tmp_path / "shard-000000.tar")
    writer.add({"id": "v", "path": "v.mp4", "captions": ["a"]}, {"000.jpg": jpeg}, {})
    shard, samples = writer.close()
    index = Index(str(tmp_path), "train", 1, 16, "jpeg", (shard,), make_columns(samples))
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "v", "captions": ["b", caption]}) + "\n")
    _one_line(lambda: index.with_captions(more), "more.jsonl line 1", repr(caption))


def test_a_query_and_the_name_of_a_video_file(tmp_path: Path) -> None:
    _one_line(lambda: check_query(HALF), repr(HALF))
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")  # Latin-1, as old file systems have it
    shutil.copy(ROOT / "tests" / "clips" / "gradio_a.mp4", name)
    _one_line(lambda: files_of(tmp_path), repr(name), "rename")
