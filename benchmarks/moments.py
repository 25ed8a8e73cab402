"""How well the attention finds the moment that a caption describes, on the demo: JSON lines.

``python benchmarks/moments.py`` needs the demo's gallery (``make serve`` builds it) and the generator's
``moments.jsonl``. For each test caption and its own video, a moment is the run of frames around the best one whose
value is at least half way between the video's lowest and highest. A moment is right if its intersection with the true
one is at least half of their union (R@1 at IoU 0.5, the usual measure of moment retrieval).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402


def moment(values_F: np.ndarray, seconds: float) -> tuple[float, float]:
    """Start and end, in seconds, of the run of frames around the best one."""
    above = values_F >= (values_F.min() + values_F.max()) / 2
    first = last = int(values_F.argmax())
    while first > 0 and above[first - 1]:
        first -= 1
    while last + 1 < len(values_F) and above[last + 1]:
        last += 1
    return first * seconds / len(values_F), (last + 1) * seconds / len(values_F)


def iou(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union of two intervals."""
    both = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return both / (max(one[1], other[1]) - min(one[0], other[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=Path, default=ROOT / "build/demo/gallery")
    parser.add_argument("--videos", type=Path, default=ROOT / "build/demo/videos", help="of shards/demo_data.py")
    arguments = parser.parse_args()
    import torch.nn.functional as F

    from tmass_dist.retrieval.searcher import open_searcher

    if not (arguments.gallery / "gallery.json").is_file():
        print(json.dumps({"benchmark": "moments", "skipped": f"there is no {arguments.gallery}; make serve builds it"}))
        return
    searcher = open_searcher(arguments.gallery)
    model, gallery = searcher.model, searcher.gallery
    lines = (arguments.videos / "moments.jsonl").read_text(encoding="utf-8").splitlines()
    moments = {row["id"]: row["moments"] for row in map(json.loads, lines)}
    found: dict[str, list[float]] = {"attention": [], "best frame's cosine": [], "uniform guess": []}
    inside: dict[str, list[bool]] = {"attention": [], "best frame's cosine": [], "uniform guess": []}
    for row in map(json.loads, (arguments.videos / "manifest.jsonl").read_text(encoding="utf-8").splitlines()):
        if row["split"] != "test":
            continue
        number = gallery.rows[f"{row['id']}.mp4"]
        seconds, frames_1FD = gallery.video(number).seconds, gallery.frames([number])
        for caption, intervals in zip(row["captions"], moments[row["id"]]):
            if len(intervals) != 1:
                continue
            true = (intervals[0][0], intervals[0][1])
            text_1D = model.encode_text([caption])
            cosine_F = F.normalize(frames_1FD[0], dim=-1) @ F.normalize(text_1D[0], dim=-1)
            attention_F = model.attention(text_1D, frames_1FD)[0, 0]
            for name, values_F in (("attention", attention_F.numpy()), ("best frame's cosine", cosine_F.numpy())):
                found[name].append(iou(moment(values_F, seconds), true))
                inside[name].append(true[0] <= gallery.times(number)[int(values_F.argmax())] < true[1])
            count = len(attention_F)
            edges = np.arange(count + 1) * seconds / count
            every = [(edges[a], edges[b]) for a in range(count) for b in range(a + 1, count + 1)]
            found["uniform guess"].append(float(np.mean([iou(guess, true) >= 0.5 for guess in every])))
            inside["uniform guess"].append((true[1] - true[0]) / seconds)
    for name, values in found.items():
        hits = np.array(values) if name == "uniform guess" else np.array(values) >= 0.5
        print(
            json.dumps(
                {
                    "benchmark": "moments",
                    "method": name,
                    "captions": len(values),
                    "r_at_1_iou_0.5_percent": round(100 * float(hits.mean()), 1),
                    "standard_error": round(100 * float(hits.std() / len(hits) ** 0.5), 1),
                    "best_frame_in_the_moment_percent": round(100 * float(np.mean(inside[name])), 1),
                }
            )
        )


if __name__ == "__main__":
    main()
