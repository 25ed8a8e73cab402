"""Hostile input through the command line: the exit code, and one line that names the file."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.inputs import CHANGES, OBJECTS, TEXTS
from tests.fuzz.rule import cases, command_or_error
from tests.fuzz.test_stores import MATRIX, _copy, _npy
from tmass_dist.data.index import NAME, load_index
from tmass_dist.errors import UserError

Change = Callable[[bytes], bytes]


@given(change=CHANGES)
@cases(50)
def test_evaluate_a_matrix(change: Change) -> None:
    content = change(_npy(MATRIX))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "s.npy"
        path.write_bytes(content)
        done = command_or_error("command: evaluate a matrix", ["evaluate", "--similarities", str(path)], "s.npy")
        if done is not None:
            matrix = np.load(path)
            recall = 100 * np.mean([(row >= row[k]).sum() == 1 for k, row in enumerate(matrix)])
            assert f"{recall:.1f}" in done.out


@given(
    change=CHANGES,
    name=st.sampled_from(["index.json", "frames.npy", "texts.npy", "captions.jsonl", "head.safetensors"]),
)
@cases(50)
def test_evaluate_stored_features(store: Path, change: Change, name: str) -> None:
    with _copy(store, name) as copy:
        (copy / name).write_bytes(change((store / name).read_bytes()))
        same = (copy / name).read_bytes() == (store / name).read_bytes()
        arguments = ["evaluate", "--features", str(copy), "--out", str(copy.parent / "out")]
        done = command_or_error("command: evaluate features", arguments, name)
        assert (done is not None) == same


@given(change=CHANGES, which=st.sampled_from(["index.safetensors", "shard-000000.tar", "shard-000001.tar"]))
@cases(60)
def test_verify_shards(split: Path, change: Change, which: str) -> None:
    with _copy(split, which) as copy:
        (copy / which).write_bytes(change((split / which).read_bytes()))
        same = (copy / which).read_bytes() == (split / which).read_bytes()
        done = command_or_error("command: verify", ["verify", str(copy)], copy.name if which == NAME else which)
        if done is not None and not same:
            with contextlib.suppress(UserError):  # the header of the index may be spelled otherwise
                assert which == NAME and load_index(copy).ids == load_index(split).ids


@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["id", "path", "captions", "split", "start", "end"]), OBJECTS), max_size=3
    )
)
@cases(30)
def test_pack_a_manifest(rows: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "manifest.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = [
            "pack",
            "--source",
            "manifest",
            "--annotations",
            str(path),
            "--videos",
            directory,
            "--split",
            "train",
        ]
        arguments += ["--out", f"{directory}/out", "--workers", "1"]
        assert command_or_error("command: pack", arguments, directory) is None  # there is no video


@given(change=CHANGES)
@cases(40)
def test_index_tar_files_of_others(change: Change) -> None:
    from tests.fuzz.test_media import _tar

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.tar"
        path.write_bytes(change(_tar()))
        arguments = ["index-shards", str(path), "--out", f"{directory}/out", "--max-bad", "1"]
        done = command_or_error("command: index-shards", arguments, "x.tar")
        if done is not None:
            assert set(load_index(f"{directory}/out").ids) <= {"k0", "k1", "k2"} or path.read_bytes() != _tar()


@given(
    text=TEXTS | st.text(max_size=30),
    name=st.sampled_from(["config", "train", "status", "compare", "search", "index", ""]),
)
@cases(40)
def test_any_argument(text: str, name: str) -> None:
    if name == "train" and text in ("", "-h", "--help"):
        return
    text = text.replace("\0", "").encode("utf-8", "replace").decode()
    with tempfile.TemporaryDirectory() as directory:
        arguments = {
            "train": ["train", "--config", "demo.yaml", f"run_dir={directory}", f"data.train={directory}/none", text],
            "status": ["status", f"{directory}/{text}"],
            "compare": ["compare", f"{directory}/{text}", f"{directory}/b"],
            "search": ["search", f"{directory}/none", text],
            "index": ["index", f"{directory}/none", "--videos", directory, "--out", f"{directory}/{text}"],
            "config": ["config", text or "optim"],
            "": [text or "nothing"],
        }[name]
        if text.startswith("-") and name != "train":
            return  # argparse's own errors have its form
        command_or_error("command: any argument", arguments)


@given(change=CHANGES, which=st.sampled_from(["config.json", "model.safetensors"]))
@cases(20, least=2)
def test_index_videos_with_an_export(export: Path, change: Change, which: str) -> None:
    with _copy(export, which) as copy:
        (copy / which).write_bytes(change((export / which).read_bytes()))
        same = (copy / which).read_bytes() == (export / which).read_bytes()
        videos = copy.parent / "videos"
        videos.mkdir()
        shutil.copy(Path(__file__).parents[1] / "clips" / "gradio_a.mp4", videos)
        arguments = ["index", str(copy), "--videos", str(videos), "--out", str(copy.parent / "gallery")]
        done = command_or_error("command: index", arguments, which)
        assert (done is not None) == same


@given(content=st.binary(max_size=60) | OBJECTS.map(lambda value: json.dumps(value).encode()))
@cases(10, least=1)
def test_train_with_any_config_file_in_a_new_process(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "page.yaml"
        path.write_bytes(content)
        arguments: list[Any] = [
            "train",
            "--config",
            str(path),
            f"run_dir={directory}/run",
            f"data.train={directory}/none",
        ]
        arguments.append("model.pretrained=null")  # weights that are not there would be named first
        form = "command: train, new process"
        assert command_or_error(form, arguments, directory, new_process=True) is None
