"""A full disk: one line that names the file, no half of a file under its name, and nothing left beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shards.shard_writer import ShardWriter
from tests.stores import make_part, write_store
from tmass_dist.cli import replacing, write_json, write_text, writing
from tmass_dist.data.quarantine import Quarantine
from tmass_dist.errors import MachineError
from tmass_dist.evaluation.evaluation import evaluate_store
from tmass_dist.evaluation.features import StoreWriter, merge
from tmass_dist.evaluation.search import FrameIndex
from tmass_dist.evaluation.stored import StoredSplit
from tmass_dist.retrieval.build import write_part


def _let_be_full(path: Path) -> None:
    """What is written to ``path`` meets a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")


def _frame_index() -> FrameIndex:
    index = FrameIndex(2, 8)
    index.add(np.arange(300), np.random.default_rng(0).random((300, 2, 8), dtype=np.float32))
    return index


REPLACED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "text": ("f", lambda path: write_text(path, "x" * 10_000)),
    "json": ("f", lambda path: write_json(path, list(range(10_000)))),
    "quarantine": ("f", lambda path: Quarantine(path, 100, 1.0).add([("v", "damaged")])),
    "index of frames": ("f", lambda path: _frame_index().save(path)),
    "report": (
        "report.html",
        lambda path: evaluate_store(StoredSplit(write_store(path.parent.parent / "store"), []), path.parent),
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_stays_as_it_was(tmp_path: Path, name: str) -> None:
    file, write = REPLACED[name]
    path = tmp_path / "out" / file
    _let_be_full(path.with_name(f"{path.name}.tmp"))
    before = '{"id": "u", "reason": "torn"}\n'
    path.write_text(before)
    with pytest.raises(MachineError, match=f"^cannot write {path}: ") as error:
        write(path)
    assert "\n" not in str(error.value)
    assert path.read_text() == before and not list(tmp_path.rglob("*.tmp"))


def test_other_errors_keep_their_kind_and_remove_the_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replacing(tmp_path / "x", ".3") as temporary:
        assert temporary.name == "x.3.tmp"
        temporary.touch()
        raise KeyError("not of writing")
    with pytest.raises(FileNotFoundError):  # it names its file itself
        write_text(tmp_path / "no" / "x", "")
    assert not list(tmp_path.iterdir())


def test_errors_of_libraries_name_the_file(tmp_path: Path) -> None:
    for write in (
        lambda: save_file({"x": torch.zeros(1)}, "/dev/null/x"),
        lambda: torch.save(torch.zeros(1), "/dev/full"),
    ):
        with pytest.raises(MachineError, match=f"^cannot write {tmp_path}/x: "), writing(tmp_path / "x"):
            write()


@pytest.mark.parametrize("file", ["frames.npy", "jpegs"])
def test_a_part_of_a_gallery(tmp_path: Path, file: str) -> None:
    _let_be_full(tmp_path / f"part-0.{file}")
    frames_VFD, times_VF = np.zeros((1, 2, 4096), np.float16), np.zeros((1, 2), np.float32)
    video = {"id": "a", "path": "a.mp4", "seconds": 1.0, "state": []}
    with pytest.raises(MachineError, match=f"^cannot write {tmp_path}/part-0.{file}: "):
        write_part(tmp_path, "part-0", [video], [], frames_VFD, times_VF, [b"x" * 9999, b"y"])
    assert not (tmp_path / "part-0.json").exists()


def test_a_shard(tmp_path: Path) -> None:
    _let_be_full(tmp_path / "shard-000000.tar.tmp")
    writer = ShardWriter(tmp_path / "shard-000000.tar")
    with pytest.raises(MachineError, match=f"^cannot write {tmp_path}/shard-000000.tar: No space left"):
        for number in range(20):
            writer.add({"id": f"v{number}", "path": "v", "captions": ["a"]}, {"000.jpg": bytes(9999)}, {})
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_the_space_of_stored_features_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, the process would end with SIGBUS when the memory-mapped file is filled."""
    reserved: list[int] = []

    def allocate(file: int, start: int, size: int) -> None:
        reserved.append(size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", allocate)
    with pytest.raises(MachineError, match=f"^cannot write {tmp_path}/frames.npy: No space left on device$"):
        StoreWriter(tmp_path, ["a", "b"], (3, 8), "float32")
    assert reserved == [(tmp_path / "frames.npy").stat().st_size] and reserved[0] > 2 * 3 * 8 * 4


@pytest.mark.parametrize("file", ["texts.npy", "captions.jsonl"])
def test_other_files_of_stored_features(tmp_path: Path, file: str) -> None:
    _let_be_full(tmp_path / file)
    part = make_part([0])
    writer = StoreWriter(tmp_path, ["v0"], tuple(part.frames_VFD.shape[1:]), "float32")
    with pytest.raises(MachineError, match=f"^cannot write {tmp_path}/{file}: "):
        writer.add(merge([part], ["v0"]))
        writer.finish({"x": torch.zeros(100_000)}, {})
    assert not (tmp_path / "index.json").exists()
