"""Damaged videos: each has a reason in the quarantine or in its JSON; no frame is taken that was not filmed."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.videos import encode, moving_pictures, write_greys
from tmass_dist.data.square import square_picture
from tmass_dist.data.video import BadVideoError, Timeline, read_video, uniform

SIDE, NUM_FRAMES = 48, 60


def _cut_off(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


def _lose(start: float, end: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(start * len(content))] + content[int(end * len(content)) :]


def _zero(start: float, size: int) -> Callable[[bytes], bytes]:
    def zero(content: bytes) -> bytes:
        first = int(start * len(content))
        return content[:first] + bytes(size) + content[first + size :]

    return zero


DAMAGES = {
    "cut off at 35%": _cut_off(0.35),
    "cut off at 80%": _cut_off(0.8),
    "20% lost": _lose(0.3, 0.5),
    "40% lost": _lose(0.25, 0.65),
    "zeros": _zero(0.4, 3000),
    "zeros at the start": _zero(0.03, 4000),
}


@cache
def _true_pictures() -> list[np.ndarray]:
    frames = (av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in moving_pictures(NUM_FRAMES))
    return [square_picture(frame, SIDE)[..., :3].astype(int) for frame in frames]


def _nearest(frame: np.ndarray) -> tuple[int, float]:
    """The number of the true picture that is most similar, and the mean difference to it in grey levels."""
    errors = [float(np.abs(frame[..., :3].astype(int) - picture).mean()) for picture in _true_pictures()]
    return int(np.argmin(errors)), min(errors)


def _check(frames: list[np.ndarray], facts: dict[str, Any], loss: float) -> None:
    """Every frame shows what was filmed at its number; up to two frames may be missing without a word."""
    missing = 0
    for frame, index in zip(frames, facts["frame_indices"], strict=True):
        number, error = _nearest(frame)
        assert error < 1.5 * loss + 2, f"frame {index} was not filmed"
        missing = max(missing, number - index - facts["num_skipped_frames"])
    assert missing <= 2
    if not facts["damaged_end"] and not facts["num_skipped_frames"]:
        assert facts["num_decoded_frames"] >= 58


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["mpg", "ts", "mkv", "avi", "mjpeg", "mjpeg in mov", "flv"])
def test_no_frame_is_taken_that_was_not_filmed(tmp_path: Path, name: str, damage: str) -> None:
    """The decoders of these codecs fill in what is missing, from grey or from other frames, and say nothing."""
    path = tmp_path / "video"
    encode(path, moving_pictures(NUM_FRAMES), name)
    whole, facts = read_video(path, uniform(12), SIDE)
    assert facts["damaged_end"] is None and facts["num_decoded_frames"] == NUM_FRAMES
    loss = max(_nearest(frame)[1] for frame in whole)  # of the codec
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    try:
        _check(*read_video(path, uniform(12), SIDE), loss)
    except BadVideoError as error:
        assert str(error)


@pytest.mark.parametrize("damage", ["cut off at 35%", "cut off at 80%", "20% lost", "40% lost"])
def test_frames_that_the_decoder_marks_are_refused(tmp_path: Path, damage: str) -> None:
    if "libx264" not in av.codecs_available:
        pytest.skip("this build of PyAV does not write H.264")
    path = tmp_path / "video.mkv"
    encode(path, moving_pictures(NUM_FRAMES), "h264")
    loss = max(_nearest(frame)[1] for frame in read_video(path, uniform(12), SIDE)[0])
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    if damage == "20% lost":
        with pytest.raises(BadVideoError, match="damaged before its end, at frame"):
            read_video(path, uniform(12), SIDE)
        return
    frames, facts = read_video(path, uniform(12), SIDE)
    if "lost" not in damage:
        assert facts["damaged_end"] == "File ended prematurely"
    _check(frames, facts, loss)


def test_changed_bytes_within_a_frame_are_found_where_the_decoder_marks_it(tmp_path: Path) -> None:
    if "libx264" not in av.codecs_available:
        pytest.skip("this build of PyAV does not write H.264")
    path, reasons = tmp_path / "video.mkv", []
    encode(path, moving_pictures(NUM_FRAMES), "h264")
    content = path.read_bytes()
    for start in range(len(content) // 5, len(content) * 3 // 5, len(content) // 50):
        try:
            read_video(content[:start] + bytes(range(200, 216)) + content[start + 16 :], uniform(12), SIDE)
        except BadVideoError as error:
            reasons.append(str(error))
    assert sum("the decoder marks a frame as corrupt" in reason for reason in reasons) >= 5, reasons


@pytest.mark.parametrize("name", ["h264", "hevc", "vp9", "wmv2"])
def test_a_part_that_was_never_written_is_found(tmp_path: Path, name: str) -> None:
    """Zeros within one packet, as an interrupted download leaves them: these decoders take them without a word."""
    path = tmp_path / "video"
    encode(path, moving_pictures(NUM_FRAMES), name)
    content = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(container.streams.video[0]) if packet.size > 400]

    def with_hole(packet: bytes) -> bytes:
        start = content.index(packet[-300:]) + 20
        return content[:start] + bytes(200) + content[start + 200 :]

    with pytest.raises(BadVideoError, match=r"before its end, at frame .* a packet has a hole of zeros"):
        read_video(with_hole(packets[2]), uniform(12), SIDE)
    loss = max(_nearest(frame)[1] for frame in read_video(content, uniform(12), SIDE)[0])
    frames, facts = read_video(with_hole(packets[-3]), uniform(12), SIDE)
    assert facts["damaged_end"] == "a packet has a hole of zeros"
    _check(frames, facts, loss)


@pytest.mark.parametrize("name", ["mjpeg", "avi", "wmv2"])
def test_a_file_that_lost_its_middle_is_refused(tmp_path: Path, name: str) -> None:
    """Without times in the container, all later frames would come too early."""
    path = tmp_path / "video"
    encode(path, moving_pictures(NUM_FRAMES), name)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 3] + whole[len(whole) // 2 :], whole[:-3000] + whole[-2500:]):
        with pytest.raises(BadVideoError, match=f"{len(whole) - len(damaged)} of its {len(whole)} bytes are missing"):
            read_video(damaged, uniform(12), SIDE)
        path.write_bytes(damaged)
        with pytest.raises(BadVideoError, match="bytes are missing"):
            read_video(path, uniform(12), SIDE)
    path.write_bytes(whole + bytes(100))  # more than the header says is no loss
    assert read_video(path, uniform(12), SIDE)[1]["num_decoded_frames"] == NUM_FRAMES
    if whole[:4] == b"RIFF":  # some programs count the first 8 bytes, too
        claims_more = whole[:4] + struct.pack("<I", len(whole)) + whole[8:]
        assert read_video(claims_more, uniform(12), SIDE)[1]["num_decoded_frames"] == NUM_FRAMES


def test_a_pause_of_a_constant_rate_is_a_loss() -> None:
    steady = np.arange(100) / 25
    assert Timeline(steady, 25.0).first_gap() is None
    assert Timeline(np.delete(steady, slice(40, 60)), 25.0).first_gap() == 40
    assert Timeline(np.delete(steady, slice(40, 44)), 25.0).first_gap() is None  # a few dropped frames
    slides = np.array([0, 0.04, 3, 3.04, 9, 9.04, 12])  # a video of variable rate
    assert Timeline(slides, 25.0).first_gap() is None


def test_a_header_that_claims_two_billion_frames_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "claims.avi"
    write_greys(path, [100] * 20)
    content = bytearray(path.read_bytes())
    for name, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        struct.pack_into("<I", content, content.index(name) + offset, 2_000_000_000)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 2_000_000_000
    tracemalloc.start()
    frames, facts = read_video(path, uniform(3), 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(frames) == 3 and facts["num_decoded_frames"] == 20 and "header claims" in facts["damaged_end"]
    assert peak < 10_000_000


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadVideoError, match="missing"):
        read_video(tmp_path / "nowhere.mp4", uniform(3), 32)


def test_an_unknown_codec(tmp_path: Path) -> None:
    """Found by tests/fuzz: an AttributeError, which would end a training run on clips."""
    path = tmp_path / "video.avi"
    write_greys(path, [100] * 5)
    path.write_bytes(path.read_bytes().replace(b"MJPG", b"XQZW"))
    with pytest.raises(BadVideoError, match="no decoder"):
        read_video(path, uniform(3), 32)
