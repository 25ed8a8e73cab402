"""Pooling in tiles: the same numbers in bounded memory; and the numbers exchanged in a step."""

# Shapes: N pairs of the global batch, F frames.

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import on_ranks
from tests.small_model import WIDTH, F, N, batch_of, config_of, own_rows, perturb
from tmass_dist.config import ModelConfig, StochasticConfig
from tmass_dist.training.objective import _Pooling, build_objective, global_losses


def test_micro_batches_and_pooling_in_tiles_change_no_number() -> None:
    """The pooling in tiles, with its dropout drawn again for the backward pass."""
    found = []
    # A video takes N * WIDTH * 8 bytes * 8 copies = 24.6 kB: 5 videos to a tile, the last one of 2.
    for memory_mb in (None, 0.125):
        config = config_of()
        torch.manual_seed(0)
        model = build_objective(config).train().double()
        perturb(model)
        _, _, noise, keys = batch_of(0)
        text = noise.flip(0).double().requires_grad_()
        frames = torch.randn(N, F, WIDTH, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
        losses = global_losses(
            model.head,
            text,
            frames,
            noise.double(),
            model.towers.logit_scale,
            StochasticConfig(),
            dropout_keys=keys,
            memory_mb=memory_mb,
        )
        losses.total.backward()
        found.append([losses.total, text.grad, frames.grad, *(p.grad for p in model.head.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _peak_of_pooling(memory_mb: float | None) -> float:
    """MB that autograd holds after the forward of 64 videos by 512 texts."""
    from tmass_dist.models.head import build_head

    head = build_head(ModelConfig(num_frames=F, dropout=0.3), WIDTH).train()
    held: set[tuple[int, int]] = set()

    def keep(tensor: Tensor) -> Tensor:
        held.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    text = torch.randn(512, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pooling = _Pooling(head, text, torch.randn(64, F, WIDTH, requires_grad=True), list(range(64)), memory_mb)
        kept = pooling.map(lambda pairs, _: pairs.mean_VD)
    assert kept.requires_grad
    return sum(size for _, size in held) / 2**20


def test_pooling_in_tiles_holds_less_than_its_budget() -> None:
    whole, tiled = _peak_of_pooling(None), _peak_of_pooling(4.0)
    assert tiled < 4.0 < whole, (whole, tiled)


def _numbers_sent() -> tuple[int, int]:
    """Numbers gathered in the forward and summed in the backward of one objective."""
    from tmass_dist.models.head import build_head

    sent = {"gathered": 0, "summed": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting_gather(parts: list[Tensor], local: Tensor, **more: Any) -> Any:
        sent["gathered"] += sum(part.numel() for part in parts)
        return gather(parts, local, **more)

    def counting_reduce(tensor: Tensor, **more: Any) -> Any:
        sent["summed"] += tensor.numel()
        return reduce(tensor, **more)

    dist.all_gather, dist.all_reduce = counting_gather, counting_reduce
    _, _, noise, keys = own_rows(batch_of(0))
    head = build_head(ModelConfig(num_frames=F), WIDTH).train()
    text, frames = (
        torch.randn(len(keys), WIDTH, requires_grad=True),
        torch.randn(len(keys), F, WIDTH, requires_grad=True),
    )
    losses = global_losses(head, text, frames, noise, torch.ones(1), StochasticConfig(), dropout_keys=keys)
    losses.total.backward()
    return sent["gathered"], sent["summed"]


def test_communication_of_a_step_is_3nd_and_2n2(tmp_path: Path) -> None:
    for gathered, summed in on_ranks(2, _numbers_sent, tmp_path=tmp_path):
        assert gathered == summed == 3 * N * WIDTH + 2 * N * N
