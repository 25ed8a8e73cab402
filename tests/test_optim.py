"""The optimisers: their formulas, clipping, and a skipped update that leaves no trace."""

import pytest
import torch
from torch import Tensor

from tmass_dist.training.optim import AuthorsAdamW, GuardedOptimizer, TorchAdamW

STEPS, LR, DECAY = 5, 1e-2, 0.2


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(7, 3, generator=generator), torch.randn(129, generator=generator)]


def parameters() -> list[Tensor]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, 21).view(7, 3)), torch.nn.Parameter(torch.linspace(0, 2, 129))]


def run(optimizer: torch.optim.Optimizer, weights: list[Tensor], steps: list[int]) -> list[Tensor]:
    for step in steps:
        for weight, gradient in zip(weights, gradients(step)):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def published(steps: int) -> list[Tensor]:
    """The update of the authors' code, written out in float64."""
    weights = [weight.detach().double() for weight in parameters()]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(steps):
        for number, gradient in enumerate(gradients(step)):
            gradient = gradient.double()
            first[number] = 0.9 * first[number] + 0.1 * gradient
            second[number] = 0.999 * second[number] + 0.001 * gradient.square()
            rate = LR * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
            weights[number] = weights[number] - rate * first[number] / (second[number].sqrt() + 1e-6)
            weights[number] = weights[number] - LR * DECAY * weights[number]
    return weights


def test_the_authors_adamw_is_the_published_formula() -> None:
    weights = parameters()
    trained = run(AuthorsAdamW(weights, lr=LR, weight_decay=DECAY), weights, list(range(STEPS)))
    for one, other in zip(trained, published(STEPS)):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-7)


def test_torchs_adamw_is_torch_optim_adamw() -> None:
    ours, torchs = parameters(), parameters()
    one = run(TorchAdamW(ours, lr=LR, weight_decay=DECAY), ours, list(range(STEPS)))
    other = run(torch.optim.AdamW(torchs, lr=LR, weight_decay=DECAY), torchs, list(range(STEPS)))
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [AuthorsAdamW, TorchAdamW])
def test_a_skipped_update_leaves_no_trace(kind: type[GuardedOptimizer]) -> None:
    states = []
    for steps in ([0, 1, 2], [0, 2]):
        weights = parameters()
        optimizer = kind(weights, lr=LR, weight_decay=DECAY)
        optimizer.ema, optimizer.counts_updates = 0.9, False
        for step in steps:
            is_skipped = step == 1
            optimizer.found_inf = torch.tensor(float(is_skipped))
            optimizer.num_updates += not is_skipped
            run(optimizer, weights, [step])
        state = [optimizer.state[weight][key] for weight in weights for key in ("exp_avg", "exp_avg_sq", "ema", "step")]
        states.append([*(weight.detach() for weight in weights), *state])
    assert all(torch.equal(one, other) for one, other in zip(*states))


@pytest.mark.parametrize("kind", [AuthorsAdamW, TorchAdamW])
def test_clipping_in_the_kernel_is_clipping_before_it(kind: type[GuardedOptimizer]) -> None:
    trained = []
    for clips_itself in (True, False):
        weights = parameters()
        optimizer = kind(weights, lr=LR, weight_decay=DECAY)
        for step in range(STEPS):
            for weight, gradient in zip(weights, gradients(step)):
                weight.grad = gradient.clone()
            norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
            if clips_itself:
                optimizer.grad_divisor = ((norm + 1e-6) / 0.5).clamp(min=1.0)
            else:
                torch.nn.utils.clip_grad_norm_(weights, 0.5)
            optimizer.step()
        trained.append([weight.detach() for weight in weights])
    for one, other in zip(*trained):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
