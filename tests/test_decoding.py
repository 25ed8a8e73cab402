"""Decoding: the right frames of whole files, whatever their container, codec, rate or orientation."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg

from shards.pack_video import Recipe, pack_video
from tests.conftest import run
from tests.videos import CODECS, encode, moving_pictures, set_display_matrix, write_greys
from tmass_dist.data.frames import uniform_frame_indices
from tmass_dist.data.video import BadVideoError, Timeline, at_rate, read_video, uniform


@pytest.mark.parametrize(("window", "share"), [((None, None), 1.0), ((1.0, 3.0), 1.0), ((None, None), 0.6)])
def test_the_right_frames_are_packed_whatever_the_header_claims(
    tmp_path: Path, window: tuple[float | None, float | None], share: float
) -> None:
    """Also of a file that was cut off: its header claims the frames that were lost."""
    path = tmp_path / "grey.avi"
    write_greys(path, [4 * i for i in range(50)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    frames, facts = read_video(path, uniform(5, *window), 32, window[1])
    decoded = facts["num_decoded_frames"]
    assert decoded == 50 if window == (None, None) and share == 1 else decoded < 50
    first, last = (0, decoded) if window[0] is None else (10, 30)
    assert facts["frame_indices"] == [first + i for i in uniform_frame_indices(last - first, 5)]
    assert all(abs(frame[..., :3].mean() - 4 * index) < 3 for frame, index in zip(frames, facts["frame_indices"]))


@pytest.mark.parametrize("name", CODECS)
def test_the_right_frames_of_old_and_new_codecs(tmp_path: Path, name: str) -> None:
    """Also where frames are stored in another order than they are shown."""
    if CODECS[name][1] not in av.codecs_available:
        pytest.skip(f"this build of PyAV does not write {CODECS[name][1]}")
    path = tmp_path / "video"
    encode(path, [np.full((48, 64, 3), grey, np.uint8) for grey in range(0, 240, 24)], name)
    members, facts = pack_video(path, {}, Recipe(num_frames=5, image_size=32))
    assert facts["num_decoded_frames"] == 10 and facts["frame_indices"] == uniform_frame_indices(10, 5)
    assert facts["damaged_end"] is None and facts["num_skipped_frames"] == 0
    for content, index in zip(members.values(), facts["frame_indices"], strict=True):
        assert abs(simplejpeg.decode_jpeg(content).mean() - 24 * index) < 5


def test_a_part_of_a_video_of_variable_rate_is_found_by_its_times(tmp_path: Path) -> None:
    """Twenty frames in the first two seconds (as a phone in the light), then one every two seconds."""
    times = [*range(0, 20), *range(20, 220, 20)]
    path = tmp_path / "vary.mp4"
    write_greys(path, [8 * i for i in range(30)], times=times)
    frames, facts = read_video(path, uniform(3, 2.0, 8.0), 32, 8.0)
    shown = sorted(t / 10 for t in times)
    assert all(2.0 <= shown[i] <= 8.0 for i in facts["frame_indices"]), facts
    assert all(abs(frame[..., :3].mean() - 8 * index) < 6 for frame, index in zip(frames, facts["frame_indices"]))


def test_frames_at_a_rate() -> None:
    times = np.arange(50) / 10
    assert at_rate(1.0)(Timeline(times, 10.0)) == [4, 14, 24, 34, 44]
    assert len(at_rate(2.0, 1.0, 3.0)(Timeline(times, 10.0))) == 4
    assert len(at_rate(0.01)(Timeline(times, 10.0))) == 1


def test_more_than_a_thousand_frames_stay_in_time_order(tmp_path: Path) -> None:
    """TarWriter sorts members by name."""
    path = tmp_path / "long.mp4"
    write_greys(path, [k % 250 for k in range(1100)], size=(16, 16))
    members, facts = pack_video(path, {}, Recipe(rate=10, image_size=16))
    assert len(members) == 1100 and facts["frame_indices"] == list(range(1100))
    assert sorted(members) == list(members)


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        ((1, 0, 0, 1), "1234"),
        ((0, 1, -1, 0), "3142"),  # a quarter turn clockwise, as a phone held upright writes it
        ((0, -1, 1, 0), "2413"),
        ((-1, 0, 0, -1), "4321"),
        ((-1, 0, 0, 1), "2143"),  # mirrored
        ((1, 0, 0, -1), "3412"),  # upside down
        ((0, 1, 1, 0), "1324"),
        ((0, -1, -1, 0), "4231"),
        ((0, 0, 0, 0), "1234"),  # no rotation at all: ignored, as ffmpeg does
    ],
)
def test_a_display_matrix_is_obeyed(tmp_path: Path, matrix: tuple[int, int, int, int], corners: str) -> None:
    """``corners`` names the corners of the stored picture as they are shown: top left, top right, bottom left, ..."""
    path = tmp_path / "phone.mp4"
    greys = {"1": 40, "2": 100, "3": 160, "4": 220}
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32], picture[:32, 32:], picture[32:, :32], picture[32:, 32:] = greys.values()
    encode(path, [picture] * 5, "mp4")
    set_display_matrix(path, matrix)
    (shown, *_), _ = read_video(path, uniform(1), 32)
    corner_means = [shown[y : y + 8, x : x + 8, 0].mean() for y in (4, 20) for x in (4, 20)]
    assert np.abs(np.array(corner_means) - [greys[corner] for corner in corners]).max() < 12, corner_means


def test_one_frame_and_a_large_picture(tmp_path: Path) -> None:
    write_greys(tmp_path / "one.mp4", [77])
    write_greys(tmp_path / "uhd.mp4", [120, 121], size=(3840, 2160))
    for name, grey in (("one", 77), ("uhd", 120)):
        members, facts = pack_video(tmp_path / f"{name}.mp4", {}, Recipe(image_size=32))
        pictures = [simplejpeg.decode_jpeg(content) for content in members.values()]
        assert len(pictures) == 12 and all(abs(picture.mean() - grey) < 5 for picture in pictures)
        assert facts["num_decoded_frames"] == (1 if name == "one" else 2)


def test_a_very_long_picture_is_refused(tmp_path: Path) -> None:
    """Resized to a short side of 224 it would be 224 x 57344 pixels."""
    write_greys(tmp_path / "thin.mp4", [77, 78], size=(4096, 16))
    with pytest.raises(BadVideoError, match="4096x16 pixels"):
        read_video(tmp_path / "thin.mp4", uniform(1), 224)


def test_titles_in_another_encoding_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "title.avi"
    with av.open(str(path), "w", format="avi") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        picture = np.full((48, 64, 3), 90, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    assert content.count(b"TITLE") == 1
    path.write_bytes(content.replace(b"TITLE", "Tütle".encode("latin-1")))
    (frame,), _ = read_video(path, uniform(1), 32)
    assert abs(frame[..., :3].mean() - 90) < 3


def test_threads_decode_at_the_same_time(tmp_path: Path) -> None:
    """As the report does for its thumbnails. In a process of its own, which crashed where threads shared a filter."""
    paths = [tmp_path / f"{number}.mp4" for number in range(4)]
    for number, path in enumerate(paths):
        width, height = 64 + 16 * number, 48 + 32 * (number % 2)
        pictures = [np.resize(picture, (height, width, 3)) for picture in moving_pictures(20)]
        encode(path, pictures, "mp4")
    code = f"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import av.logging
import numpy as np
from tmass_dist.data.video import read_video, uniform
paths = [Path(path) for path in {[str(path) for path in paths]!r}] * 30
read = lambda path: np.stack(read_video(path, uniform(8), 32)[0])
settings = av.logging.get_level(), av.logging.get_skip_repeated()
alone = [read(path) for path in paths[:4]]
with ThreadPoolExecutor(6) as pool:
    for number, frames in enumerate(pool.map(read, paths)):
        assert np.array_equal(frames[..., :3], alone[number % 4][..., :3])
assert (av.logging.get_level(), av.logging.get_skip_repeated()) == settings
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
