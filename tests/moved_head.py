"""A model with the demo's pretrained towers whose head is not that of a new model any more."""

from __future__ import annotations

from typing import Any

import torch

from tmass_dist import TMass
from tmass_dist.config import load_config
from tmass_dist.models.tmass import build_model


def moved_head_model(*overrides: str, result: dict[str, Any] | None = None) -> TMass:
    """The demo's model with random changes of the head's weights, as a training would leave it.

    Args:
        overrides: of ``demo.yaml``.
        result: what the model card states of the checkpoint.
    """
    torch.manual_seed(0)
    config = load_config("demo.yaml", list(overrides))
    whole = build_model(config.model)
    with torch.no_grad():
        for value in whole.head.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return TMass.of_weights(config, whole.state_dict(), "this test", result)
