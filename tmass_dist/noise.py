"""Noise keyed by what it is for, so that it depends on no world size, tiling or order."""

# Shapes: N keys.

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def text_key(*parts: str | int) -> int:
    """A stable 63-bit key of names and numbers; the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mix(x: Tensor) -> Tensor:
    """A well-mixing permutation of 32-bit numbers held in int64 ("lowbias32", Ellis 2018)."""
    # A product of two 32-bit numbers wraps in int64, but its low 32 bits are right, and only those are kept.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _uniform(keys: Tensor, num_values: int, seed: int, stream: int) -> Tensor:
    counter = torch.arange(num_values, dtype=torch.int64, device=keys.device)
    low, high = keys & _MASK, (keys >> 32) & _MASK
    row = _mix(low ^ _mix(high ^ _mix(torch.full_like(high, (seed * 2 + stream) & _MASK))))
    second = _mix(high ^ row)
    bits = _mix(_mix(counter[None] ^ row[:, None]) ^ second[:, None])
    return (bits >> 8).to(torch.float32) * 2.0**-24


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
        float32 ``(N, num_values)``; row ``i`` depends on ``keys[i]`` and ``seed`` alone.
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
