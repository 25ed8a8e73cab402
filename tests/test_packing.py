"""Packing: every video with the right frames or with its reason, and the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np

from shards.demo_data import generate
from tests.packing import SIZES, pack
from tests.processes import processes_with, run_and_be_killed, until
from tests.videos import write_greys
from tmass_dist.data.index import load_index
from tmass_dist.data.samples import read_into, read_sample, safe_key


def test_generated_data_is_the_same_bytes_and_disjoint(demo_videos: Path, tmp_path: Path) -> None:
    generate(tmp_path, SIZES, seed=0)
    files = sorted(p.relative_to(demo_videos) for p in demo_videos.rglob("*") if p.is_file())
    assert len(files) == sum(SIZES.values()) + 3  # the manifest, the captioner's captions, the moments
    assert all((demo_videos / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    rows = [json.loads(line) for line in (demo_videos / "manifest.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)


def test_packing_again_by_two_processes_gives_the_same_bytes(
    demo_videos: Path, demo_shards: Path, tmp_path: Path
) -> None:
    assert pack(demo_videos, tmp_path, "--workers", "2").returncode == 0
    files = [*sorted(demo_shards.glob("*.tar")), demo_shards / "index.safetensors"]
    assert len(files) == 4
    assert all(file.read_bytes() == (tmp_path / file.name).read_bytes() for file in files)


def test_webdataset_reads_our_tars(demo_shards: Path) -> None:
    import webdataset as wds

    samples = list(wds.WebDataset([str(t) for t in sorted(demo_shards.glob("*.tar"))], shardshuffle=False))
    assert len(samples) == SIZES["train"]
    assert all("json" in s and "000.jpg" in s and "011.jpg" in s for s in samples)


def test_keys_are_safe_short_and_distinct() -> None:
    assert safe_key("video7") == "video7"
    assert "." not in safe_key('1012_"Unbreakable_00.05') and safe_key("a.b") != safe_key("a-b") != safe_key("a_b")
    assert len(safe_key("x" * 200)) < 80 and safe_key("x" * 200) != safe_key("x" * 201)


def test_packing_frames_at_a_rate(tmp_path: Path) -> None:
    write_greys(tmp_path / "short.mp4", [100] * 3)
    write_greys(tmp_path / "long.mp4", [100] * 60)
    (tmp_path / "captions.csv").write_text("file,caption,mood\nshort.mp4,one,glad\nlong.mp4,two,\nlong.mp4,three,\n")
    out = tmp_path / "out"
    done = pack(tmp_path, out, "--rate", "2", kind="folder")
    assert done.returncode == 0, done.stderr
    index = load_index(out)
    counts = [len(read_sample(index, number)[1]) for number in range(2)]
    assert counts == [1, 12] and index.num_frames == 0 and index.num_captions.tolist() == [1, 2]
    assert read_sample(index, 0)[0]["fields"]["mood"] == "glad"  # other columns are kept
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    read_into(frames, index, 0)
    assert (frames > 90).all()  # a short video repeats its last frame and is never black


def _audio(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_each_broken_video_has_its_reason_and_none_is_dropped(demo_videos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    (copy / "videos").symlink_to(demo_videos / "videos")
    (copy / "text.mp4").write_bytes(b"not a video at all")
    (copy / "empty.mp4").write_bytes(b"")
    _audio(copy / "sound.mp4")
    write_greys(copy / "cut.mp4", [50] * 30)
    (copy / "cut.mp4").write_bytes((copy / "cut.mp4").read_bytes()[:600])
    write_greys(copy / "short.mp4", [50] * 20)
    rows = [json.loads(line) for line in (demo_videos / "manifest.jsonl").read_text().splitlines()]
    bad = {
        "text": "",
        "empty": "empty",
        "missing": "missing",
        "sound": "no video stream",
        "cut": "",
        "short": "ends after",
    }
    rows += [{"id": name, "path": f"{name}.mp4", "captions": ["a"], "split": "train"} for name in bad]
    rows[-1] |= {"start": 10.0, "end": 15.0}
    (copy / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = pack(copy, tmp_path / "out")
    assert done.returncode == 2 and "6 of 16 videos" in done.stderr and "Traceback" not in done.stderr
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in listed} == set(bad)
    assert all(bad[entry["id"]] in entry["reason"] and entry["reason"] for entry in listed), listed
    assert pack(copy, tmp_path / "out", "--max-bad", "40%").returncode == 0
    assert len(load_index(tmp_path / "out")) == SIZES["train"]


def test_a_clip_is_kept_as_it_is_and_decoded_in_training(demo_videos: Path, demo_shards: Path, tmp_path: Path) -> None:
    assert pack(demo_videos, tmp_path, "--store", "clip").returncode == 0
    clips, jpegs = load_index(tmp_path), load_index(demo_shards)
    meta, payload = read_sample(clips, 3)
    assert payload == [(demo_videos / meta["source"]).read_bytes()]
    frames = [np.zeros((12, 32, 32, 3), np.uint8) for _ in range(2)]
    for out, index in zip(frames, (clips, jpegs)):
        read_into(out, index, 3)
    assert np.abs(frames[0].astype(int) - frames[1]).mean() < 3  # what JPEG lost


def test_bad_arguments_are_one_line(demo_videos: Path, tmp_path: Path) -> None:
    for more, message in (
        (["--rate", "0"], "--rate must be above 0"),
        (["--rate", "nan"], "--rate must be above 0"),
        (["--num-frames", "0"], "--num-frames must be from 1 to"),
        (["--num-frames", "1000000000"], "--num-frames must be from 1 to"),
        (["--image-size", "100000"], "--image-size must be from 1 to"),
        (["--quality", "101"], "--quality must be from 1 to 100"),
        (["--max-bad", "nan"], "--max-bad must be a share"),
        (["--max-bad", "101%"], "--max-bad must be a share"),
        (["--time-limit-s", "0"], "--time-limit-s is 0.0"),
        (["--memory-limit-gb", "inf"], "--memory-limit-gb is inf"),
        (["--split", "dev"], "has no row of split 'dev'"),
        (["--annotations", "nowhere.jsonl"], "no annotations nowhere.jsonl"),
    ):
        done = pack(demo_videos, tmp_path, *more)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_nothing_packed_is_a_failure(tmp_path: Path) -> None:
    """Whatever share of bad videos is allowed: there is nothing to train on."""
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    (tmp_path / "a.txt").write_text("a caption")
    done = pack(tmp_path, tmp_path / "out", "--max-bad", "100%", kind="folder")
    assert done.returncode == 2 and "none of 1 videos could be packed" in done.stderr
    assert "a.mp4" in done.stderr and not (tmp_path / "out" / "index.safetensors").exists()


def test_files_outside_the_directory_need_permission(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    write_greys(tmp_path / "outside.mp4", [100] * 5)
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    for name, is_outside in (
        ("../outside.mp4", True),
        (str(tmp_path / "outside.mp4"), True),
        ("a/../../outside.mp4", True),
        ("link.mp4", False),
    ):
        (tmp_path / "videos" / "captions.csv").write_text(f"file,caption\n{name},a\n")
        done = pack(tmp_path / "videos", tmp_path / "out", kind="folder")
        assert done.returncode == (2 if is_outside else 0), done.stderr
        assert ("--allow-outside" in done.stderr) == is_outside
    (tmp_path / "videos" / "captions.csv").write_text("file,caption\n../outside.mp4,a\n")
    assert pack(tmp_path / "videos", tmp_path / "out", "--allow-outside", kind="folder").returncode == 0


def test_files_that_are_no_videos_are_passed_over_with_a_count(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_greys(tmp_path / f"{name}.mp4", [100] * 5)
        (tmp_path / f"{name}.txt").write_text("a caption")
        (tmp_path / f"{name}.json").write_text("{}")
    write_greys(tmp_path / "c.mp4", [100] * 5)
    (tmp_path / "d.txt").write_text("a caption")
    done = pack(tmp_path, tmp_path / "out", kind="folder")
    assert done.returncode == 0 and "2 videos, 2 captions, 1 shards, 0 in quarantine" in done.stdout
    assert "passed over: 2 files that are no videos (2 .json), 1 videos without a .txt, 1 .txt files" in done.stdout


KILL_PACKING = """
import os, runpy, signal, sys
from shards.shard_writer import ShardWriter

close = ShardWriter.close

def close_or_kill(self):
    if self.path.name == "shard-000001.tar":
        os.kill(os.getpid(), signal.SIGKILL)
    return close(self)

ShardWriter.close = close_or_kill
sys.argv[0] = "shards/make_shards.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Packs until the second shard is written, but not complete."""


def test_kill_9_loses_the_unfinished_shard_only(demo_videos: Path, demo_shards: Path, tmp_path: Path) -> None:
    """Killed after its first shard, and run again: the other shards are packed, with the same bytes."""
    command = ["--source", "manifest", "--image-size", "32", "--annotations", str(demo_videos / "manifest.jsonl")]
    command += ["--videos", str(demo_videos), "--split", "train", "--out", str(tmp_path), "--shard-size", "4"]
    run_and_be_killed(KILL_PACKING, [*command, "--workers", "1"], tmp_path, MARK_OF_TEST=str(tmp_path))
    until(lambda: not processes_with("MARK_OF_TEST", str(tmp_path)), "end of its workers")
    (tmp_path / "stderr").unlink()
    first = tmp_path / "parts" / "shard-000000.tar.json"
    assert not (tmp_path / "index.safetensors").exists()
    whole = first.stat().st_mtime_ns
    assert pack(demo_videos, tmp_path).returncode == 0
    assert first.stat().st_mtime_ns == whole
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.safetensors", "parts", "quarantine.jsonl", *(f"shard-00000{k}.tar" for k in range(3))]
    assert all((tmp_path / name).read_bytes() == (demo_shards / name).read_bytes() for name in names if name != "parts")


def test_an_error_while_writing_ends_the_command(demo_videos: Path, tmp_path: Path) -> None:
    """The workers are stopped, and the unfinished shard is removed."""
    (tmp_path / "shard-000001.tar").mkdir()
    (tmp_path / "shard-000001.tar" / "full").touch()
    done = pack(demo_videos, tmp_path)
    assert done.returncode != 0 and "shard-000001.tar" in done.stderr
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "index.safetensors").exists()
