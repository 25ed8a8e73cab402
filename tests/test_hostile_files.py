"""Files that once ended in a traceback, one test each; most were found by the random cases of ``tests/fuzz``."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards.foreign_tars import common_kind, read_tar
from tests.test_evaluation import write_store
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
