"""How often a damaged video gives frames that were never filmed, by codec and container; the table of docs/data.md.

60 known pictures are encoded, the file is damaged in one of five ways, and 12 frames are read from it. A frame counts
as invented if it is farther from every picture than one and a half times the loss of the codec plus 2 grey levels, and
as shifted if it shows a picture more than two places from its own.

Example:
    python benchmarks/damaged_videos.py --trials 60
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np

from tests.videos import CODECS, encode, moving_pictures
from tmass_dist.data.square import square_picture
from tmass_dist.data.video import BadVideoError, read_video, uniform

NUM_PICTURES, SIDE = 60, 48
CONTAINERS = {
    ("libx264", "yuv420p"): ("mp4", "matroska", "avi", "mov", "mpegts"),
    ("libx265", "yuv420p"): ("mp4", "matroska", "mov"),
    ("libvpx", "yuv420p"): ("webm", "matroska"),
    ("libvpx-vp9", "yuv420p"): ("webm", "matroska", "mp4"),
    ("libsvtav1", "yuv420p"): ("webm", "matroska", "mp4"),
    ("mpeg4", "yuv420p"): ("mp4", "matroska", "avi", "mov"),
    ("mpeg2video", "yuv420p"): ("mpeg", "mpegts", "matroska"),
    ("mjpeg", "yuvj420p"): ("mp4", "matroska", "avi", "mov"),
    ("wmv2", "yuv420p"): ("asf", "avi"),
    ("flv", "yuv420p"): ("flv",),
}
DAMAGES = ("cut off", "part lost", "zeros", "one bit", "16 bytes")
COLUMNS = ("refused", "end left out", "whole", *(f"invented: {damage}" for damage in DAMAGES), "shifted")


def damaged(content: bytes, damage: str, rng: random.Random) -> bytes:
    """A copy of the file with one damage at a random place after its first 2 %."""
    size = len(content)
    start = rng.randrange(size // 50, size)
    if damage == "cut off":
        return content[: max(start, size // 5)]
    if damage == "part lost":
        return content[:start] + content[start + rng.randrange(1, size // 3) :]
    if damage == "zeros":
        length = min(rng.randrange(50, 3000), size - start)
        return content[:start] + bytes(length) + content[start + length :]
    if damage == "one bit":
        return content[:start] + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :]
    return (content[:start] + rng.randbytes(16) + content[start + 16 :])[:size]


class Judge:
    """Compares frames with the pictures that were encoded."""

    def __init__(self, content: bytes) -> None:
        pictures = [av.VideoFrame.from_ndarray(p, format="rgb24") for p in moving_pictures(NUM_PICTURES)]
        self.true_NHWC = np.stack([square_picture(picture, SIDE)[..., :3].astype(int) for picture in pictures])
        frames, _ = read_video(content, uniform(12), SIDE)
        self.bound = 1.5 * max(self._nearest(frame)[1] for frame in frames) + 2

    def _nearest(self, frame_HWC: np.ndarray) -> tuple[int, float]:
        errors_N = np.abs(self.true_NHWC - frame_HWC[..., :3].astype(int)).mean(axis=(1, 2, 3))
        return int(errors_N.argmin()), float(errors_N.min())

    def verdict(self, content: bytes, damage: str) -> str:
        """One of ``COLUMNS``."""
        try:
            frames, facts = read_video(content, uniform(12), SIDE)
        except BadVideoError:
            return "refused"
        found = [self._nearest(frame) for frame in frames]
        if any(error > self.bound for _, error in found):
            return f"invented: {damage}"
        places = [index + facts["num_skipped_frames"] for index in facts["frame_indices"]]
        if any(abs(number - place) > 2 for (number, _), place in zip(found, places)):
            return "shifted"
        return "end left out" if facts["damaged_end"] else "whole"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60, help="damaged files of each codec and container")
    trials = parser.parse_args().trials
    av.logging.set_level(av.logging.PANIC)
    print("| codec | files | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 2) + "|")
    for (codec, pixels), containers in CONTAINERS.items():
        if codec not in av.codecs_available:
            continue
        counts: Counter[str] = Counter()
        for container in containers:
            CODECS["measured"] = container, codec, pixels
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "video"
                encode(path, moving_pictures(NUM_PICTURES), "measured")
                content = path.read_bytes()
            judge, rng = Judge(content), random.Random(f"{codec}/{container}")
            for trial in range(trials):
                damage = DAMAGES[trial % len(DAMAGES)]
                counts[judge.verdict(damaged(content, damage, rng), damage)] += 1
        cells = [str(counts[column] or "") for column in COLUMNS]
        print(f"| {codec} in {', '.join(containers)} | {trials * len(containers)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
