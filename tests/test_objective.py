"""The global-batch objective: any number of ranks gives the loss and the gradient of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import on_ranks
from tmass_dist.config import ModelConfig, StochasticConfig
from tmass_dist.models.head import build_head
from tmass_dist.models.pooling import XPool
from tmass_dist.noise import keyed_mask
from tmass_dist.training.losses import symmetric_info_nce
from tmass_dist.training.objective import global_losses

# Shapes: N pairs of the world, F frames, D embedding width.
N, F, D = 12, 4, 8


def _loss_and_gradients(variant: str, text_ND: Tensor, frames_NFD: Tensor, noise_ND: Tensor) -> dict[str, Tensor]:
    """The loss, this rank's input gradients, and its share of the parameters' gradients."""
    torch.manual_seed(0)
    radius, *more = variant.split("+")
    stochastic = StochasticConfig(
        kl_weight=0.3 if "kl" in more else 0.0,
        samples=3 if "several" in more else 1,
        trials="best" if "best" in more else "mean",
        training_radius="pair" if "pairs" in more else "own",
    )
    pooled_by = "sample" if "by_sample" in more else "text"
    head = build_head(ModelConfig(num_frames=F, pooling="xpool", num_heads=2, dropout=0.0, radius=radius), D).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    several = dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
    text_BD, frames_BFD, noise_BD = (x.chunk(world)[rank].clone() for x in (text_ND, frames_NFD, noise_ND))
    text_BD.requires_grad_()
    frames_BFD.requires_grad_()
    logit_scale = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    losses = global_losses(
        head, text_BD, frames_BFD, None if radius == "none" else noise_BD, logit_scale, stochastic, pooled_by=pooled_by
    )
    losses.total.backward()
    parameters = {name: parameter.grad for name, parameter in head.named_parameters() if parameter.grad is not None}
    found = {"loss": losses.total.detach(), "text": text_BD.grad, "frames": frames_BFD.grad, "scale": logit_scale.grad}
    return {**found, **parameters}  # type: ignore[dict-item]


VARIANTS = ["exp_linear", "none", "exp_mean", "variational+kl", "exp_linear+by_sample"]
VARIANTS += ["exp_linear+several", "exp_linear+several+best", "exp_linear+several+best+pairs"]


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_give_the_loss_and_gradients_of_one_process(num_ranks: int, variant: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = (N, 3, D) if "several" in variant else (N, D)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (N, F, D), noise)]
    alone = _loss_and_gradients(variant, *inputs)

    shares = on_ranks(num_ranks, _loss_and_gradients, variant, *inputs, tmp_path=tmp_path)

    for share in shares:
        torch.testing.assert_close(share["loss"], alone["loss"], rtol=1e-12, atol=0)
    for name, expected in alone.items():
        if name in ("text", "frames"):  # rows live on the rank they came from; the mean is over ranks
            found = torch.cat([share[name] for share in shares]) / num_ranks
        elif name != "loss":
            found = torch.stack([share[name] for share in shares]).mean(0)
        else:
            continue
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("trials", ["mean", "best"])
@pytest.mark.parametrize("training_radius", ["own", "pair"])
@pytest.mark.parametrize("radius", ["exp_linear", "exp_mean", "linear"])
@pytest.mark.parametrize("memory_mb", [None, 1e-3])
def test_several_samples_are_what_their_names_say(
    trials: str, training_radius: str, radius: str, memory_mb: float | None
) -> None:
    """Against the definition, pair by pair: t_s = t_i + R eps_ik, the cosine with video j as text i sees it."""
    generator = torch.Generator().manual_seed(2)
    text, frames, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (N, F, D), (N, 3, D))
    )
    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=F, dropout=0.0, radius=radius), D).double()  # type: ignore[arg-type]
    assert head.mass is not None
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        pooled_VTD = head.pooling(text, frames, None)
        similarity = torch.empty(3, N, N, dtype=torch.float64)
        for i in range(N):
            for j in range(N):
                met = i if training_radius == "own" else j
                cosines = torch.nn.functional.cosine_similarity(frames[met], text[i][None], dim=-1)
                radius_D = head.mass.radius_of(cosines, text[i])
                for k in range(3):
                    sample = text[i] + radius_D * noise[i, k]
                    similarity[k, i, j] = torch.nn.functional.cosine_similarity(sample, pooled_VTD[j, i], dim=0)
        scale = torch.full((1,), 2.0, dtype=torch.float64)
        each = [symmetric_info_nce(x, scale) for x in similarity]
        expected = symmetric_info_nce(similarity.amax(0), scale) if trials == "best" else torch.stack(each).mean()
        stochastic = StochasticConfig(samples=3, trials=trials, training_radius=training_radius)  # pyright: ignore
        losses = global_losses(head, text, frames, noise, scale, stochastic, memory_mb=memory_mb)
    torch.testing.assert_close(losses.stochastic, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.total, losses.stochastic + 0.8 * losses.support)
    assert losses.support > 0


@pytest.mark.parametrize("num_heads", [1, 2])
def test_the_head_is_the_plain_one_with_every_projection_of_every_pair(num_heads: int) -> None:
    """Loss and gradients with dropout, in float64, against torch's own; more pairs than one tile, and both ways to
    project the smaller of queries and keys."""
    pairs, width, dropout = 100, 64, 0.3
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(s, generator=generator).double() for s in ((pairs, width), (pairs, F, width))]
    noise = torch.randn(pairs, width, generator=generator).double()
    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=F, num_heads=num_heads, dropout=dropout), width).double().train()
    pool, mass, scale, keys = head.pooling, head.mass, torch.full((1,), 2.0).double(), list(range(pairs))
    assert isinstance(pool, XPool) and mass is not None
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def plain(text: Tensor, frames: Tensor) -> Tensor:
        normed = pool.norm_in(frames)
        each = (pool.query(pool.norm_in(text)), pool.key(normed), pool.value(normed))
        query, key, value = (x.unflatten(-1, (num_heads, -1)) for x in each)
        weights = (torch.einsum("the,vfhe->vthf", query, key) / query.shape[-1] ** 0.5).softmax(-1)
        attended = pool.norm_attended(pool.out(torch.einsum("vthf,vfhe->vthe", weights, value).flatten(2)))
        kept = keyed_mask(keys, attended, dropout) / (1 - dropout)
        pooled = pool.norm_out(attended + kept * pool.linear(attended))
        cosine = torch.nn.functional.cosine_similarity(frames, text[:, None], dim=-1)
        radius = mass.linear(cosine).exp()
        support = text + radius * torch.nn.functional.normalize(pooled.mean(dim=1) - text, dim=-1)
        losses = [
            symmetric_info_nce(torch.nn.functional.cosine_similarity(anchor, pooled, dim=-1).T, scale)
            for anchor in (text + radius * noise, support)
        ]
        return losses[0] + 0.8 * losses[1]

    def ours(text: Tensor, frames: Tensor) -> Tensor:
        return global_losses(head, text, frames, noise, scale, StochasticConfig(), dropout_keys=keys).total

    found = []
    for step in (plain, ours):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = step(*leaves)
        found.append([loss, *torch.autograd.grad(loss, [*leaves, *head.parameters()])])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    names = [name for name, _ in head.named_parameters()]
    assert not found[1][3:][names.index("pooling.key.bias")].any()  # zeros: the softmax does not see it


@pytest.mark.parametrize("start", ["rising", "falling"])
def test_an_untrained_radius_rises_or_falls_with_the_match(start: str) -> None:
    head = build_head(ModelConfig(num_frames=F, radius_start=start), D)  # pyright: ignore[reportArgumentType]
    assert head.mass is not None
    poor, good = (head.mass.radius_of(torch.full((F,), cosine), torch.zeros(D)) for cosine in (0.1, 0.6))
    sign = 1 if start == "rising" else -1
    torch.testing.assert_close(good[:F] / poor[:F], torch.full((F,), 0.5 * sign).exp())
    assert (good[F:] == 1).all() and (poor[F:] == 1).all()
