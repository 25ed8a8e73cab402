"""Hostile arrays, weights and JSON: matrices, stored features, runs, checkpoints, exports, galleries."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.fuzz.inputs import CHANGES, OBJECTS, TEXTS, VALUES
from tests.fuzz.rule import cases, result_or_error
from tmass_dist.cli import read_json
from tmass_dist.data.quarantine import Quarantine
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.blocks import BlockFiles
from tmass_dist.evaluation.features import INDEX, load_features, load_part, read_index, save_part, write_index
from tmass_dist.evaluation.matrix import rank_matrix
from tmass_dist.evaluation.stored import StoredSplit
from tmass_dist.models.warm_start import EXPORTED_WEIGHTS as WEIGHTS
from tmass_dist.retrieval.gallery import NAME, VideoGallery
from tmass_dist.retrieval.model import TMass
from tmass_dist.training import checkpoint

Change = Callable[[bytes], bytes]


@contextlib.contextmanager
def _copy(source: Path, *changed: str) -> Iterator[Path]:
    """A directory like ``source``: files are links, but ``changed`` are copies."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / source.name
        copy.mkdir()
        for path in source.iterdir():
            if path.name in changed:
                shutil.copy(path, copy)
            else:
                (copy / path.name).symlink_to(path)
        yield copy


def _npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def _ranks(path: Path, truth: Path | None) -> list[int]:
    """The text-to-video ranks of a matrix, in the order of its rows."""
    with contextlib.redirect_stdout(io.StringIO()):
        report = rank_matrix(path, truth, "none", None)
    rank_of = {row: rank for (_, row), rank in zip(report.caption_ids, report.ranks.t2v_T.tolist())}
    return [rank_of[row] for row in sorted(rank_of)]


MATRIX = np.random.default_rng(0).random((6, 6), dtype=np.float32)


@given(
    change=CHANGES,
    kind=st.sampled_from(["float32", "float64", "float16", "int32", "complex64", "bool", "object", ">f4", "U3"]),
    shape=st.sampled_from([(6, 6), (36,), (0, 6), (6, 0), (3, 12), (1, 36), (2, 3, 6)]),
)
@cases(300)
def test_any_matrix_is_ranked_or_refused(change: Change, kind: str, shape: tuple[int, ...]) -> None:
    array = np.resize(MATRIX, shape)
    with contextlib.suppress(ValueError):
        array = array.astype(kind)
    for content in (_npy(array, allow_pickle=True), change(_npy(array, allow_pickle=True)), change(_npy(MATRIX))):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "s.npy"
            path.write_bytes(content)
            found = result_or_error("matrix (.npy)", partial(_ranks, path, None), "s.npy")
        if found is not None and content == _npy(array):
            assert found == [int((row >= row[k]).sum()) for k, row in enumerate(array)]


@given(truth=VALUES | st.lists(st.integers(-1, 6), min_size=5, max_size=7), change=CHANGES)
@cases(150)
def test_any_truth_is_used_or_refused(truth: Any, change: Change) -> None:
    content = json.dumps(truth).encode()
    with tempfile.TemporaryDirectory() as directory:
        path, ids = Path(directory) / "s.npy", Path(directory) / "truth.json"
        np.save(path, MATRIX)
        ids.write_bytes(content)
        found = result_or_error("truth of a matrix (JSON)", lambda: _ranks(path, ids), "truth.json")
        if found is not None:
            expected = [int((row >= row[owner]).sum()) for row, owner in zip(MATRIX, truth)]
            assert found == expected
        ids.write_bytes(change(content))
        result_or_error("truth, damaged", lambda: _ranks(path, ids), "truth.json")


@given(
    change=CHANGES,
    name=st.sampled_from(["index.json", "frames.npy", "texts.npy", "captions.jsonl", "head.safetensors"]),
)
@cases(250)
def test_a_damaged_store_is_refused(store: Path, change: Change, name: str) -> None:
    with _copy(store, name) as copy:
        (copy / name).write_bytes(change((store / name).read_bytes()))
        if (copy / name).read_bytes() == (store / name).read_bytes():
            return
        assert result_or_error("stored features, damaged", lambda: len(load_features(copy).captions), name) is None


@given(change=CHANGES, name=st.sampled_from(["frames.npy", "texts.npy", "captions.jsonl", "head.safetensors"]))
@cases(250)
def test_a_store_of_others_with_right_checksums_is_scored_or_refused(store: Path, change: Change, name: str) -> None:
    with _copy(store, name, INDEX) as copy:
        (copy / name).write_bytes(change((store / name).read_bytes()))
        about = read_index(copy)
        write_index(copy, about)

        def work() -> bool:
            stored = StoredSplit(copy, [])
            block_TV = next(iter(stored.scorer.scores()))
            with stored.naming():
                ranking.check_numbers(block_TV, 0)  # as every evaluation does
            return bool(torch.isfinite(block_TV).all())

        assert result_or_error("stored features of others", work, copy.name) in (None, True)


@given(
    key=st.sampled_from(["config", "video_ids", "files", "selection", "split", "checkpoint", "precision", "x"]),
    value=OBJECTS,
)
@cases(150)
def test_an_index_of_a_store_of_others_is_read_or_refused(store: Path, key: str, value: Any) -> None:
    with _copy(store, INDEX) as copy:
        content = json.dumps(read_index(copy) | {key: value})  # the same through JSON
        try:
            write_index(copy, json.loads(content))
        except UnicodeEncodeError:  # half a surrogate pair is in no file
            return
        result_or_error("index of stored features", lambda: len(StoredSplit(copy, []).scorer.blocks), copy.name)


@given(change=CHANGES)
@cases(200)
def test_a_damaged_block_of_scores_is_computed_again(store: Path, change: Change) -> None:
    with tempfile.TemporaryDirectory() as directory:
        scorer = StoredSplit(store, []).scorer
        said: list[str] = []
        files = BlockFiles(Path(directory), scorer, log=said.append)
        block_TV = next(iter(scorer.scores()))
        path = files._path(scorer.blocks[0])
        save_file({"similarity": block_TV}, path, metadata={"sha256": "0" * 64})
        path.write_bytes(change(path.read_bytes()))
        found = result_or_error("block of scores", lambda: bool(torch.equal(next(files.blocks()), block_TV)))
        assert found


@given(change=CHANGES)
@cases(150)
def test_a_damaged_part_of_an_encoding_is_made_again(change: Change) -> None:
    from tests.stores import make_part

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "part.safetensors"
        part = make_part([0, 1])
        save_part(path, part)
        path.write_bytes(change(path.read_bytes()))

        def work() -> bool:
            found = load_part(path)
            return found is None or (len(found.video_ids), len(found.captions)) == (2, 3)

        assert result_or_error("part of an encoding", work)


@given(change=CHANGES, name=st.sampled_from([WEIGHTS, "config.json"]))
@cases(200)
def test_a_damaged_export_is_loaded_alike_or_refused(export: Path, change: Change, name: str) -> None:
    with _copy(export, name) as copy:
        (copy / name).write_bytes(change((export / name).read_bytes()))
        same = (copy / name).read_bytes() == (export / name).read_bytes()

        def work() -> bool:
            model = TMass.from_pretrained(copy)
            return all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())

        found = result_or_error(f"export, {name}", work, name)
        assert found in ((True,) if same else (None, True))


@given(section=st.sampled_from(["settings", "towers", "normalisation", "trained", "x"]), value=OBJECTS)
@cases(120)
def test_a_config_of_an_export_of_others_is_read_or_refused(export: Path, section: str, value: Any) -> None:
    with _copy(export, "config.json") as copy:
        content = json.loads((export / "config.json").read_text()) | {section: value}
        (copy / "config.json").write_text(json.dumps(content))
        result_or_error("export of others, config.json", lambda: bool(TMass.from_pretrained(copy)), "config.json")


FILES = ["gallery.json", "part.json", "frames.npy", "times.npy", "jpegs"]


@given(change=CHANGES, which=st.integers(0, 20))
@cases(150)
def test_a_damaged_gallery_is_read_or_refused(gallery: Path, change: Change, which: int) -> None:
    names = sorted(path.name for path in gallery.iterdir() if path.is_file())
    name = names[which % len(names)]
    with _copy(gallery, name) as copy:
        (copy / name).write_bytes(change((gallery / name).read_bytes()))

        def work() -> int:
            opened = VideoGallery(copy)
            for row in opened.rows.values():
                opened.video(row)
            return len(opened)

        found = result_or_error("gallery, damaged", work, copy.name)
        assert found in (None, 2) or name == NAME


@given(
    content=st.binary(max_size=100) | OBJECTS.map(lambda value: json.dumps(value).encode()),
    kind=st.sampled_from([dict, list]),
)
@cases(200)
def test_a_file_that_a_run_can_do_without_is_read_or_ignored(content: bytes, kind: type) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "best.json"
        path.write_bytes(content)

        def work() -> str:
            return json.dumps(read_json(path, kind))

        found = result_or_error("best.json, validation.json", work)
        try:
            value = json.loads(content.decode())
        except (ValueError, RecursionError):
            value = None
        assert found == json.dumps(value if isinstance(value, kind) else None)


@given(rows=st.lists(st.dictionaries(st.sampled_from(["id", "reason"]), OBJECTS), max_size=4), change=CHANGES)
@cases(150)
def test_a_quarantine_is_read_alike_or_refused(rows: list[dict], change: Change) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "quarantine.jsonl"
        path.write_bytes(content)
        found = result_or_error("quarantine.jsonl", lambda: list(Quarantine(path, 10, 1.0).reasons), "quarantine.jsonl")
        if found is not None:
            assert found == list(dict.fromkeys(row["id"] for row in rows))
        path.write_bytes(change(content))
        result_or_error("quarantine.jsonl, damaged", lambda: Quarantine(path, 10, 1.0) and None, "quarantine.jsonl")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one small tensor, in two parts."""
    from tmass_dist.data.remote import sha256_of

    folder = tmp_path_factory.mktemp("run") / "step-00000003"
    folder.mkdir()
    parts = {}
    for number in range(2):
        path = folder / f"part-{number:05d}.safetensors"
        save_file({f"weight:a:{number * 4}": torch.arange(4.0) + 4 * number}, path)
        parts[path.name] = sha256_of(path)
    about = {"step": 3, "world_size": 2, "num_updates": 3, "shapes": {"a": [2, 4]}, "parts": parts}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(about | {"checksum": checkpoint.manifest_checksum(about)}))
    return folder


@given(change=CHANGES, name=st.sampled_from(["manifest.json", "part-00000.safetensors", "part-00001.safetensors"]))
@cases(200)
def test_a_damaged_checkpoint_is_recognised(saved: Path, change: Change, name: str) -> None:
    with _copy(saved, name) as copy:
        (copy / name).write_bytes(change((saved / name).read_bytes()))

        def work() -> tuple[str | None, list | None]:
            damage = checkpoint._damage(copy)
            return damage, None if damage else checkpoint.weights_of(copy)["a"].tolist()

        damage, values = result_or_error("checkpoint, damaged", work)
    assert copy.name in damage if damage else values == torch.arange(8.0).view(2, 4).tolist()


@given(key=st.sampled_from(["step", "world_size", "num_updates", "shapes", "parts", "x"]), value=OBJECTS)
@cases(150)
def test_any_manifest_is_read_or_recognised_as_damaged(saved: Path, key: str, value: Any) -> None:
    with _copy(saved, "manifest.json") as copy:
        about = json.loads((saved / "manifest.json").read_text()) | {key: value}
        del about["checksum"]
        about["checksum"] = checkpoint.manifest_checksum(about)
        (copy / "manifest.json").write_text(json.dumps(about))
        damage = result_or_error("manifest of a checkpoint", lambda: checkpoint._damage(copy) or "")
    assert damage == "" or copy.name in damage


@given(name=TEXTS)
@cases(60)
def test_weights_with_any_names_are_refused(export: Path, name: str) -> None:
    with _copy(export, WEIGHTS) as copy:
        weights = load_file(export / WEIGHTS)
        with contextlib.suppress(UnicodeEncodeError):
            save_file(weights | {name: torch.ones(1)}, copy / WEIGHTS)
            with safe_open(copy / WEIGHTS, "pt") as file:
                assert name in set(file.keys())
            assert (
                result_or_error("export, model.safetensors", lambda: bool(TMass.from_pretrained(copy)), WEIGHTS) is None
            )
