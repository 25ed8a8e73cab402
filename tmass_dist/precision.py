"""The number formats of the towers. Everything else, the loss and the scores included, is float32 without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from tmass_dist.config import EngineConfig

if TYPE_CHECKING:
    import torch


def uses_bf16(config: EngineConfig, device: torch.device) -> bool:
    """Whether the towers run in bfloat16; ``engine.bf16=auto`` does so on GPUs whose hardware has it."""
    import torch

    if config.bf16 == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(config.bf16)


def use_tf32(enabled: bool) -> None:
    """Let float32 matrix products and convolutions of the GPU use TF32, or not."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled


@contextmanager
def tower_precision(config: EngineConfig, device: torch.device) -> Iterator[None]:
    """Encode within this context, in training and in evaluation: autocast and TF32 as the config says."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    use_tf32(config.tf32)
    try:
        in_bf16 = uses_bf16(config, device)
        # On CPUs the backward pass of torch's fused attention takes several times as long in bfloat16 as the plain one.
        plain = sdpa_kernel(SDPBackend.MATH) if in_bf16 and device.type == "cpu" else nullcontext()
        # Autocast leaves the weights, their gradients and the optimiser in float32.
        with plain, torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            yield
    finally:
        use_tf32(False)
