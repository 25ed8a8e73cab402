"""From a video file to pictures, by PyAV: decoded from the start without seeking; only chosen frames are converted.

What counts as damage is stated in docs/data.md: frames that were never filmed are not returned.
"""

# Shapes: S side of a picture in pixels; RGBX is red, green, blue and a byte without meaning.

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tmass_dist.data.frames import window_frame_indices
from tmass_dist.data.missing_bytes import has_hole, missing_middle
from tmass_dist.data.square import square_picture

CONCEALING_CODECS = frozenset(
    {"mpeg1video", "mpeg2video", "mpeg4", "h263", "flv", "flv1", "mjpeg", "wmv1", "wmv2"}
    | {"msmpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3"}
)
"""Their decoders fill damaged parts of a picture in without marking the frame. They are told to fail instead. Other
decoders mark the frame, and some refuse good files if they are told the same."""
END_FRAMES = 16
"""Decoders hold back up to so many frames. Damage within so many frames of the last one is a torn end; as many frames
may be missing at the start."""
GAP_S, GAP_INTERVALS, CONSTANT_SHARE = 0.5, 5, 0.9
"""Frames are missing where a video of constant rate pauses longer than both; of its intervals 90 % must be equal."""


class BadVideoError(ValueError):
    """A video that cannot be packed; the message is the reason that goes into the quarantine."""


@dataclass(frozen=True)
class Timeline:
    """When each frame is shown: ``times_s``, seconds from the first one, at ``fps`` frames a second on average."""

    times_s: np.ndarray
    fps: float

    def __len__(self) -> int:
        return len(self.times_s)

    @cached_property
    def is_constant(self) -> bool:
        """Whether every frame is shown when the frame rate says, to within one frame."""
        return bool((np.abs(self.times_s * self.fps - np.arange(len(self))) <= 1).all())

    def frame_at(self, seconds: float) -> float:
        """The frame number at a time; at a constant rate in fractions of a frame, as the authors count."""
        return seconds * self.fps if self.is_constant else float(np.searchsorted(self.times_s, seconds))

    def window(self, start_s: float | None, end_s: float | None) -> tuple[float, float]:
        """First frame of a part in seconds, and the frame after its last."""
        end = float(len(self)) if end_s is None else min(float(len(self)), self.frame_at(end_s))
        return self.frame_at(start_s or 0.0), end

    def first_gap(self) -> int | None:
        """The number of the first frame before which frames are missing, or None."""
        intervals = np.diff(self.times_s)
        if len(intervals) < 2:
            return None
        typical = float(np.median(intervals))
        is_equal = np.abs(intervals - typical) <= 0.1 * typical + 0.0015  # Matroska counts in milliseconds
        if is_equal.mean() < CONSTANT_SHARE:
            return None
        gaps = np.flatnonzero(intervals > max(GAP_S, GAP_INTERVALS * typical))
        return int(gaps[0]) + 1 if len(gaps) else None


Choose = Callable[[Timeline], list[int]]
"""Which frames to take of a video, by number; a ValueError if there are none."""


def uniform(num_frames: int, start_s: float | None = None, end_s: float | None = None) -> Choose:
    """The middle of each of ``num_frames`` equal segments of the video, or of a part of it."""

    def choose(timeline: Timeline) -> list[int]:
        return window_frame_indices(len(timeline), 1.0, *timeline.window(start_s, end_s), num_frames)

    return choose


def at_rate(rate: float, start_s: float | None = None, end_s: float | None = None) -> Choose:
    """``rate`` frames a second, each from the middle of its interval; at least one."""

    def choose(timeline: Timeline) -> list[int]:
        start, end = timeline.window(start_s, end_s)
        last = min(float(timeline.times_s[-1]) + 1 / timeline.fps, end_s or float("inf")) if len(timeline) else 0.0
        number = max(1, round((last - (start_s or 0.0)) * rate))
        return window_frame_indices(len(timeline), 1.0, start, end, min(number, max(1, int(end - start))))

    return choose


def read_video(
    source: Path | bytes, choose: Choose, side: int, end_s: float | None = None
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The chosen frames, uint8 ``(S, S, 4)`` RGBX: upright, the short side resized (bicubic), the centre square.

    Frames are counted by decoding, since headers can be wrong. The first pass keeps the frames that would be chosen if
    the header is right (or the packets, if it has no count); if other frames decode, a second pass keeps the right
    ones. Memory holds the chosen pictures only.

    Args:
        source: a file, or its bytes.
        choose: which frames; called with the claimed timeline and then with the decoded one.
        side: of the pictures, pixels.
        end_s: decoding stops at this time.

    Returns:
        The frames, and facts: frames decoded, those taken, the damage at the end if any, rate, seconds and codec.

    Raises:
        BadVideoError: the file is missing, has no video stream, does not decode, is damaged before its end, or has no
            frame in the chosen part.
    """
    if isinstance(source, Path) and not source.is_file():
        raise BadVideoError("the file is missing")
    if not (source.stat().st_size if isinstance(source, Path) else len(source)):
        raise BadVideoError("the file is empty")
    if reason := missing_middle(source):
        raise BadVideoError(f"it is damaged before its end: {reason}")
    kept, timeline, facts = _decode(source, choose, side, end_s)
    if not len(timeline):
        raise BadVideoError(facts["damaged_end"] or "no frame decodes")
    try:
        indices = choose(timeline)
    except ValueError as error:
        raise BadVideoError(f"{error}: it ends after {len(timeline) / timeline.fps:.1f} s") from error
    if not set(indices) <= kept.keys():
        kept = _decode(source, lambda _: indices, side, end_s)[0]
    return [kept[i] for i in indices], facts | {"frame_indices": indices}


def _open(source: Path | bytes) -> Any:
    """A container and its video stream."""
    import av

    content = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        container = av.open(content, metadata_errors="ignore")  # titles are often in another encoding
    except av.FFmpegError as error:
        raise BadVideoError(_words(error)) from error
    # A cover picture is a stream of one frame, and no video.
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        container.close()
        raise BadVideoError("no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        container.close()
        raise BadVideoError("ffmpeg has no decoder for its codec")
    stream.thread_type = "NONE"
    if stream.codec_context.name in CONCEALING_CODECS:
        stream.codec_context.options = {"err_detect": "explode"}
    return container, stream


def _words(error: Exception) -> str:
    """What an error of ffmpeg says about a file; too little memory says nothing about it and is raised again."""
    if isinstance(error, MemoryError):
        raise error
    return re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))


def _rate(stream: Any) -> float:
    return float(stream.average_rate or stream.base_rate or 25)


def _claimed_timeline(source: Path | bytes, stream: Any) -> Timeline:
    """What would decode if the header is right, or else if every packet decodes."""
    rate = _rate(stream)
    num_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
    if 0 < stream.frames <= num_bytes:  # a header may claim billions
        return Timeline(np.arange(stream.frames) / rate, rate)
    return _count_packets(source)


def _count_packets(source: Path | bytes) -> Timeline:
    import av

    container, stream = _open(source)
    with container:
        rate, times = _rate(stream), []
        try:
            for packet in container.demux(stream):
                if packet.size:
                    time = packet.pts if packet.pts is not None else packet.dts
                    times.append(len(times) / rate if time is None else float(time * packet.time_base))
        except av.FFmpegError:  # decoding will find out where the file is torn
            pass
    times_s = np.sort(np.array(times or [0.0]))
    return Timeline(times_s - times_s[0], rate)


def _decode(
    source: Path | bytes, choose: Choose, side: int, end_s: float | None
) -> tuple[dict[int, np.ndarray], Timeline, dict[str, Any]]:
    """One pass: the frames that would be chosen if the header is right, when each frame is shown, and facts."""
    kept: dict[int, np.ndarray] = {}
    times: list[float] = []
    damage: tuple[int, str] | None = None
    container, stream = _open(source)
    # Without their first key frame, concealing decoders start from a grey picture.
    needs_key, skipped = stream.codec_context.name in CONCEALING_CODECS, 0
    with container, _error_messages() as messages:
        rate = _rate(stream)
        try:
            wanted = set(choose(_claimed_timeline(source, stream)))
        except ValueError:  # the decoded timeline will tell
            wanted = set()
        for frame, complaint in _frames(container, stream, messages):
            if complaint and damage is None:
                damage = len(times), complaint
            if damage is not None and len(times) > damage[0] + END_FRAMES:
                raise BadVideoError(_damaged_before_end(times, damage))
            if frame is None:
                continue
            if needs_key and not frame.key_frame:
                skipped += 1
                continue
            needs_key = False
            time = len(times) / rate if frame.time is None else frame.time
            if end_s is not None and times and time - times[0] > end_s:
                break
            if len(times) in wanted and damage is None:
                try:
                    kept[len(times)] = square_picture(frame, side)
                except ValueError as error:
                    raise BadVideoError(str(error)) from error
            times.append(time)
        claimed_s = float(stream.duration * stream.time_base) if stream.duration else None
    if skipped > END_FRAMES:
        raise BadVideoError(f"its first {skipped} frames have no key frame to start from")
    times_s = np.array(times)
    timeline = Timeline(times_s - times_s[0] if times else times_s, rate)
    gap = timeline.first_gap()
    if gap is not None and (damage is None or gap < damage[0]):
        damage = gap, f"frames are missing before {timeline.times_s[gap]:.2f} s"
        if len(times) > gap + END_FRAMES:
            raise BadVideoError(_damaged_before_end(times, damage))
    if damage is not None:
        timeline = Timeline(timeline.times_s[: damage[0]], rate)
    seconds = float(timeline.times_s[-1]) + 1 / rate if len(timeline) else 0.0
    complaint = damage[1] if damage else None
    if complaint is None and end_s is None and claimed_s is not None and claimed_s > max(seconds + 0.5, 1.05 * seconds):
        complaint = f"the header claims {claimed_s:.1f} s"
    facts = {
        "num_decoded_frames": len(timeline),
        "num_skipped_frames": skipped,
        "damaged_end": complaint,
        "fps": round(rate, 3),
        "seconds": round(seconds, 3),
        "codec": stream.codec_context.name,
    }
    return {k: picture for k, picture in kept.items() if k < len(timeline)}, timeline, facts


def _damaged_before_end(times: list[float], damage: tuple[int, str]) -> str:
    position, complaint = damage
    shown = times[min(position, len(times) - 1)] - times[0]
    return f"it is damaged before its end, at frame {position} ({shown:.2f} s): {complaint}"


def _frames(container: Any, stream: Any, messages: list[tuple[int, str, str]]) -> Iterator[tuple[Any, str]]:
    """Each frame with the complaint about it, or None with a complaint about what did not decode."""
    import av

    names = container.format.name, stream.codec_context.name
    messages.clear()  # of opening the file
    try:
        for packet in container.demux(stream):
            complaint = "the file marks a packet as corrupt" if packet.is_corrupt else ""
            if not complaint and has_hole(bytes(packet), stream.codec_context.name):
                complaint = "a packet has a hole of zeros"
            frames = []
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                complaint = _words(error)
            complaint = complaint or _damage_in(messages, *names)
            if complaint:
                yield None, complaint
            for frame in frames:
                yield frame, "the decoder marks a frame as corrupt" if frame.is_corrupt else ""
    except av.FFmpegError as error:
        yield None, _words(error)
    if complaint := _damage_in(messages, *names):
        yield None, complaint


class _LogSettings:
    """ffmpeg's log settings, which all threads share: they are ours while any thread decodes."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, (None, True)

    def __enter__(self) -> None:
        import av.logging

        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = av.logging.get_level(), av.logging.get_skip_repeated()
                av.logging.set_level(av.logging.ERROR)
                av.logging.set_skip_repeated(False)  # the same message may be about the next file

    def __exit__(self, *_: object) -> None:
        import av.logging

        with self._lock:
            self._users -= 1
            if not self._users:
                level, skips = self._before
                av.logging.set_level(level)
                av.logging.set_skip_repeated(skips)


_LOG_SETTINGS = _LogSettings()


@contextmanager
def _error_messages() -> Iterator[list[tuple[int, str, str]]]:
    """A list that receives what ffmpeg logs as errors in this thread: level, name of the component, message."""
    import av.logging

    with _LOG_SETTINGS, av.logging.Capture() as messages:
        yield messages


def _damage_in(messages: list[tuple[int, str, str]], container_format: str, codec: str) -> str:
    """The first message about damage; the list is emptied.

    Demuxers complain about damage only. Of the decoders only HEVC's is listened to, which marks no frame; others also
    complain about good files.
    """
    found = (text for _, name, text in messages if name == container_format or name == codec == "hevc")
    message = " ".join(next(found, "").split())
    messages.clear()
    return message
