"""WebDataset tar files that other programs wrote: indexed where they are, trained on, and packed anew."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import webdataset as wds
from webdataset.tariterators import base_plus_ext

from tests.conftest import run
from tests.faulty_server import FaultyServer
from tests.loaders import global_batches, make_loaders
from tests.videos import write_greys
from tmass_dist.data.foreign import members_of
from tmass_dist.data.index import load_index
from tmass_dist.data.mixture import make_mixture
from tmass_dist.data.samples import DamagedError, read_into, read_sample
from tmass_dist.data.tars import scan_tar, split_name
from tmass_dist.errors import UserError


def _clip(directory: Path, grey: int) -> bytes:
    path = directory / "clip.mp4"
    write_greys(path, [grey] * 20)
    return path.read_bytes()


def _grey(number: int) -> int:
    return 20 + 20 * number


@pytest.fixture(scope="module")
def clip_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tar files with five clips each, as video2dataset writes them (TarWriter's times need pax headers)."""
    directory = tmp_path_factory.mktemp("clips")
    for shard in range(2):
        with wds.TarWriter(str(directory / f"{shard:05d}.tar")) as writer:
            for k in range(5 * shard, 5 * shard + 5):
                fields = {"caption": f"caption {k}", "alt": [f"first {k}", f"second {k}"], "duration": 2.0}
                sample = {"mp4": _clip(directory, _grey(k)), "txt": f"text {k}, of a clip\n", "json": fields}
                writer.write({"__key__": f"{shard:05d}{k:04d}", **sample})
    (directory / "clip.mp4").unlink()
    return directory


@pytest.fixture(scope="module")
def frame_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar file with four videos of ten numbered frames, 80 x 60 pixels, that are brighter with time."""
    directory = tmp_path_factory.mktemp("frames")
    with wds.TarWriter(str(directory / "a.tar")) as writer:
        for k in range(4):
            pictures = [np.full((60, 80, 3), 40 * k + 4 * n, np.uint8) for n in range(10)]
            frames = {f"{n}.jpg": simplejpeg.encode_jpeg(picture) for n, picture in enumerate(pictures)}
            writer.write({"__key__": f"dir/v{k}", "txt": f"text {k}", **frames})
    return directory


def _index(tars: str, out: Path, *more: str) -> Any:
    return run("shards/index_shards.py", tars, "--out", str(out), "--image-size", "32", *more)


def test_clips_are_read_where_they_are(clip_tars: Path, tmp_path: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in clip_tars.iterdir())
    done = _index(f"{clip_tars}/{{00000..00001}}.tar", tmp_path / "out", "--split", "train")
    assert done.returncode == 0, done.stderr
    assert "10 clips, 10 captions, 2 tar files, 0 left out" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.safetensors", "quarantine.jsonl"]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in clip_tars.iterdir()) == before
    index = load_index(tmp_path / "out")
    frames = np.zeros((12, 32, 32, 3), np.uint8)
    for number in range(10):
        meta = read_into(frames, index, number, (lambda _: np.random.default_rng(0)) if number % 2 else None)
        assert meta["captions"] == [f"text {number}, of a clip"] and meta["source"].endswith(f"{number:04d}.mp4")
        assert abs(frames.mean() - _grey(number)) < 4
    assert run("shards/verify_shards.py", str(tmp_path / "out")).returncode == 0
    sheet = run("shards/inspect_shards.py", str(tmp_path / "out"), "--out", str(tmp_path / "sheet.png"))
    assert sheet.returncode == 0, sheet.stderr


def test_captions_come_from_keys_of_the_json(clip_tars: Path, tmp_path: Path) -> None:
    assert _index(f"{clip_tars}/*.tar", tmp_path, "--captions", "caption,alt").returncode == 0
    index = load_index(tmp_path)
    assert index.num_captions.tolist() == [3] * 10
    assert read_sample(index, 7)[0]["captions"] == ["caption 7", "first 7", "second 7"]
    done = _index(f"{clip_tars}/*.tar", tmp_path, "--captions", "label")
    assert done.returncode == 2 and "00000.tar: 000000000: no caption under label" in done.stderr


def test_numbered_frames_are_resized_in_training(frame_tars: Path, tmp_path: Path) -> None:
    done = _index(f"{frame_tars}/a.tar", tmp_path)
    assert done.returncode == 0 and "4 videos of numbered frames" in done.stdout, done.stderr
    index = load_index(tmp_path)
    assert index.ids == [f"dir/v{k}" for k in range(4)]
    frames = np.zeros((10, 32, 32, 3), np.uint8)
    read_into(frames, index, 2)
    assert np.abs(frames.mean(axis=(1, 2, 3)) - (80 + 4 * np.arange(10))).max() < 3  # 10 is after 9, not after 1


def test_foreign_tars_train_in_two_commands(clip_tars: Path, data: list[str], tmp_path: Path) -> None:
    """As docs/data.md says."""
    assert _index(f"{clip_tars}/{{00000..00001}}.tar", tmp_path / "train").returncode == 0
    overrides = [o for o in data if not o.startswith("data.train=")]
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *overrides, f"data.train={tmp_path / 'train'}"]
    done = run(*command, f"run_dir={tmp_path / 'run'}", "max_steps=2", "eval_every=2", "data.batch_size=4")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_own_shards_and_foreign_clips_in_one_mixture(clip_tars: Path, data: list[str], tmp_path: Path) -> None:
    assert _index(f"{clip_tars}/*.tar", tmp_path / "foreign" / "train").returncode == 0
    own = next(o for o in data if o.startswith("data.train=")).removeprefix("data.train=")
    paths = [own, str(tmp_path / "foreign" / "train")]
    mixture = make_mixture([load_index(path) for path in paths], [1, 4])
    steps = [
        global_batches(make_loaders(mixture, ranks, train=paths, order="streaming", lanes=2, batch_size=4), 0, 6)
        for ranks in (1, 2)
    ]
    for (one,), two in zip(*steps):
        assert one.video_ids == two[0].video_ids + two[1].video_ids and set(one.parts) <= {0, 1}
        assert torch.equal(one.pixels_BFHWC, torch.cat([batch.pixels_BFHWC for batch in two]))
    assert {part for (batch,) in steps[0] for part in batch.parts} == {0, 1}


@pytest.mark.parametrize("kind", ["clip", "jpeg"])
def test_foreign_tars_are_packed_anew(clip_tars: Path, frame_tars: Path, tmp_path: Path, kind: str) -> None:
    """And what we packed, webdataset reads: both ways."""
    tars = clip_tars if kind == "clip" else frame_tars
    command = ["shards/make_shards.py", "--source", "webdataset", "--videos", f"{tars}/*.tar", "--split", "train"]
    done = run(*command, "--out", str(tmp_path), "--image-size", "32", "--shard-size", "4", "--workers", "1")
    assert done.returncode == 0, done.stderr
    index = load_index(tmp_path)
    assert len(index) == (10 if kind == "clip" else 4) and index.num_frames == 12 and not index.caption_keys
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [sample["json"]["id"] for sample in samples] == index.ids
    for number, sample in enumerate(samples):
        assert sample["json"]["captions"] == [f"text {number}, of a clip" if kind == "clip" else f"text {number}"]
        expected = _grey(number) if kind == "clip" else 40 * number + 18
        assert abs(np.mean([sample[f"{k:03d}.jpg"] for k in range(12)]) - expected) < 6


def test_a_clip_is_kept_when_it_is_packed_anew(clip_tars: Path, tmp_path: Path) -> None:
    command = ["shards/make_shards.py", "--source", "webdataset", "--videos", f"{clip_tars}/*.tar", "--split", "train"]
    done = run(*command, "--captions", "alt", "--out", str(tmp_path), "--store", "clip", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert _index(f"{clip_tars}/*.tar", tmp_path / "foreign").returncode == 0
    packed, foreign = load_index(tmp_path), load_index(tmp_path / "foreign")
    for number in range(10):
        meta, payload = read_sample(packed, number)
        assert payload == read_sample(foreign, number)[1] and meta["captions"] == [
            f"first {number}",
            f"second {number}",
        ]


def test_tars_behind_a_url(clip_tars: Path, tmp_path: Path) -> None:
    server = FaultyServer(clip_tars)
    try:
        tars, cache = f"{server.url}/{{00000..00001}}.tar", tmp_path / "cache"
        assert _index(tars, tmp_path / "without", "--split", "train").returncode == 0
        done = _index(tars, tmp_path / "with", "--split", "train", "--cache", str(cache))
        assert done.returncode == 0, done.stderr
        files = [tmp_path / name / "index.safetensors" for name in ("with", "without")]
        assert files[0].read_bytes() == files[1].read_bytes()
        with pytest.raises(UserError, match=r"data\.cache"):
            read_sample(load_index(tmp_path / "with"), 0)
        index = load_index(tmp_path / "with", str(cache))
        downloads = server.requests["00000.tar"]
        assert index.is_remote and read_sample(index, 3)[0]["captions"] == ["text 3, of a clip"]
        assert server.requests["00000.tar"] == downloads  # the download of the indexing is used
    finally:
        server.close()


def _add(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, "../../evil" if kind in b"12" else ""
    tar.addfile(info, io.BytesIO(content))


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            _add(tar, name, content)


def test_what_cannot_be_used_is_listed(clip_tars: Path, tmp_path: Path) -> None:
    clip = _clip(tmp_path, 100)
    members = {"a.mp4": clip, "a.txt": b"good", "b.mp4": clip, "c.txt": b"no clip", "d.mp4": clip, "d.txt": b"  "}
    members |= {"e.mp4": clip, "e.txt": b"\xff", "f.0.jpg": b"x", "f.txt": b"a frame", "README": b"no sample"}
    _tar(tmp_path / "x.tar", members)
    whole = (clip_tars / "00000.tar").read_bytes()
    (tmp_path / "torn.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    done = _index(f"{tmp_path}/{{x,torn,text}}.tar", tmp_path / "out")
    assert done.returncode == 2 and "2 of 3 files and 5 of 6 samples are left out" in done.stderr
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"] for entry in listed}
    assert set(reasons) == {"b", "c", "d", "e", "f", "torn", "text"}
    assert "no caption" in reasons["b"] and "no clip" in reasons["c"] and "no caption" in reasons["d"]
    assert "most samples a clip" in reasons["f"] and "torn.tar is not a whole" in reasons["torn"]
    done = _index(f"{tmp_path}/{{x,torn,text}}.tar", tmp_path / "out", "--max-bad", "0.9")
    assert done.returncode == 0 and load_index(tmp_path / "out").ids == ["a"]


def test_keys_that_occur_in_several_files_get_the_names_of_the_files(clip_tars: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        os.link(clip_tars / "00000.tar", tmp_path / f"{name}.tar")
    assert _index(f"{tmp_path}/{{x,y}}.tar", tmp_path / "out").returncode == 0
    index = load_index(tmp_path / "out")
    assert index.ids == [f"{name}/00000{k:04d}" for name in "xy" for k in range(5)]
    assert read_sample(index, 7)[0]["captions"] == ["text 2, of a clip"]


def test_files_of_the_same_name_in_several_directories_have_different_ids(clip_tars: Path, tmp_path: Path) -> None:
    """As two runs of video2dataset leave them."""
    for name in ("run1", "run2"):
        (tmp_path / name).mkdir()
        os.link(clip_tars / "00000.tar", tmp_path / name / "00000.tar")
    assert _index(f"{tmp_path}/{{run1,run2}}/00000.tar", tmp_path / "out").returncode == 0
    index = load_index(tmp_path / "out")
    assert index.ids == [f"run{n}/00000/00000{k:04d}" for n in (1, 2) for k in range(5)]
    assert read_sample(index, 7)[0]["captions"] == ["text 2, of a clip"]


def test_a_key_that_a_file_uses_twice_is_used_once(tmp_path: Path) -> None:
    clip = _clip(tmp_path, 100)
    (tmp_path / "clip.mp4").unlink()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, text in (("k", b"first"), ("m", b"other"), ("k", b"second")):
            for suffix, content in (("mp4", clip), ("txt", text)):
                _add(tar, f"{key}.{suffix}", content)
    done = _index(f"{tmp_path}/a.tar", tmp_path / "out", "--max-bad", "1")
    assert done.returncode == 0 and load_index(tmp_path / "out").ids == ["k", "m"], done.stderr
    assert "another sample of the file has the same key" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    command = ["shards/make_shards.py", "--source", "webdataset", "--videos", f"{tmp_path}/a.tar", "--split", "train"]
    done = run(*command, "--out", str(tmp_path / "packed"), "--image-size", "32", "--max-bad", "1", "--workers", "1")
    assert done.returncode == 0 and load_index(tmp_path / "packed").ids == ["k", "m"], done.stderr
    assert '"k at byte ' in (tmp_path / "packed" / "quarantine.jsonl").read_text()


def _header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, pax: dict[str, str] | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.pax_headers = kind, size, pax or {}
    return info.tobuf(format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def _negative_size(header: bytes) -> bytes:
    changed = bytearray(header)
    changed[124:136] = b"\xff" * 11 + b"\x00"  # -256 in base 256
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


HOSTILE = {
    "nothing": b"",
    "not a tar": b"no tar at all" * 100,
    "larger than any disk": _header("a.mp4", size=2**62),
    "larger than an offset": _header("a.mp4", size=10, pax={"size": str(2**70)}),
    "pax size is no number": _header("a.mp4", size=10, pax={"size": "x"}),
    "pax header of a terabyte": _header("a", tarfile.XHDTYPE, 2**40),
    "pax header of a megabyte": _header("a", tarfile.XHDTYPE, 2**20) + b"1" * 2**20,
    "long name of 2^62 bytes": _header("a", tarfile.GNUTYPE_LONGNAME, 2**62),
    "negative size": _negative_size(_header("a.mp4")),
    "negative pax header": _negative_size(_header("a", tarfile.XHDTYPE)),
    "negative long name": _negative_size(_header("a", tarfile.GNUTYPE_LONGNAME)),
    "negative directory": _negative_size(_header("a", tarfile.DIRTYPE)) + _negative_size(_header("b", b"Z")),
    "headers of headers": _header("a", tarfile.XHDTYPE, 0) * 5000,
    "pax header that is slow to parse": _header("a", tarfile.XHDTYPE, 2**14) + b"9" * 2**14 + _header("a.mp4"),
    "sparse": _header("a.mp4", tarfile.GNUTYPE_SPARSE, 10),
    "sparse of pax": _header("a.mp4", pax={"GNU.sparse.size": "9" * 12, "GNU.sparse.map": "0,1"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_left_out(clip_tars: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.tar").write_bytes(HOSTILE[name] + bytes(10240) if HOSTILE[name] else b"")
    os.link(clip_tars / "00000.tar", tmp_path / "good.tar")
    done = _index(f"{tmp_path}/*.tar", tmp_path / "out", "--max-bad", "0.5")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(load_index(tmp_path / "out")) == 5
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    (entry,) = listed
    assert (entry["id"] == "bad" and "bad.tar" in entry["reason"]) or entry["reason"] == "no caption under txt"
    with pytest.raises(UserError, match=r"no tar members|has the member"):  # where an index points at it
        members_of(HOSTILE[name] or b"x", "a/good")


def test_names_and_members_of_a_hostile_tar_are_data_only(tmp_path: Path) -> None:
    """Names are ids, never paths; links and devices belong to no sample."""
    clip = _clip(tmp_path, 100)
    (tmp_path / "clip.mp4").unlink()
    names = [
        "../../evil",
        "/etc/passwd",
        "日本語",
        "emoji🎥",
        "a b",
        "line\nbreak",
        "<script>alert(1)</script>",
        "n" * 300,
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            _add(tar, f"{name}.mp4", clip)
            _add(tar, f"{name}.txt", b"a caption")
            _add(tar, f"{name}.json", b"")
        for name, kind in (
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("f", tarfile.FIFOTYPE),
            ("c", tarfile.CHRTYPE),
        ):
            _add(tar, f"{name}.mp4", b"", kind=kind)
            _add(tar, f"{name}.txt", b"a caption")
        _add(tar, "no_caption.mp4", clip)
    done = _index(f"{tmp_path}/a.tar", tmp_path / "out", "--max-bad", "1")
    assert done.returncode == 0, done.stderr
    index = load_index(tmp_path / "out")
    listed = [json.loads(line)["id"] for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert index.ids == names and sorted(listed) == ["c", "f", "h", "no_caption", "s"]
    frames = np.zeros((12, 32, 32, 3), np.uint8)
    for number in range(len(names)):
        assert read_into(frames, index, number)["captions"] == ["a caption"] and abs(frames.mean() - 100) < 4
    done = _index(f"{tmp_path}/a.tar", tmp_path / "json", "--captions", "caption")
    assert (
        done.returncode == 2
        and "no sample of 1 tar files can be used" in done.stderr
        and "its JSON is not valid" in done.stderr
    )
    command = ["shards/make_shards.py", "--source", "webdataset", "--videos", f"{tmp_path}/a.tar", "--split", "train"]
    done = run(*command, "--out", str(tmp_path / "packed"), "--image-size", "32", "--max-bad", "1", "--workers", "1")
    assert done.returncode == 0 and sorted(load_index(tmp_path / "packed").ids) == sorted(names), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "json", "out", "packed"]


def test_wrong_arguments_are_one_line(clip_tars: Path, tmp_path: Path) -> None:
    for tars, more, message in (
        (f"{clip_tars}/{{00000..00002}}.tar", (), "00002.tar does not exist"),
        (f"{clip_tars}/{{00000..", (), "the braces of"),
        (f"{clip_tars}/{{00000,00000}}.tar", (), "is named twice"),
        (f"{clip_tars}/x*.tar", (), "no file matches"),
        (f"{clip_tars}/00000.tar.gz", (), "decompress"),
        (f"{clip_tars}/00000.tar", ("--captions", "a,,b"), "must be different names"),
        (f"{clip_tars}/00000.tar", ("--cache", "x"), "--cache applies to URLs only"),
        (f"{clip_tars}/00000.tar", ("--image-size", "0"), "--image-size must be from 1"),
    ):
        done = _index(tars, tmp_path, *more)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_changed_tar_is_noticed(clip_tars: Path, tmp_path: Path) -> None:
    content = bytearray((clip_tars / "00000.tar").read_bytes())
    (tmp_path / "a.tar").write_bytes(content)
    assert _index(f"{tmp_path}/a.tar", tmp_path).returncode == 0
    place = scan_tar(tmp_path / "a.tar").samples[2]
    content[place.offset + place.size // 2] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DamagedError, match=r"a\.tar is damaged at sample '000000002'"):
        read_sample(load_index(tmp_path), 2)
    (tmp_path / "a.tar").write_bytes(content[:-512])
    with pytest.raises(UserError, match="index it again"):
        load_index(tmp_path)


NAMES = ["a.jpg", "a.b.JPG", "d/a.0.jpg", "d.e/a.txt", "a", ".hidden", "./a.mp4", "a.", "__x__", "__x.y", "a/"]


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_those_of_webdataset(name: str) -> None:
    key, suffix = base_plus_ext(name)
    if key is None or suffix is None or (name.startswith("__") and name.endswith("__")):
        assert split_name(name) == ("", "")
    else:
        assert split_name(name) == (key, suffix.lower())


def test_hidden_files_belong_to_no_sample() -> None:
    """Archives of macOS hold a ``._NAME`` for each file."""
    assert split_name("d/._a.mp4") == split_name("._a.mp4") == ("", "")
