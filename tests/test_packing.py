"""Packing: every video rightly or with its reason, the same bytes each time."""

import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg

from shards.demo_data import generate
from shards.pack_video import Recipe, pack_video
from shards.sources import read_rows
from tests.conftest import ROOT, run
from tmass_dist.data.frames import uniform_frame_indices
from tmass_dist.data.index import load_index
from tmass_dist.data.samples import read_into, read_sample, safe_key
from tmass_dist.data.video import BadVideoError, Timeline, at_rate, read_video, uniform

SIZES = {"train": 10, "val": 4, "test": 4}
CLIPS = ROOT / "tests" / "clips"
SHARED = ROOT.parent / "shared"


def _pack(source: Path, out: Path, *more: str, kind: str = "manifest") -> subprocess.CompletedProcess[str]:
    command = ["shards/make_shards.py", "--source", kind, "--videos", str(source), "--split", "train", "--out"]
    command += [str(out), "--image-size", "32", "--shard-size", "4", "--workers", "1", *more]
    if kind == "manifest":
        command += ["--annotations", str(source / "manifest.jsonl")]
    return run(*command)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("videos")
    generate(out, SIZES, seed=0)
    return out


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    done = _pack(source, out)
    assert done.returncode == 0, done.stderr
    return out


def test_generated_data_is_the_same_bytes_and_disjoint(source: Path, tmp_path: Path) -> None:
    generate(tmp_path, SIZES, seed=0)
    files = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    assert len(files) == sum(SIZES.values()) + 2
    assert all((source / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)


def test_packing_again_by_two_processes_gives_the_same_bytes(source: Path, packed: Path, tmp_path: Path) -> None:
    assert _pack(source, tmp_path, "--workers", "2").returncode == 0
    files = [*sorted(packed.glob("*.tar")), packed / "index.safetensors"]
    assert len(files) == 4
    assert all(file.read_bytes() == (tmp_path / file.name).read_bytes() for file in files)


def test_webdataset_reads_our_tars(packed: Path) -> None:
    import webdataset as wds

    samples = list(wds.WebDataset([str(t) for t in sorted(packed.glob("*.tar"))], shardshuffle=False))
    assert len(samples) == SIZES["train"]
    assert all("json" in s and "000.jpg" in s and "011.jpg" in s for s in samples)


def test_keys_are_safe_short_and_distinct() -> None:
    assert safe_key("video7") == "video7"
    assert "." not in safe_key('1012_"Unbreakable_00.05') and safe_key("a.b") != safe_key("a-b") != safe_key("a_b")
    assert len(safe_key("x" * 200)) < 80 and safe_key("x" * 200) != safe_key("x" * 201)


def _write_video(
    path: Path, greys: list[int], *, times: list[int] | None = None, size: tuple[int, int] = (64, 48)
) -> None:
    """Frame ``i`` is a plain grey of its own; 10 frames a second, or shown at ``times`` in tenths of a second."""
    width, height = size
    kind = "avi" if path.suffix == ".avi" else "mp4"
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream("mjpeg" if kind == "avi" else "mpeg4", rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if kind == "avi" else "yuv420p"
        stream.codec_context.bit_rate = 4_000_000
        for number, grey in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), grey, np.uint8), format="rgb24")
            if times is not None:
                frame.pts = times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("window", "share"), [((None, None), 1.0), ((1.0, 3.0), 1.0), ((None, None), 0.6)])
def test_the_right_frames_are_packed_whatever_the_header_claims(
    tmp_path: Path, window: tuple[float | None, float | None], share: float
) -> None:
    """Also of a file that was cut off: its header claims the frames that were lost."""
    path = tmp_path / "grey.avi"
    _write_video(path, [4 * i for i in range(50)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    frames, facts = read_video(path, uniform(5, *window), 32, window[1])
    decoded = facts["num_decoded_frames"]
    assert decoded == 50 if window == (None, None) and share == 1 else decoded < 50
    first, last = (0, decoded) if window[0] is None else (10, 30)
    assert facts["frame_indices"] == [first + i for i in uniform_frame_indices(last - first, 5)]
    assert all(abs(frame[..., :3].mean() - 4 * index) < 3 for frame, index in zip(frames, facts["frame_indices"]))


CODECS = {  # container, codec, pixels
    "cinepak": ("avi", "cinepak", "rgb24"),
    "msvideo1": ("avi", "msvideo1", "rgb555le"),
    "mpeg1": ("avi", "mpeg1video", "yuv420p"),
    "mpeg2": ("mpeg", "mpeg2video", "yuv420p"),
    "h264": ("matroska", "libx264", "yuv420p"),
    "vp9": ("webm", "libvpx-vp9", "yuv420p"),
    "wmv2": ("asf", "wmv2", "yuv420p"),
    "flv": ("flv", "flv", "yuv420p"),
}


@pytest.mark.parametrize("name", CODECS)
def test_the_right_frames_of_old_and_new_codecs(tmp_path: Path, name: str) -> None:
    """Also where frames are stored in another order than they are shown."""
    kind, codec, pixels = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV does not write {codec}")
    path = tmp_path / "video"
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.codec_context.bit_rate = 4_000_000
        if codec in ("mpeg2video", "libx264"):
            stream.codec_context.max_b_frames = 2
        for grey in range(0, 240, 24):
            picture = np.full((48, 64, 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    members, facts = pack_video(path, {}, Recipe(num_frames=5, image_size=32))
    assert facts["num_decoded_frames"] == 10 and facts["frame_indices"] == uniform_frame_indices(10, 5)
    for content, index in zip(members.values(), facts["frame_indices"], strict=True):
        assert abs(simplejpeg.decode_jpeg(content).mean() - 24 * index) < 5


def test_a_part_of_a_video_of_variable_rate_is_found_by_its_times(tmp_path: Path) -> None:
    """Twenty frames in the first second (as a phone in the light), then one a second."""
    times = [*range(0, 20), *range(20, 220, 20)]
    path = tmp_path / "vary.mp4"
    _write_video(path, [8 * i for i in range(30)], times=times)
    frames, facts = read_video(path, uniform(3, 2.0, 8.0), 32, 8.0)
    shown = sorted(t / 10 for t in times)
    assert all(2.0 <= shown[i] <= 8.0 for i in facts["frame_indices"]), facts
    assert all(abs(frame[..., :3].mean() - 8 * index) < 6 for frame, index in zip(frames, facts["frame_indices"]))


def test_frames_at_a_rate(tmp_path: Path) -> None:
    times = np.arange(50) / 10
    assert at_rate(1.0)(Timeline(times, 10.0)) == [4, 14, 24, 34, 44]
    assert len(at_rate(2.0, 1.0, 3.0)(Timeline(times, 10.0))) == 4
    assert len(at_rate(0.01)(Timeline(times, 10.0))) == 1
    _write_video(tmp_path / "short.mp4", [100] * 3)
    _write_video(tmp_path / "long.mp4", [100] * 60)
    (tmp_path / "captions.csv").write_text("file,caption,mood\nshort.mp4,one,glad\nlong.mp4,two,\nlong.mp4,three,\n")
    out = tmp_path / "out"
    done = _pack(tmp_path, out, "--rate", "2", kind="folder")
    assert done.returncode == 0, done.stderr
    index = load_index(out)
    counts = [len(read_sample(index, number)[1]) for number in range(2)]
    assert counts == [1, 12] and index.num_frames == 0 and index.num_captions.tolist() == [1, 2]
    assert read_sample(index, 0)[0]["fields"]["mood"] == "glad"  # a field of one's own is kept
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    read_into(frames, index, 0)
    assert (frames > 90).all()  # a short video repeats its last frame and is never black


def test_a_rotation_tag_is_obeyed(tmp_path: Path) -> None:
    """A phone held upright writes the picture lying and a matrix that turns it."""
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, :32] = 220  # the left half is bright
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    lying, _ = read_video(path, uniform(1), 32)
    content = bytearray(path.read_bytes())
    track = content.index(b"tkhd") - 4
    at = track + 8 + 4 + 20 + 16  # header, version, times and ids of version 0, then layer, group, volume
    assert content[at : at + 4] == b"\x00\x01\x00\x00"  # the matrix begins with one
    quarter = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 64 << 16, 0, 0x40000000)
    content[at : at + 36] = quarter
    path.write_bytes(content)
    upright, _ = read_video(path, uniform(1), 32)
    assert lying[0][:, 4, 0].mean() > 200 > 30 > lying[0][:, 28, 0].mean()
    assert upright[0][4, :, 0].mean() > 200 > 30 > upright[0][28, :, 0].mean()  # clockwise: what was left is up


def _audio(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_each_broken_video_has_its_reason_and_none_is_dropped(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    (copy / "videos").symlink_to(source / "videos")
    (copy / "text.mp4").write_bytes(b"not a video at all")
    (copy / "empty.mp4").write_bytes(b"")
    _audio(copy / "sound.mp4")
    _write_video(copy / "cut.mp4", [50] * 30)
    (copy / "cut.mp4").write_bytes((copy / "cut.mp4").read_bytes()[:600])
    _write_video(copy / "short.mp4", [50] * 20)
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
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
    done = _pack(copy, tmp_path / "out")
    assert done.returncode == 2 and "6 of 16 videos" in done.stderr and "Traceback" not in done.stderr
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in listed} == set(bad)
    assert all(bad[entry["id"]] in entry["reason"] and entry["reason"] for entry in listed), listed
    assert _pack(copy, tmp_path / "out", "--max-bad", "40%").returncode == 0
    assert len(load_index(tmp_path / "out")) == SIZES["train"]


def test_one_frame_and_a_large_picture(tmp_path: Path) -> None:
    _write_video(tmp_path / "one.mp4", [77])
    _write_video(tmp_path / "uhd.mp4", [120, 121], size=(3840, 2160))
    for name, grey in (("one", 77), ("uhd", 120)):
        members, facts = pack_video(tmp_path / f"{name}.mp4", {}, Recipe(image_size=32))
        pictures = [simplejpeg.decode_jpeg(content) for content in members.values()]
        assert len(pictures) == 12 and all(abs(picture.mean() - grey) < 5 for picture in pictures)
        assert facts["num_decoded_frames"] == (1 if name == "one" else 2)


def test_a_clip_is_kept_as_it_is_and_decoded_in_training(source: Path, packed: Path, tmp_path: Path) -> None:
    assert _pack(source, tmp_path, "--store", "clip").returncode == 0
    clips, jpegs = load_index(tmp_path), load_index(packed)
    meta, payload = read_sample(clips, 3)
    assert payload == [(source / meta["source"]).read_bytes()]
    frames = [np.zeros((12, 32, 32, 3), np.uint8) for _ in range(2)]
    for out, index in zip(frames, (clips, jpegs)):
        read_into(out, index, 3)
    assert np.abs(frames[0].astype(int) - frames[1]).mean() < 3  # what JPEG lost


def test_damage_is_named(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    assert run("shards/verify_shards.py", str(tmp_path)).returncode == 0
    shard = tmp_path / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[3000:3600] = b"\0" * 600
    shard.write_bytes(content)
    done = run("shards/verify_shards.py", str(tmp_path), "--decode", "3")
    assert done.returncode == 2 and "shard-000001.tar" in done.stderr and "at sample" in done.stderr
    assert "Traceback" not in done.stderr
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing.*shard-000000\.tar"):
        load_index(tmp_path)
    with pytest.raises(ValueError, match=r"index\.safetensors is missing"):
        load_index(tmp_path / "nowhere")
    (tmp_path / "index.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        load_index(tmp_path)


def test_a_contact_sheet(packed: Path, tmp_path: Path) -> None:
    from PIL import Image

    done = run("shards/inspect_shards.py", str(packed), "--shard", "shard-000001.tar", "--out", str(tmp_path / "s.png"))
    assert done.returncode == 0 and "4 of 10 videos" in done.stdout, done.stderr
    assert np.asarray(Image.open(tmp_path / "s.png")).std() > 10
    done = run("shards/inspect_shards.py", str(packed), "--shard", "shard-9.tar")
    assert done.returncode == 2 and "it has shard-000000.tar" in done.stderr


def _clips() -> list[Path]:
    """The committed clips, and where it is there the larger collection."""
    return [CLIPS, *([SHARED / "clips"] if (SHARED / "clips").is_dir() else [])]


@pytest.mark.parametrize("clips", _clips(), ids=lambda path: path.parent.name)
def test_real_clips_go_through_packing_training_input_and_back(clips: Path, tmp_path: Path) -> None:
    done = _pack(clips, tmp_path, "--image-size", "224", kind="folder")
    assert done.returncode == 0, done.stderr
    listed = [json.loads(line) for line in (clips / "captions.jsonl").read_text().splitlines()]
    index = load_index(tmp_path)
    assert len(index) == len(listed) and (tmp_path / "quarantine.jsonl").read_text() == ""
    frames = np.zeros((12, 224, 224, 3), np.uint8)
    for number, entry in enumerate(listed):
        meta = read_into(frames, index, number)
        assert meta["source"] == entry["file"] and meta["captions"] == [entry["caption"]]
        # Back: what training sees are the frames of the file, but for what JPEG loses.
        again, facts = read_video(clips / entry["file"], uniform(12), 224)
        assert facts["frame_indices"] == meta["frame_indices"]
        assert np.abs(np.stack(again)[..., :3].astype(int) - frames).mean() < 5, entry["file"]
        if entry["file"] == "opencv_tree.avi":  # its header claims 444
            assert meta["num_decoded_frames"] == 68 and max(meta["frame_indices"]) < 68
    assert run("shards/verify_shards.py", str(tmp_path)).returncode == 0


def test_bad_arguments_and_files_are_one_line(source: Path, tmp_path: Path) -> None:
    for more, said in (
        (["--rate", "0"], "--rate must be above 0"),
        (["--num-frames", "0"], "--num-frames must be at least 1"),
        (["--split", "dev"], "has no row of split 'dev'"),
        (["--annotations", "nowhere.jsonl"], "no annotations nowhere.jsonl"),
    ):
        command = ["shards/make_shards.py", "--source", "manifest", "--annotations", str(source / "manifest.jsonl")]
        done = run(*command, "--videos", str(source), "--split", "train", "--out", str(tmp_path), *more)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,\n")
    with pytest.raises(ValueError, match="row 2 has no file or no caption"):
        read_rows("folder", None, tmp_path, "train")
    with pytest.raises(BadVideoError, match="missing"):
        read_video(tmp_path / "nowhere.mp4", uniform(3), 32)


def test_kill_9_loses_the_shard_in_hand_alone(source: Path, packed: Path, tmp_path: Path) -> None:
    """Killed after its first shard, the packing goes on, packs the rest, and gives the same bytes."""
    command = [sys.executable, "shards/make_shards.py", "--source", "manifest", "--annotations"]
    command += [str(source / "manifest.jsonl"), "--videos", str(source), "--split", "train", "--out", str(tmp_path)]
    command += ["--image-size", "32", "--shard-size", "4", "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "parts" / "shard-000000.tar.json"
    deadline = time.monotonic() + 60
    while not first.is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "index.safetensors").exists()
    whole = first.stat().st_mtime_ns
    assert _pack(source, tmp_path).returncode == 0
    assert first.stat().st_mtime_ns == whole
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.safetensors", "parts", "quarantine.jsonl", *(f"shard-00000{k}.tar" for k in range(3))]
    assert all((tmp_path / name).read_bytes() == (packed / name).read_bytes() for name in names if name != "parts")


def test_an_error_while_writing_ends_the_command(source: Path, tmp_path: Path) -> None:
    """The workers are stopped, and the unfinished shard is removed."""
    (tmp_path / "shard-000001.tar").mkdir()
    (tmp_path / "shard-000001.tar" / "full").touch()
    done = _pack(source, tmp_path)
    assert done.returncode != 0 and "shard-000001.tar" in done.stderr
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "index.safetensors").exists()
