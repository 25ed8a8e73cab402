"""Noise keyed by what it is for, so that it depends on no world size, tiling or order."""

# Shapes: N keys.

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor


def text_key(*parts: str | int) -> int:
    """A stable 63-bit key of names and numbers; the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mix(x: Tensor) -> Tensor:
    """A well-mixing permutation of 32-bit numbers ("lowbias32", Ellis 2018), held in int32."""
    # Shifts of a negative int32 bring in ones, which the masks remove; products wrap, which is what is wanted.
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def _uniform(keys: Tensor, num_values: int, seed: int, stream: int) -> Tensor:
    counter = torch.arange(num_values, dtype=torch.int32, device=keys.device)
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    start = torch.full_like(keys, (seed * 2 + stream) & 0xFFFFFFFF).to(torch.int32)
    row = _mix(low ^ _mix(high ^ _mix(start)))
    second = _mix(high ^ row)
    bits = _mix(_mix(counter[None] ^ row[:, None]) ^ second[:, None])
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def keyed_noise(
    keys: Tensor, num_values: int, *, seed: int, prior: Literal["uniform", "normal"] = "uniform", std: float = 1.0
) -> Tensor:
    """Noise of each key.

    Args:
        keys: int64 ``(N,)``, as :func:`text_key` makes them.
        num_values: numbers for each key.
        seed: the run's seed.
        prior: ``uniform`` on [0, 1), which ignores ``std``; ``normal`` centred on zero.
        std: standard deviation of the normal prior.

    Returns:
        float32 ``(N, num_values)``; row ``i`` depends on ``keys[i]`` and ``seed`` alone. Uniform noise is whole numbers
        until an exact last step, and so the same bits on every device; normal noise is that of its device to rounding.
    """
    first = _uniform(keys, num_values, seed, 0)
    if prior == "uniform":
        return first
    second = _uniform(keys, num_values, seed, 1)
    # Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite.
    return std * (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)


def keyed_mask(keys: list[int], like: Tensor, probability: float) -> Tensor:
    """What dropout keeps: one, or zero with ``probability`` (to 2^-17), of the shape and kind of ``like``.

    Row ``i`` is drawn from ``keys[i]`` alone, and so is the same whatever rank holds it; CPU and GPU draw different
    ones.
    """
    size = like[0].numel()
    # Four draws of 16 bits in each.
    words = torch.empty(len(keys), -(-size // 4), dtype=torch.int64, device=like.device)
    generator = torch.Generator(like.device)
    for row, key in zip(words, keys):
        row.random_(-(2**63), None, generator=generator.manual_seed(key))
    # Written as numbers at once: truth values would be made into them at three times the price.
    keep, drawn = torch.empty_like(like), words.view(torch.int16)[:, :size]
    torch.ge(drawn, round(probability * 2**16) - 2**15, out=keep.flatten(1))
    return keep
