"""The authors' AdamW and torch's, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class GuardedOptimizer(torch.optim.Optimizer):
    """AdamW in one fused kernel that clips the gradients, and that changes nothing if they are not finite.

    Both are decided on the device: ``step()`` never waits for it. Under ZeRO the parameters are flat shards, each with
    the weights of several layers or a part of one.
    """

    grad_divisor: Tensor | None = None
    """Gradients are divided by it, which clips them; shape []."""
    found_inf: Tensor | None = None
    """If it is 1, ``step()`` changes nothing; if 0, it updates. Float32, shape []."""
    ema = 0.0
    """Decay of the running mean of the weights, which is part of the optimiser's state; 0: none."""
    num_updates = 0
    """Updates done, by which Adam corrects its moments."""
    counts_updates = True
    """Whether ``step()`` increments ``num_updates``. ZeRO calls it once for each shard, so the engine counts there."""

    def prepare(self, parameters: list[Tensor]) -> None:
        """Create the state of ``parameters`` before the first step, so that a checkpoint can be loaded into it."""
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            if self.ema:
                state["ema"] = parameter.detach().clone()

    def set_num_updates(self, number: int) -> None:
        """Continue after ``number`` updates."""
        self.num_updates = number
        for state in self.state.values():
            state["step"].fill_(number)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None
        if self.counts_updates:
            self.num_updates += 1
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            self.prepare([parameter for parameter in parameters if not self.state[parameter]])
            self._update(group, parameters)
            if self.ema:
                weight = self._unless_skipped(1 - self.ema, 0.0, parameters[0].device)
                for parameter in parameters:
                    self.state[parameter]["ema"].lerp_(parameter, weight)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        self._fused_adamw(group, parameters, group["eps"], group["weight_decay"])

    def _fused_adamw(self, group: dict[str, Any], parameters: list[Tensor], eps: float, weight_decay: float) -> None:
        states = [self.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        # The kernel behind torch.optim.AdamW(fused=True), which takes no eps that changes from step to step.
        torch._fused_adamw_(  # pyright: ignore[reportCallIssue]
            parameters,
            [parameter.grad for parameter in parameters],  # pyright: ignore[reportArgumentType]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_divisor,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def _unless_skipped(self, value: float, otherwise: float, device: torch.device) -> Tensor:
        """``value``, or ``otherwise`` if this update is skipped; shape []."""
        chosen = torch.full((), value, dtype=torch.float32, device=device)
        return chosen if self.found_inf is None else torch.where(self.found_inf > 0, otherwise, chosen)


class TorchAdamW(GuardedOptimizer):
    """``torch.optim.AdamW``."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})


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

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        # m / (sqrt(v) + eps) * sqrt(c) = m / (sqrt(v) / sqrt(c) + eps / sqrt(c)), with c = 1 - beta2^t.
        correction = math.sqrt(1 - group["betas"][1] ** self.num_updates)
        self._fused_adamw(group, parameters, group["eps"] / correction, weight_decay=0.0)
        decay = self._unless_skipped(1 - group["lr"] * group["weight_decay"], 1.0, parameters[0].device)
        torch._foreach_mul_(parameters, decay)


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the peak rate at ``step`` (from 0): linear warm-up from 0, then half a cosine to 0."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))
