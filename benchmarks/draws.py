"""Random draws keyed by pair, all at once, against one generator for each video, in turn on one thread: JSON lines.

Version 0.1.0 seeded a generator for each video, both for its crop and for its dropout mask. Now each batch makes one
call, which hashes keys and counters (``tmass_dist/noise.py``). Masks are also compared with those of
``torch.nn.functional.dropout``, which depend on the number of ranks.
"""

# Shapes: B videos, T texts, D width.

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.data.transforms import augment, random_crops  # noqa: E402
from tmass_dist.noise import keyed_mask, text_key  # noqa: E402

WIDTH, DROPOUT, SIDE, FRAMES = 512, 0.3, 224, 12
TILES = ((8, 8), (32, 32), (16, 64), (4, 256))
"""Videos and texts of a mask, as the pooling draws them on a CPU: at most 2^19 numbers at a time."""


def crops_by_generators(keys: list[int], height: int, width: int) -> tuple[list[Any], list[bool]]:
    """Crops and flips as version 0.1.0 drew them."""
    boxes, flips = [], []
    for key in keys:
        rng = np.random.default_rng(key)
        box = 0, 0, height, width
        for _ in range(10):
            area = height * width * rng.uniform(0.5, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                box = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
                break
        boxes.append(box)
        flips.append(bool(rng.integers(2)))
    return boxes, flips


def mask_by_generators(keys: list[int], like: Tensor) -> Tensor:
    """Dropout masks as version 0.1.0 drew them: four draws of 16 bits in each number of one generator a video."""
    size = like[0].numel()
    words = torch.empty(len(keys), -(-size // 4), dtype=torch.int64)
    generator = torch.Generator()
    for row, key in zip(words, keys):
        row.random_(-(2**63), None, generator=generator.manual_seed(key))
    keep = torch.empty_like(like)
    torch.ge(words.view(torch.int16)[:, :size], round(DROPOUT * 2**16) - 2**15, out=keep.flatten(1))
    return keep


def compare(name: str, reference: str, ours: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Print the least time of each of several alternating calls, and the ratio."""
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - began < 3 and len(times) < 200):
        started = time.perf_counter()
        ours()
        middle = time.perf_counter()
        other()
        times.append((middle - started, time.perf_counter() - middle))
    our_s, other_s = (min(column) for column in zip(*times))
    line = {"name": name, "value": round(1e3 * our_s, 3), "unit": "ms"}
    print(json.dumps(line | {"reference": f"{reference}, {1e3 * other_s:.4g} ms", "ratio": round(other_s / our_s, 3)}))


def main() -> None:
    torch.set_num_threads(1)
    keys = [text_key("draws", number) for number in range(256)]
    keys_B = torch.tensor(keys)
    by_generators = "a generator for each video (0.1.0)"
    for B in (8, 64, 256):
        compare(
            f"crops-{B}-videos",
            by_generators,
            lambda B=B: random_crops(keys_B[:B], 256, 320),
            lambda B=B: crops_by_generators(keys[:B], 256, 320),
        )
    for B, T in TILES:
        like, name = torch.empty(B, T, WIDTH), f"masks-{B}-videos-{T}-texts"
        ours = partial(keyed_mask, keys_B[:B], like, DROPOUT)
        compare(name, by_generators, ours, partial(mask_by_generators, keys[:B], like))
        other = partial(torch.bernoulli, torch.empty_like(like).fill_(1 - DROPOUT))
        compare(name, "the mask of torch.nn.functional.dropout", ours, other)
    pixels = torch.randint(0, 256, (4, FRAMES, 256, 320, 3), dtype=torch.uint8)
    compare(
        "augment-4-videos",
        "drawing their crops alone",
        lambda: augment(pixels, keys_B[:4], SIDE),
        lambda: random_crops(keys_B[:4], 256, 320),
    )


if __name__ == "__main__":
    main()
