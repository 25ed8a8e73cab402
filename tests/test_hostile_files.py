"""Files that once ended in a traceback, one test each; most were found by the random cases of ``tests/fuzz``."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards.foreign_tars import common_kind, read_tar
from tests.stores import write_store
from tmass_dist.cli import printable
from tmass_dist.errors import UserError
from tmass_dist.evaluation.arrays import map_array
from tmass_dist.evaluation.evaluation import evaluate_store
from tmass_dist.evaluation.features import read_index, write_index
from tmass_dist.evaluation.matrix import rank_matrix
from tmass_dist.evaluation.stored import StoredSplit
from tmass_dist.evaluation.two_stage import search_store
from tmass_dist.retrieval.gallery import NAME, VideoGallery

MATRIX = np.random.default_rng(0).random((6, 6), dtype=np.float32)


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"(6, 6), }", b"(6, 6), ("), (b"<f4", b"|O "), (b"(6, 6)", b"(9, 9)"), (b"NUMPY", b"PY   "), (b"6, 6", b"6, x")],
)
def test_a_damaged_header_of_a_matrix_is_one_line(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "s.npy"
    np.save(path, MATRIX)
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after))
    with pytest.raises(UserError, match=r"s\.npy is not a matrix of numbers") as error:
        map_array(path)
    assert "\n" not in str(error.value)


def test_an_archive_of_arrays_is_no_matrix(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", MATRIX)
    with pytest.raises(UserError, match="it is an archive"):
        map_array(tmp_path / "s.npz")


@pytest.mark.parametrize("kind", [">f4", "<f8", ">f2"])
def test_a_matrix_in_any_byte_order_has_the_same_ranks(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "s.npy", MATRIX.astype(kind))
    expected = [int((row >= row[k]).sum()) for k, row in enumerate(MATRIX.astype(kind))]
    assert rank_matrix(tmp_path / "s.npy", None, "none", None).ranks.t2v_T.tolist() == expected
    np.save(tmp_path / "s.npy", MATRIX.astype(np.longdouble))
    with pytest.raises(UserError, match="wanted: floats"):
        rank_matrix(tmp_path / "s.npy", None, "none", None)


ABOUT = {
    "version": 1,
    "num_frames": 2,
    "width": 4,
    "fingerprint": "f",
    "model": "m",
    "removed": [],
    "parts": ["part-0"],
}
ABOUT |= {"removed": [], "parts": ["part-0"], "index": {"file": "i", "bytes": 1, "sha256": "x"}}
PART = {"videos": [{"id": "a", "path": "a.mp4", "seconds": 1.0}], "failed": [], "files": {}}
GALLERIES: dict[str, tuple[object, object]] = {
    "not UTF-8": (b"\xfb{}", PART),
    "a list": ([], PART),
    "version is text": (ABOUT | {"version": "1"}, PART),
    "frames are text": (ABOUT | {"num_frames": "two"}, PART),
    "index is a list": (ABOUT | {"index": []}, PART),
    "rows are text": (ABOUT | {"removed": ["0"]}, PART),
    "parts are numbers": (ABOUT | {"parts": [1]}, PART),
    "part not UTF-8": (ABOUT, b"\xfb"),
    "part is a list": (ABOUT, []),
    "videos are texts": (ABOUT, PART | {"videos": ["a"]}),
    "a video has no id": (ABOUT, PART | {"videos": [{"path": "a.mp4", "seconds": 1}]}),
    "seconds are text": (ABOUT, PART | {"videos": [{"id": "a", "path": "a", "seconds": "long"}]}),
    "files are a list": (ABOUT, PART | {"files": [1]}),
    "a file has no size": (ABOUT, PART | {"files": {"a": {}}}),
}


@pytest.mark.parametrize("name", GALLERIES)
def test_a_damaged_gallery_is_one_line(tmp_path: Path, name: str) -> None:
    for file, content in zip((NAME, "part-0.json"), GALLERIES[name]):
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError, match=r"(gallery|part-0)\.json is (missing or )?damaged .*tmass index"):
        VideoGallery(tmp_path)


def test_empty_tar_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    with pytest.raises(UserError, match=rf"first reason: {tmp_path}/x\.tar is empty"):
        common_kind([read_tar(str(tmp_path / "x.tar"), ("txt",))])


def test_a_matrix_with_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    matrix = MATRIX.copy()
    matrix[2, 3] = np.nan
    np.save(tmp_path / "s.npy", matrix)
    with pytest.raises(UserError, match=r"s\.npy: 1 texts have a similarity that is not a number; .* \[2\]"):
        rank_matrix(tmp_path / "s.npy", None, "none", None)


@pytest.mark.parametrize("candidates", [None, 5])
def test_a_store_whose_scores_are_no_numbers_is_named(tmp_path: Path, candidates: int | None) -> None:
    """A feature so large that its square is infinite: a comparison with NaN would give the text the rank 0."""
    store = write_store(tmp_path / "features")
    texts = np.load(store / "texts.npy")
    texts[28] = 3e38
    np.save(store / "texts.npy", texts)
    write_index(store, {key: value for key, value in read_index(store).items() if key not in ("files", "version")})
    stored = StoredSplit(store, [])
    with pytest.raises(UserError, match=rf"^{store}: .*not a number.*\[28\]$"):
        if candidates is None:
            evaluate_store(stored, tmp_path)
        else:
            search_store(stored, tmp_path, candidates, compare_exact=False)


def _gallery(directory: Path, **about: object) -> Path:
    """A gallery of one video, with changes of ``gallery.json`` or, as ``part``, of its part's."""
    from tmass_dist.evaluation.search import FrameIndex
    from tmass_dist.retrieval import build

    directory.mkdir()
    frames_VFD = np.random.default_rng(0).random((1, 2, 8), dtype=np.float32).astype(np.float16)
    video = {"id": "a", "path": "a.mp4", "seconds": 1.0, "state": []}
    part = about.pop("part", {})
    build.write_part(directory, "part-0", [video], [], frames_VFD, np.zeros((1, 2), np.float32), [b"x", b"y"])
    if isinstance(part, dict):
        written = json.loads((directory / "part-0.json").read_text())
        written["videos"][0] |= part.pop("video", {})
        (directory / "part-0.json").write_text(json.dumps(written | part))
    index = FrameIndex(2, 8)
    index.add(np.arange(1), frames_VFD)
    path = directory / "frames-000000.usearch"
    index.save(path)
    file = {"file": path.name, "bytes": path.stat().st_size, "sha256": ""}
    written = {"version": 1, "model": "m", "fingerprint": "f", "num_frames": 2, "width": 8, "removed": []}
    written |= {"parts": ["part-0"], "index": file | about.pop("index", {})}  # type: ignore[operator]
    (directory / NAME).write_text(json.dumps(written | about))
    return directory


HOSTILE: list[dict] = [
    {"index": {"file": "../frames-000000.usearch"}},  # an update would delete it
    {"index": {"file": "/etc/frames-000000.usearch"}},
    {"index": {"file": "gallery.json"}},
    {"parts": ["../part-0"]},
    {"parts": ["part-0", "part-0"]},
    {"parts": ["part-0\n"]},
    {"removed": [-1]},
    {"removed": [1]},
    {"removed": [True]},
    {"num_frames": 0},
    {"num_frames": 3},
    {"num_frames": 10**9},
    {"width": -8},
    {"width": 7},
    {"fingerprint": 5},
    {"model": "\ud800"},
    {"version": None},
    {"part": {"video": {"id": 5}}},
    {"part": {"video": {"id": "\ud800"}}},
    {"part": {"video": {"path": 7}}},
    {"part": {"video": {"path": "a\0b"}}},
    {"part": {"video": {"seconds": float("inf")}}},
    {"part": {"videos": []}},
    {"part": {"videos": [{"id": "a", "path": "a", "seconds": 1, "state": []}] * 2}},
    {"part": {"videos": [{"id": "a", "path": "a", "seconds": 1}]}},
    {"part": {"failed": [5]}},
    {"part": {"failed": [{"id": "b"}]}},
    {"part": {"files": {"../x": {"bytes": 1, "sha256": ""}}}},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_a_gallery_of_others_stays_in_its_directory_and_is_consistent(tmp_path: Path, change: dict) -> None:
    assert len(VideoGallery(_gallery(tmp_path / "good"))) == 1
    with pytest.raises(UserError, match="damaged") as error:
        VideoGallery(_gallery(tmp_path / "bad", **change))
    assert str(tmp_path / "bad") in str(error.value) and "\n" not in str(error.value)


def test_control_characters_of_names_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\nc é 猫 \ud800") == "a\\x1b[31mb\\nc é 猫 \\ud800"
