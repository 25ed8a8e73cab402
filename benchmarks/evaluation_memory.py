"""Peak memory of one scoring task against the size of the gallery: a JSON line for each size, and the growth.

``python benchmarks/evaluation_memory.py [--videos 2000 10000] [--precision float16] [--texts 64]``. For V videos and V
texts, a feature store of random features (12 frames, 512 wide) is written in pieces. Then a task in a process of its
own, on one thread, opens it, checks it and computes one group of blocks, after which its memory does not grow. The
value is the peak resident set, the memory-mapped features included. ``--texts`` computes fewer texts than a group has,
which takes less time; what a whole group would have taken more is then added to the value.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NUM_FRAMES, WIDTH = 12, 512
VIDEOS_PER_PIECE = 500
LIMIT_MB = 4000
"""What a task may take for 100,000 texts x 100,000 videos."""


def write_store(directory: Path, num_videos: int, precision: str) -> None:
    """A store of random features, one caption for each video."""
    import torch

    from tmass_dist.config import load_config, to_yaml
    from tmass_dist.evaluation.features import Features, StoreWriter
    from tmass_dist.models.head import build_head

    config = load_config("msrvtt.yaml", ["model.pretrained=null"])
    ids = [f"v{number}" for number in range(num_videos)]
    writer = StoreWriter(directory, ids, (NUM_FRAMES, WIDTH), precision)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, num_videos, VIDEOS_PER_PIECE):
        some = ids[start : start + VIDEOS_PER_PIECE]
        frames_VFD = torch.randn(len(some), NUM_FRAMES, WIDTH, generator=generator)
        text_TD = torch.randn(len(some), WIDTH, generator=generator)
        captions = [f"caption of {video}" for video in some]
        owner_T = torch.arange(len(some))
        writer.add(Features(some, frames_VFD, [(video, 0) for video in some], captions, text_TD, owner_T))
    head = build_head(config.model, WIDTH).state_dict()
    about = {"fingerprint": f"{num_videos}", "config": to_yaml(config), "checkpoint": "none", "weights_sha256": "none"}
    writer.finish(head, about | {"split": "random"})


def compute_one_group(store: Path, most_texts: int | None) -> None:
    """What a task does, up to the end of its first group of blocks; prints texts, seconds and its peak memory."""
    import torch

    from tmass_dist.evaluation import blocks
    from tmass_dist.evaluation.stored import StoredSplit

    torch.set_num_threads(1)
    stored = StoredSplit(store, [])
    scorer = stored.scorer
    group = next(scorer._groups(scorer.blocks))
    whole = sum(texts.stop - texts.start for texts in group)
    if most_texts is not None:
        group = [texts for texts in group if texts.stop <= most_texts]
    scorer.blocks = group
    began = time.perf_counter()
    blocks.BlockFiles(store / "scores", scorer).compute(0, 1)
    [line] = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM:")]
    num_texts = sum(texts.stop - texts.start for texts in group)
    values_per_text = len(scorer.features.video_ids) + scorer.config.stochastic.num_trials * WIDTH
    found = {
        "num_texts": num_texts,
        "seconds": time.perf_counter() - began,
        "measured_mb": int(line.split()[1]) * 1024 / 1e6,
        "rest_of_group_mb": (whole - num_texts) * values_per_text * 4 / 1e6,
    }
    print(json.dumps(found))


def measure(num_videos: int, precision: str, most_texts: int | None) -> dict[str, float]:
    """Peak memory of a task for ``num_videos`` texts and videos."""
    with tempfile.TemporaryDirectory() as directory:
        write_store(Path(directory), num_videos, precision)
        command = [sys.executable, __file__, "--task", directory]
        command += [] if most_texts is None else ["--texts", str(most_texts)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/evaluation_memory.py", description=__doc__)
    parser.add_argument("--videos", type=int, nargs="+", default=[2000, 5000, 10000])
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32")
    parser.add_argument("--texts", type=int, help="most texts to compute; default: a whole group of blocks")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        compute_one_group(arguments.task, arguments.texts)
        return
    points = []
    for num_videos in arguments.videos:
        found = measure(num_videos, arguments.precision, arguments.texts)
        peak_mb = found["measured_mb"] + found["rest_of_group_mb"]
        points.append((num_videos, peak_mb))
        line = {
            "name": "evaluation-memory",
            "value": round(peak_mb),
            "unit": "MB",
            "n": num_videos,
            "reference": f"{LIMIT_MB} MB a task",
            "ratio": round(peak_mb / LIMIT_MB, 3),
            "precision": arguments.precision,
            "num_texts": found["num_texts"],
            "measured_mb": round(found["measured_mb"]),
            "seconds": round(found["seconds"], 1),
        }
        print(json.dumps(line), flush=True)
    if len(points) > 1:
        (small, low), (large, high) = points[-2], points[-1]
        line = {
            "name": "evaluation-memory-growth",
            "value": round(math.log(high / low) / math.log(large / small), 3),
            "unit": "exponent",
            "n": large,
            "reference": "1 is linear",
            "kb_per_video": round(1000 * (high - low) / (large - small), 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
