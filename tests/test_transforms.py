"""Random crops and flips: their ranges, and that each depends on its key alone."""

# Shapes: B videos, F frames, H W pixels, C colours.

import math

import pytest
import torch

from tmass_dist.data.transforms import Box, augment, crop_flip, random_crops
from tmass_dist.noise import keyed_noise, text_key

KEYS_B = torch.tensor([text_key("crop", number) for number in range(2000)])


def plain_crop(key: int, height: int, width: int) -> tuple[Box, bool]:
    """The crop of one key, one try after the other."""
    draws = keyed_noise(torch.tensor([key]), 23, seed=0)[0].tolist()
    flip = draws[22] >= 0.5
    for area, ratio in zip(draws[:10], draws[10:20]):
        pixels, aspect = height * width * (0.5 + 0.5 * area), (4 / 3) ** (2 * ratio - 1)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            return (int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w), flip
    return (0, 0, height, width), flip


@pytest.mark.parametrize(("height", "width"), [(256, 320), (224, 224), (8, 8), (40, 400), (1, 1)])
def test_crops_of_a_batch_are_those_of_single_keys(height: int, width: int) -> None:
    boxes, flips = random_crops(KEYS_B[:500], height, width)
    assert list(zip(boxes, flips)) == [plain_crop(key, height, width) for key in KEYS_B[:500].tolist()]


def test_crops_have_the_ranges_of_random_resized_crop() -> None:
    height, width = 256, 320
    boxes, flips = random_crops(KEYS_B, height, width)
    top, left, h, w = torch.tensor(boxes, dtype=torch.float64).unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    area, ratio = h * w / (height * width), w / h
    assert 0.495 < area.min() < 0.52 and 0.95 < area.max() < 1.0
    assert 0.745 < ratio.min() < 0.77 and 1.31 < ratio.max() < 1.34
    at_top, at_left = top / (height - h).clamp(min=1), left / (width - w).clamp(min=1)
    assert 0.45 < at_top[h < height].mean() < 0.55 and 0.45 < at_left[w < width].mean() < 0.55
    assert 900 < sum(flips) < 1100
    assert len(set(boxes)) > 1990


def test_a_frame_into_which_no_crop_fits_is_taken_whole() -> None:
    boxes, _ = random_crops(KEYS_B[:200], 10, 1000)
    assert set(boxes) == {(0, 0, 10, 1000)}


def test_augmentation_belongs_to_the_pair_and_is_one_crop_for_all_frames() -> None:
    pixels = torch.arange(2 * 1 * 8 * 8 * 3, dtype=torch.uint8).view(2, 1, 8, 8, 3).expand(2, 4, 8, 8, 3)
    both = augment(pixels, torch.tensor([1, 2]), 8)
    assert torch.equal(augment(pixels[1:], torch.tensor([2]), 8)[0], both[1])
    assert all(torch.equal(both[:, 0], both[:, frame]) for frame in range(4))
    assert not torch.equal(both[0], pixels[0].float())
    [box, _], [flip, _] = random_crops(torch.tensor([1, 2]), 8, 8)
    assert torch.equal(both[0], crop_flip(pixels[0], box, flip, 8))
