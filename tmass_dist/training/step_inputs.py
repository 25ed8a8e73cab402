"""The inputs of one training step: pixels, tokens, noise and dropout keys."""

# Shapes: B pairs of this rank, D embedding width.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tmass_dist.config import Config
from tmass_dist.data.transforms import augment, resize_centre_crop
from tmass_dist.noise import keyed_noise, text_key

if TYPE_CHECKING:
    from tmass_dist.data.loader import Batch
    from tmass_dist.training.objective import Objective


def step_inputs(batch: Batch, step: int, model: Objective, config: Config, device: torch.device) -> tuple[Any, ...]:
    """The arguments of ``Engine.backward``: pixels, tokens, noise and dropout keys of this rank's pairs.

    Every random draw is keyed by seed, step and pair, so it is the same on any number of ranks and after a resume.
    The host waits for none of the copies (``tests/test_placement.py``).
    """
    pairs = list(zip(batch.video_ids, batch.caption_slots))
    noise_BD = None
    if model.head.draws_samples and config.stochastic.training == "sampled":
        noise_BD = keyed_noise(
            torch.tensor([text_key(step, *pair) for pair in pairs]),
            config.stochastic.samples * model.towers.embed_dim,
            seed=config.seed,
            prior=config.stochastic.prior,
            std=config.stochastic.prior_std,
        )
        noise_BD = _to_device(noise_BD, device).unflatten(1, (config.stochastic.samples, -1))
    pixels = batch.pixels_BFHWC.to(device, non_blocking=True)
    if config.data.augment:
        crop_keys_B = torch.tensor([text_key("crop", config.seed, step, *pair) for pair in pairs])
        pixels = augment(pixels, crop_keys_B, model.towers.image_size)
    else:
        pixels = resize_centre_crop(pixels, model.towers.image_size)
    dropout_keys = torch.tensor([text_key("dropout", config.seed, step, *pair) for pair in pairs])
    return pixels, _to_device(batch.tokens_BL, device), noise_BD, _to_device(dropout_keys, device)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy for which the host does not wait. From pageable memory CUDA waits for the copies queued before it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # torch uses this memory again only when the copy is done
    return tensor.to(device, non_blocking=True)
