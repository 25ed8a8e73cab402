"""The authors' AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch


class AuthorsAdamW(torch.optim.Optimizer):
    """AdamW as the published code computes it: eps before the bias correction, decay after the update.

    Against ``torch.optim.AdamW``: ``eps`` is added to ``sqrt(v)`` before ``v`` is corrected for its start at zero,
    and the decay is taken from the parameter already updated.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                count = state["step"].item()
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                rate = group["lr"] * math.sqrt(1 - beta2**count) / (1 - beta1**count)
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the peak rate at ``step`` (from 0): linear warm-up from 0, then half a cosine to 0."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))
