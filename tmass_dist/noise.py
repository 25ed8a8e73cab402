"""Random numbers that are a function of a key, and so depend on no world size, tiling, order or device."""

# Shapes: N keys, V videos, T texts, D values of a pair.

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def text_key(*parts: str | int) -> int:
    """A 63-bit key of names and numbers, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _constant(value: int) -> Tensor:
    """Converting a Python number in each operation takes a quarter of the time of a mask."""
    return torch.tensor(value, dtype=torch.int32)


_ROUNDS = tuple(
    (_constant(shift), _constant(2 ** (32 - shift) - 1), factor and _constant(factor))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, None))
)


def _mix(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers held in int32 ("lowbias32", Ellis 2018), written into ``x``; it is one to one."""
    shifted = torch.empty_like(x)
    for shift, ones, factor in _ROUNDS:
        # Shifting a negative int32 brings in ones, which the mask removes.
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_(ones))
        if factor is not None:
            x.mul_(factor)  # it wraps around, as the hash requires
    return x


def _states(keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Two int32 numbers for each key, hashed with ``start``."""
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    first = _mix(low ^ _mix(high ^ _mix(torch.full_like(keys, start & 0xFFFFFFFF).to(torch.int32))))
    return first, _mix(high ^ first)


def _uniform(keys: Tensor, num_values: int, seed: int, stream: int) -> Tensor:
    counter = torch.arange(num_values, dtype=torch.int32, device=keys.device)
    row, second = _states(keys, seed * 2 + stream)
    bits = _mix(_mix(counter[None] ^ row[:, None]) ^ second[:, None])
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def keyed_noise(
    keys: Tensor, num_values: int, *, seed: int, prior: Literal["uniform", "normal"] = "uniform", std: float = 1.0
) -> Tensor:
    """Random numbers of each key.

    Args:
        keys: int64 ``(N,)``, as :func:`text_key` makes them.
        num_values: numbers for each key.
        seed: the run's seed.
        prior: ``uniform`` on [0, 1), which ignores ``std``; ``normal`` centred on zero.
        std: standard deviation of the normal prior.

    Returns:
        float32 ``(N, num_values)``; row ``i`` depends on ``keys[i]`` and ``seed`` alone. Uniform noise has the same
        bits on every device, since it is computed in whole numbers until an exact last step. Normal noise differs
        between devices by rounding.
    """
    first = _uniform(keys, num_values, seed, 0)
    if prior == "uniform":
        return first
    second = _uniform(keys, num_values, seed, 1)
    # Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite.
    return std * (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)


def keyed_mask(keys: Sequence[int] | Tensor, like: Tensor, probability: float, first_text: int = 0) -> Tensor:
    """A dropout mask: zero with ``probability`` (to 2^-17), else one.

    Args:
        keys: one whole number of up to 63 bits for each video.
        like: ``(V, T, D)``; the mask has its shape, type and device.
        probability: of a zero.
        first_text: number of the first text in its batch, where ``like`` has only some of the texts.

    Returns:
        The mask. Row ``(i, t)`` depends on ``keys[i]`` and ``first_text + t`` alone, whichever rank or tile computes
        it, and has the same bits on every device.
    """
    _, num_texts, width = like.shape
    row_V, second_V = _states(torch.as_tensor(keys, dtype=torch.int64, device=like.device), _MASK)
    text_T = torch.arange(first_text, first_text + num_texts, dtype=torch.int32, device=like.device)
    pair_N1 = _mix(_mix(text_T ^ row_V[:, None]) ^ second_V[:, None]).view(-1, 1)
    counter_C = _mix(torch.arange(-(-width // 2), dtype=torch.int32, device=like.device))
    # Written as numbers of the type of ``like``: converting truth values later takes three times as long.
    keep = torch.empty_like(like, memory_format=torch.contiguous_format)
    threshold = round(probability * 2**16) - 2**15
    rows = len(pair_N1)
    if like.device.type == "cpu":  # a few pairs at a time: what the hash holds stays in the processor's cache
        rows = max(1, 2**16 // len(counter_C))
    for pair_n1, keep_nD in zip(pair_N1.split(rows), keep.view(-1, width).split(rows)):
        # Each 32-bit number gives two draws of 16 bits.
        draws = _mix(pair_n1 ^ counter_C).view(torch.int16)
        torch.ge(draws[:, :width], threshold, out=keep_nD)
    return keep


_MASK = 0x6D61736B
"""Hashed with the keys of masks, so that they share no numbers with noise of the same keys."""
