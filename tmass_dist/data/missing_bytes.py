"""Signs that bytes of a video file are missing which its decoder would not notice."""

from __future__ import annotations

import re
import struct
from pathlib import Path

HOLE = 64
"""So many zero bytes in a row are a part of the file that was never written, in the codecs below."""
_INSIDE = re.compile(rb"\0{%d}\0*[^\0\1]" % HOLE)
"""Zeros that something other than a start code (0 0 1) follows: packets may be filled up with zeros at their end."""
_ANYWHERE = re.compile(rb"\0{%d}" % HOLE)
HOLES: dict[str, re.Pattern[bytes]] = {
    **dict.fromkeys(["h264", "hevc", "vp8", "vp9", "av1", "libdav1d"], _INSIDE),
    **dict.fromkeys(["wmv1", "wmv2", "msmpeg4", "msmpeg4v1", "msmpeg4v2"], _ANYWHERE),
}
"""By codec: the zeros that it does not write. H.264 and HEVC forbid three in a row; the others wrote at most 6 in a
row, for black, white, still and noisy videos. MJPEG writes long runs."""

SLACK = 64
"""Bytes by which a header may claim too much: some programs count the header of the file twice."""
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def has_hole(packet: bytes, codec: str) -> bool:
    """Whether a packet has a run of zeros that an encoder does not write."""
    pattern = HOLES.get(codec)
    return pattern is not None and bytes(HOLE) in packet and pattern.search(packet) is not None


def missing_middle(source: Path | bytes) -> str:
    """Why an AVI or WMV file has lost bytes before its end; empty if it has not, or is of another container.

    These containers give no time for each frame, so a gap in their times is not seen. An AVI file has its index at its
    end: with the index, but fewer bytes than the header says, it lacks bytes before. A WMV file that is too short may
    lack them anywhere.
    """
    head = _part(source, 0, 65536)
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    claimed = 0
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        claimed = 8 + struct.unpack_from("<I", head, 4)[0]
        if claimed > size and not _ends_with_index(source, size):
            return ""  # it ends too early; what comes before is whole
    elif head[:16] == _ASF:
        position = head.find(_ASF_FILE_PROPERTIES)
        if 0 <= position <= len(head) - 92:
            is_live = head[position + 88] & 1  # the sizes of a live recording are unknown
            claimed = 0 if is_live else struct.unpack_from("<Q", head, position + 40)[0]
    return f"{claimed - size} of its {claimed} bytes are missing" if claimed > size + SLACK else ""


def _ends_with_index(source: Path | bytes, size: int) -> bool:
    tail_start = max(0, size - 2**24)
    tail = _part(source, tail_start, size)
    position = tail.rfind(b"idx1")
    if position < 0 or position + 8 > len(tail):
        return False
    return abs(tail_start + position + 8 + struct.unpack_from("<I", tail, position + 4)[0] - size) <= 1


def _part(source: Path | bytes, start: int, end: int) -> bytes:
    if isinstance(source, bytes):
        return source[start:end]
    with source.open("rb") as file:
        file.seek(start)
        return file.read(end - start)
