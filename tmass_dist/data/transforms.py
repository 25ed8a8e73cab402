"""Resize frames to the input size of the towers: a centre crop for evaluation, a random crop and flip for training."""

# Shapes: B videos, F frames, H W pixels, C colours.

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop, pixels."""


def resize_centre_crop(pixels_BFHWC: Tensor, side: int) -> Tensor:
    """The evaluation transform: resize the short side to ``side`` (bicubic, antialiased), then crop the centre square.

    Frames that already have this size are returned unchanged; all others become float32. Values keep their scale.

    Source: the authors' test transform, as current torchvision computes it.
    """
    height, width = pixels_BFHWC.shape[2:4]
    if height == width == side:
        return pixels_BFHWC
    short = min(height, width)
    size = (int(side * height / short), int(side * width / short))
    resized = _interpolate(pixels_BFHWC, size, "bicubic")
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return resized[:, :, top : top + side, left : left + side]


def crop_flip(pixels_FHWC: Tensor, box: Box, flip: bool, side: int) -> Tensor:
    """The training transform of one video: one crop and flip for all its frames, resized (bilinear) to ``side``."""
    top, left, height, width = box
    crop = pixels_FHWC[None, :, top : top + height, left : left + width]
    crop = _interpolate(crop, (side, side), "bilinear")[0]
    return crop.flip(2) if flip else crop


def random_box(height: int, width: int, rng: np.random.Generator) -> Box:
    """A random crop: 0.5 to 1 of the area, aspect ratio between 3:4 and 4:3. If no crop fits: the whole frame.

    Source: torchvision's RandomResizedCrop with scale (0.5, 1), as the authors use it.
    """
    for _ in range(10):
        area = height * width * rng.uniform(0.5, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return 0, 0, height, width


def augment(pixels_BFHWC: Tensor, keys: list[int], side: int) -> Tensor:
    """Crop and flip every video at random: float32 ``(B, F, side, side, C)``. Each crop depends on its key alone."""
    height, width = pixels_BFHWC.shape[2:4]
    videos = []
    for pixels_FHWC, key in zip(pixels_BFHWC, keys):
        rng = np.random.default_rng(key)
        box = random_box(height, width, rng)
        videos.append(crop_flip(pixels_FHWC, box, bool(rng.integers(2)), side))
    return torch.stack(videos)


def _interpolate(pixels_BFHWC: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    flat = pixels_BFHWC.flatten(0, 1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(flat, size=size, mode=mode, antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1).unflatten(0, pixels_BFHWC.shape[:2])
