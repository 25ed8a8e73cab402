"""From a video to pictures: PyAV, sequential, no seeks; only the frames that are kept are converted."""

# Shapes: F frames, S side of a picture in pixels; RGBX is red, green, blue and a byte without meaning.

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tmass_dist.data.frames import window_frame_indices


class BadVideoError(ValueError):
    """A video that cannot be packed; the message is the reason written to the quarantine."""


@dataclass(frozen=True)
class Timeline:
    """When each frame is shown: ``times_s``, seconds from the first one, at ``fps`` frames a second on average."""

    times_s: np.ndarray
    fps: float

    def __len__(self) -> int:
        return len(self.times_s)

    @cached_property
    def is_constant(self) -> bool:
        """Whether every frame comes where the frame rate says, to one frame."""
        return bool((np.abs(self.times_s * self.fps - np.arange(len(self))) <= 1).all())

    def frame_at(self, seconds: float) -> float:
        """The frame number at a time; of a constant rate as the authors count, in fractions of a frame."""
        return seconds * self.fps if self.is_constant else float(np.searchsorted(self.times_s, seconds))

    def window(self, start_s: float | None, end_s: float | None) -> tuple[float, float]:
        """First frame of a part in seconds, and the frame after its last."""
        end = float(len(self)) if end_s is None else min(float(len(self)), self.frame_at(end_s))
        return self.frame_at(start_s or 0.0), end


Choose = Callable[[Timeline], list[int]]
"""Which frames to take of a video; ValueError where it has none there."""


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

    Frames are counted by decoding, since headers lie: the header, or packets where it has no count, says which frames
    to keep in the first pass, and where other frames decode, a second pass takes the right ones. Memory holds ``F``
    pictures.

    Args:
        source: a file, or its bytes.
        choose: which frames.
        side: of the pictures, pixels.
        end_s: nothing after it is decoded.

    Returns:
        The frames, and facts: frames decoded, those taken, what the decoder complained of, seconds and codec.

    Raises:
        BadVideoError: nothing decodes, no video stream, the file is missing, or has no frame there.
    """
    if isinstance(source, Path) and not source.is_file():
        raise BadVideoError("the file is missing")
    if not (source.stat().st_size if isinstance(source, Path) else len(source)):
        raise BadVideoError("the file is empty")
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
    import av

    try:
        container = av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source))
    except av.FFmpegError as error:
        raise BadVideoError(" ".join(str(error).split())) from error
    # The picture on a record's sleeve is a stream of one frame, and no video.
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        container.close()
        raise BadVideoError("no video stream")
    streams[0].thread_type = "NONE"
    return container, streams[0]


def _rate(stream: Any) -> float:
    return float(stream.average_rate or stream.base_rate or 25)


def _count_packets(source: Path | bytes) -> Timeline:
    """What would decode if every packet does."""
    import av

    container, stream = _open(source)
    with container:
        rate, times = _rate(stream), []
        try:
            for packet in container.demux(stream):
                if packet.size:
                    time = packet.pts if packet.pts is not None else packet.dts
                    times.append(len(times) / rate if time is None else float(time * packet.time_base))
        except av.FFmpegError:  # a torn end; decoding tells where
            pass
    times_s = np.sort(np.array(times or [0.0]))
    return Timeline(times_s - times_s[0], rate)


def _decode(
    source: Path | bytes, choose: Choose, side: int, end_s: float | None
) -> tuple[dict[int, np.ndarray], Timeline, dict[str, Any]]:
    """One pass: the frames that would be chosen if the header is right, when each frame is shown, and facts."""
    import av

    kept: dict[int, np.ndarray] = {}
    times: list[float] = []
    damaged = None
    container, stream = _open(source)
    with container:
        rate = _rate(stream)
        claimed = Timeline(np.arange(stream.frames) / rate, rate) if stream.frames else _count_packets(source)
        try:
            wanted = set(choose(claimed))
        except ValueError:  # the count of what decodes will tell
            wanted = set()
        try:
            for frame in container.decode(stream):
                time = len(times) / rate if frame.time is None else frame.time
                if end_s is not None and times and time - times[0] > end_s:
                    break
                if len(times) in wanted:
                    kept[len(times)] = _picture(frame, side)
                times.append(time)
        except av.FFmpegError as error:
            damaged = str(error)
    times_s = np.array(times)
    if times:
        times_s -= times_s[0]
    facts = {
        "num_decoded_frames": len(times),
        "damaged_end": damaged,
        "fps": round(rate, 3),
        "seconds": round(float(times_s[-1]) + 1 / rate, 3) if times else 0.0,
        "codec": stream.codec_context.name,
    }
    return kept, Timeline(times_s, rate), facts


@cache
def _reformatter() -> Any:
    """One for all frames: to lay out a filter takes longer than to apply it."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def _picture(frame: Any, side: int) -> np.ndarray:
    short = min(frame.width, frame.height)
    # The long side to an even number: swscale takes three times as long for an odd one.
    width, height = (max(side, 2 * round(length * side / short / 2)) for length in (frame.width, frame.height))
    # One step of swscale converts colours and resizes; its bicubic filter widens with the ratio, as an antialias does.
    # To RGBA it takes a third of the time that it takes to RGB; more than one thread helps no process of several.
    converted = _reformatter().reformat(frame, width, height, format="rgba", interpolation="BICUBIC", threads=1)
    left, top = (width - side) // 2, (height - side) // 2
    square = converted.to_ndarray()[top : top + side, left : left + side]
    quarter_turns = round((getattr(frame, "rotation", 0) or 0) / 90)
    return np.ascontiguousarray(np.rot90(square, quarter_turns))
