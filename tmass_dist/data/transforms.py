"""Resize frames to the input size of the towers: a centre crop for evaluation, a random crop and flip for training."""

# Shapes: B videos, F frames, H W pixels, C colours, T tries of a crop, N draws.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.noise import keyed_noise

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


def random_crops(keys_B: Tensor, height: int, width: int) -> tuple[list[Box], list[bool]]:
    """For each key a random crop (0.5 to 1 of the area, aspect ratio between 3:4 and 4:3), and whether to flip it.

    Up to ten crops are drawn for each key, and the first that fits is taken; if none does, it is the whole frame.

    Args:
        keys_B: int64, as :func:`~tmass_dist.noise.text_key` makes them; each crop depends on its key alone.
        height, width: of a frame, pixels.

    Source: torchvision's RandomResizedCrop with scale (0.5, 1), as the authors use it.
    """
    # On the CPU: crops are cut by numbers that the host knows, and the numbers do not depend on the GPU.
    draws_BN = keyed_noise(keys_B.cpu(), 2 * _TRIES + 3, seed=0).double()
    area_BT, ratio_BT, (top_B, left_B, flip_B) = (
        draws_BN[:, :_TRIES] * 0.5 + 0.5,
        torch.exp((draws_BN[:, _TRIES : 2 * _TRIES] * 2 - 1) * math.log(4 / 3)),
        draws_BN[:, 2 * _TRIES :].unbind(1),
    )
    width_BT = (height * width * area_BT * ratio_BT).sqrt().round()
    height_BT = (height * width * area_BT / ratio_BT).sqrt().round()
    fits_BT = (width_BT >= 1) & (width_BT <= width) & (height_BT >= 1) & (height_BT <= height)
    first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)  # the first of several maxima
    fits_B = fits_BT.any(dim=1)
    height_B = torch.where(fits_B, height_BT.gather(1, first_B1)[:, 0], height)
    width_B = torch.where(fits_B, width_BT.gather(1, first_B1)[:, 0], width)
    top_B, left_B = (top_B * (height - height_B + 1)).floor(), (left_B * (width - width_B + 1)).floor()
    boxes_B4 = torch.stack([top_B, left_B, height_B, width_B], dim=1).long()
    return [tuple(box) for box in boxes_B4.tolist()], (flip_B >= 0.5).tolist()


_TRIES = 10


def augment(pixels_BFHWC: Tensor, keys_B: Tensor, side: int) -> Tensor:
    """Crop and flip every video at random: float32 ``(B, F, side, side, C)``. Each crop depends on its key alone."""
    height, width = pixels_BFHWC.shape[2:4]
    # The crops differ in size, so each video is resized by a call of its own. On a CPU one product of all videos with
    # matrices of the filter's weights takes 2.4 times as long, because most of the weights are zero.
    crops = zip(pixels_BFHWC, *random_crops(keys_B, height, width))
    return torch.stack([crop_flip(pixels_FHWC, box, flip, side) for pixels_FHWC, box, flip in crops])


def _interpolate(pixels_BFHWC: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    flat = pixels_BFHWC.flatten(0, 1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(flat, size=size, mode=mode, antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1).unflatten(0, pixels_BFHWC.shape[:2])
