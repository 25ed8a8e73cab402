"""The authors' AdamW and torch's, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimiser that can skip an update and that keeps a running mean of the weights.

    Under ZeRO its parameters are flat shards, each with the weights of several layers or a part of one.
    """

    skip_update = False
    """If set, ``step()`` changes nothing; every rank sets it when a gradient is not finite."""
    ema = 0.0
    """Decay of the running mean of the weights, which is part of the optimiser's state; 0: none."""

    def prepare(self, parameters: list[Tensor]) -> None:
        """Create the state of ``parameters`` before the first step, so that a checkpoint can be loaded into it."""
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            if self.ema:
                state["ema"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None
        if self.skip_update:
            return
        self._update()
        if self.ema:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.state[parameter]["ema"].lerp_(parameter, 1 - self.ema)

    def _update(self) -> None:
        raise NotImplementedError


class TorchAdamW(GuardedOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW``."""

    def _update(self) -> None:
        torch.optim.AdamW.step(self)


class AuthorsAdamW(GuardedOptimizer):
    """AdamW as the published code computes it.

    It differs from ``torch.optim.AdamW`` in two places: ``eps`` is added to ``sqrt(v)`` before the bias correction, and
    the decay is applied to the updated parameter.
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

    def _update(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.prepare([parameter])
                state = self.state[parameter]
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
