"""The index of a split: a damaged, hostile or old index; files of captions and quarantine read back."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from safetensors import safe_open
from safetensors.numpy import save_file

from shards.shard_writer import ShardWriter
from tmass_dist.data.index import NAME, Index, Sample, Shard, load_index, make_columns
from tmass_dist.data.index_checks import COLUMNS, ID_COLUMNS, check_columns, check_header, checksum
from tmass_dist.data.quarantine import Quarantine
from tmass_dist.data.samples import DamagedError, read_into, read_sample
from tmass_dist.errors import UserError


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A split of two shards with two samples each; the shards hold zeros."""
    samples = [Sample(f"vidéo {k}", k // 2, 2, k % 2 * 512, 512, 0) for k in range(4)]
    shards = tuple(Shard(f"shard-{k:06d}.tar", 1024, "x" * 64) for k in range(2))
    for shard in shards:
        (tmp_path / shard.name).write_bytes(bytes(shard.bytes))
    Index(str(tmp_path), "train", 12, 32, "jpeg", shards, make_columns(samples)).save()
    return tmp_path


def _contents(directory: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with safe_open(directory / NAME, framework="numpy") as file:
        columns = {name: file.get_tensor(name) for name in file.keys() if name != "sha256"}  # noqa: SIM118
        assert len(file.metadata()) == 1  # the order of several is random, and so would be the bytes of the file
        return json.loads(file.metadata()["index"]), columns


def _write(directory: Path, header: dict, columns: dict[str, np.ndarray], version: int) -> None:
    """As another program could write it: version 2 without, version 3 with the right checksum."""
    text = json.dumps(header | {"version": version})
    if version == 3:
        columns = columns | {"sha256": np.frombuffer(checksum(text, columns).encode(), np.uint8)}
    save_file(columns, directory / NAME, metadata={"index": text})


def test_every_flipped_bit_is_refused_or_changes_nothing(small: Path) -> None:
    content, expected = (small / NAME).read_bytes(), _contents(small)
    accepted = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (small / NAME).write_bytes(flipped)
        try:
            index = load_index(small)
        except UserError as error:
            assert NAME in str(error)
        else:
            accepted += 1
            assert index.ids == [f"vidéo {k}" for k in range(4)]
            assert all((index.columns[name] == expected[1][name]).all() for name in expected[1])
    assert accepted < len(content) // 50  # spaces of the JSON, at most


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 500, -1])
def test_a_truncated_index_is_one_line(small: Path, size: int) -> None:
    (small / NAME).write_bytes((small / NAME).read_bytes()[:size])
    with pytest.raises(UserError, match=f"{NAME} is damaged .*write it again"):
        load_index(small)


WRONG_COLUMNS = {
    "shard too high": ("shard", [0, 0, 1, 2]),
    "shard negative": ("shard", [0, 0, 1, -1]),
    "offset beyond the shard": ("offset", [0, 512, 0, 513]),
    "offset negative": ("offset", [0, 512, 0, -512]),
    "offset overflows": ("offset", [0, 512, 0, 2**63 - 1]),
    "size beyond the shard": ("size", [512, 512, 512, 2**40]),
    "size zero": ("size", [512, 512, 512, 0]),
    "captions negative": ("num_captions", [2, 2, 2, -2]),
    "captions many": ("num_captions", [2, 2, 2, 2**31 - 1]),
    "ids fall": ("id_end", [8, 7, 24, 32]),
    "ids cut a character": ("id_end", [4, 16, 24, 32]),
    "ids too short": ("id_end", [8, 16, 24, 31]),
    "ids too long": ("id_end", [8, 16, 24, 2**40]),
    "column short": ("size", [512, 512, 512]),
    "column of two dimensions": ("size", [[512], [512], [512], [512]]),
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("case", WRONG_COLUMNS)
def test_columns_out_of_range_are_refused(small: Path, case: str, version: int) -> None:
    header, columns = _contents(small)
    name, values = WRONG_COLUMNS[case]
    columns[name] = np.array(values, columns[name].dtype)
    _write(small, header, columns, version)
    with pytest.raises(UserError, match=rf"{NAME} is damaged \(.*(column|ids)"):
        load_index(small)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 2**31},
        {"image_size": "32"},
        {"num_frames": -1},
        {"num_frames": 2**40},
        {"store": "pickle"},
        {"split": None},
        {"shards": "shard"},
        {"shards": [{"name": "../x.tar", "bytes": 1024, "sha256": "x"}] * 2},
        {"shards": [{"name": "..", "bytes": 1024, "sha256": "x"}] * 2},
        {"shards": [{"name": "x.tar", "bytes": 1e400, "sha256": "x"}] * 2},
        {"shards": [{"name": "x.tar"}] * 2},
        {"shards": [7, 8]},
        {"shards": []},
    ],
)
def test_wrong_headers_are_refused(small: Path, change: dict) -> None:
    header, columns = _contents(small)
    _write(small, header | change, columns, 3)
    with pytest.raises(UserError, match=f"{NAME} is damaged"):
        load_index(small)


def test_a_header_that_is_no_object_or_nested_too_deep_is_refused(small: Path) -> None:
    _, columns = _contents(small)
    for text in ("[]", "7", "null", "[" * 100_000, "9" * 5000):
        save_file(columns, small / NAME, metadata={"index": text})
        with pytest.raises(UserError, match=f"{NAME} is damaged"):
            load_index(small)


def test_an_index_without_checksum_is_read_with_a_line_that_says_how_to_renew_it(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(small, *_contents(small), 2)
    with caplog.at_level(logging.WARNING):
        assert len(load_index(small)) == 4
        load_index(small)
    assert caplog.text.count("has no checksum") == 1 and "shards/make_shards.py" in caplog.text
    header, columns = _contents(small)
    _write(small, header, columns, 9)
    with pytest.raises(UserError, match=r"newer version \(9\)"):
        load_index(small)


def test_lowered_numbers_of_captions_are_refused(small: Path) -> None:
    """Even where no checksum covers the index, the captions in the shard are counted."""
    shard, sample = _packed_shard(small, [np.zeros((1, 32, 32, 3), np.uint8)] * 12, ["a", "b"])
    index = replace(load_index(small), shards=(shard,), columns=make_columns([sample]))
    assert read_sample(index, 0)[0]["captions"] == ["a", "b"]
    lowered = replace(index, columns=make_columns([replace(sample, num_captions=1)]))
    with pytest.raises(DamagedError, match="it has 2 captions and the index says 1"):
        read_sample(lowered, 0)


def _packed_shard(directory: Path, frames: list[np.ndarray], captions: list[str]) -> tuple[Shard, Sample]:
    writer = ShardWriter(directory / "packed.tar")
    jpegs = {f"{k:03d}.jpg": simplejpeg.encode_jpeg(frame[0], colorspace="RGB") for k, frame in enumerate(frames)}
    writer.add({"id": "v", "path": "v.mp4", "captions": captions}, jpegs, {})
    shard, samples = writer.close()
    return shard, samples[0]


@pytest.mark.parametrize("side", [16, 31, 33, 64])
def test_a_jpeg_of_another_size_than_the_index_says_is_damaged(small: Path, side: int) -> None:
    """A smaller picture would leave pixels of the previous video in the reused memory."""
    right, wrong = (np.full((1, s, s, 3), 200, np.uint8) for s in (32, side))
    shard, sample = _packed_shard(small, [right] * 11 + [wrong], ["a"])
    index = replace(load_index(small), shards=(shard,), columns=make_columns([sample]))
    with pytest.raises(DamagedError, match=f"{side}x{side} pixels and the index says 32x32|too small"):
        read_into(np.zeros((12, 32, 32, 3), np.uint8), index, 0)


def test_captions_and_quarantine_are_read_back_whatever_an_id_holds(small: Path, tmp_path: Path) -> None:
    line_separator = "a\u2028b"
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 100, 0.5)
    quarantine.add([(line_separator, "torn\u2028frame"), ("vidéo 1", "x")])
    quarantine.add([("vidéo 2", "y")])
    again = Quarantine(tmp_path / "quarantine.jsonl", 100, 0.5)
    assert again.reasons == {line_separator: "torn\u2028frame", "vidéo 1": "x", "vidéo 2": "y"}
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"id": "vid')  # a byte-order mark and a torn line
    again = Quarantine(path, 100, 0.5)
    assert again.unknown([("vidéo 1", "x"), ("new", "z")]) == [("new", "z")]
    again.add([("new", "z")])
    assert list(Quarantine(path, 100, 0.5).reasons) == [line_separator, "vidéo 1", "vidéo 2", "new"]
    path.write_text('{"id": 1}\n')
    with pytest.raises(UserError, match=r"quarantine\.jsonl has a line without an id"):
        Quarantine(path, 100, 0.5)
    path.write_text('{"id": "a", "rea\n{"id": "b", "reason": "c"}\n')
    with pytest.raises(UserError, match=r"quarantine\.jsonl line 1 is not a JSON object"):
        Quarantine(path, 100, 0.5)

    captions = tmp_path / "captions.jsonl"
    entry = json.dumps({"id": "vidéo 1", "captions": ["one\u2028caption"]}, ensure_ascii=False)
    captions.write_bytes(b"\xef\xbb\xbf" + f'{entry}\n\n{{"id": "vidéo 2", "capt'.encode())
    extended = load_index(small).with_captions(captions)
    assert extended.extra_captions == {"vidéo 1": ["one\u2028caption"]} and extended.num_captions.tolist() == [
        2,
        3,
        2,
        2,
    ]
    for content, message in (
        (b"\xff\n", "line 1 is not a JSON object"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b'{"id": "a", "captions": "text"}\n', "line 1 has no id"),
        (b'{"id": "a"}\n', "line 1 has no id"),
    ):
        captions.write_bytes(content)
        with pytest.raises(UserError, match=rf"captions\.jsonl {message}"):
            load_index(small).with_captions(captions)


def test_an_index_is_read_back_as_it_was_saved(small: Path) -> None:
    """Ids, places and shards, also of shards in other directories."""
    index = load_index(small)
    assert index.ids == ["vidéo 0", "vidéo 1", "vidéo 2", "vidéo 3"] == [index.id_of(k) for k in range(4)]
    assert [index.sample(k) for k in range(4)] == [
        Sample(f"vidéo {k}", k // 2, 2, k % 2 * 512, 512, 0) for k in range(4)
    ]
    assert not index.is_remote and index.shards[1] == Shard("shard-000001.tar", 1024, "x" * 64)
    elsewhere = small / "elsewhere"
    elsewhere.mkdir()
    (small / "shard-000001.tar").rename(elsewhere / "shard-000001.tar")
    replace(index, shards=(index.shards[0], replace(index.shards[1], directory=str(elsewhere)))).save()
    header, _ = _contents(small)
    assert ["directory" in shard for shard in header["shards"]] == [False, True]
    again = load_index(small)
    assert again.shards[1].directory == str(elsewhere)
    assert again.path(again.sample(3)) == elsewhere / "shard-000001.tar"
    (elsewhere / "shard-000001.tar").write_bytes(bytes(1000))
    with pytest.raises(UserError, match="has 1000 bytes and its index says 1024; index it again"):
        load_index(small)
    (elsewhere / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=f"shard {elsewhere}/shard-000001.tar is missing"):
        load_index(small)
    assert load_index(small, check_shards=False).ids == index.ids
    assert replace(index, shards=(replace(index.shards[0], directory="https://host/a"),)).is_remote
    assert replace(index, directory="https://host/a").is_remote


HEADER = {"split": "train", "num_frames": 12, "image_size": 32, "store": "jpeg"}
SHARD = {"name": "a.tar", "bytes": 5, "sha256": "x"}


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"num_frames": 0}, True),
        ({"num_frames": 4096}, True),
        ({"num_frames": 4097}, False),
        ({"image_size": 0}, False),
        ({"image_size": 1}, True),
        ({"image_size": 4096}, True),
        ({"image_size": 4097}, False),
        ({"shards": [SHARD | {"bytes": 0}]}, True),
        ({"shards": [SHARD | {"bytes": 2**62 - 1}]}, True),
        ({"shards": [SHARD | {"bytes": 2**62}]}, False),
        ({"shards": [SHARD | {"bytes": -1}]}, False),
        ({"shards": [SHARD | {"directory": "/a\0b"}]}, False),
        ({"shards": [SHARD | {"directory": 3}]}, False),
        ({"shards": [SHARD | {"directory": "/a"}]}, True),
    ],
)
def test_the_bounds_of_a_header(change: dict, valid: bool) -> None:
    if valid:
        check_header(HEADER | {"shards": [SHARD]} | change)
        return
    with pytest.raises(UserError):
        check_header(HEADER | {"shards": [SHARD]} | change)


def _columns(**changes: np.ndarray) -> dict[str, np.ndarray]:
    samples = [Sample("a", 0, 0, 0, 10, 0), Sample("b", 0, 10, 10, 10, 1)]  # no caption, and as many as fit
    return make_columns(samples) | changes


@pytest.mark.parametrize("name", [*COLUMNS, *ID_COLUMNS])
def test_a_column_of_a_smaller_type_is_refused(name: str) -> None:
    check_columns(_columns(), [20])
    smaller = _columns()[name].astype(np.bool_ if name == "id_bytes" else np.int8)
    with pytest.raises(UserError, match=f"column {name} is (int8|bool)"):
        check_columns(_columns(**{name: smaller}), [20])


def test_the_bounds_of_columns() -> None:
    samples = [Sample("a", 0, 100_000, 0, 2**20, 0)]
    check_columns(make_columns(samples), [2**20])
    with pytest.raises(UserError, match="num_captions is 100001"):
        check_columns(make_columns([replace(samples[0], num_captions=100_001)]), [2**20])
    for size in (0, 21, -1):
        with pytest.raises(UserError, match=f"column size is {size} at sample 1"):
            check_columns(_columns(size=np.array([10, size])), [20])
    with pytest.raises(UserError, match="its ids end at byte 5 of 2"):
        check_columns(_columns(id_end=np.array([1, 5])), [20])
    check_columns(make_columns([]), [])
    with pytest.raises(UserError, match="it has bytes of ids and no sample"):
        check_columns(make_columns([]) | {"id_bytes": np.zeros(2, np.uint8)}, [])
