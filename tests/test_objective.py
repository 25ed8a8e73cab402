"""The global-batch objective: any number of ranks gives the loss and the gradient of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import oracle
from tests.oracle import pooled, symmetric_info_nce
from tests.ranks import on_ranks
from tests.small_model import config_of, perturb
from tmass_dist.config import ModelConfig, StochasticConfig
from tmass_dist.errors import UserError
from tmass_dist.evaluation.scoring import score
from tmass_dist.models.head import build_head
from tmass_dist.models.pooling import XPool
from tmass_dist.noise import keyed_mask
from tmass_dist.training.losses import column_info_nce
from tmass_dist.training.objective import build_objective, global_losses

# Shapes: N pairs of the world, F frames, D embedding width.
N, F, D = 12, 4, 8


def _loss_and_gradients(
    variant: str, text_ND: Tensor, frames_NFD: Tensor, noise_ND: Tensor, memory_mb: float | None = None
) -> dict[str, Tensor]:
    """The losses, this rank's input gradients, and its share of the parameters' gradients."""
    torch.manual_seed(0)
    radius, *more = variant.split("+")
    stochastic = StochasticConfig(
        kl_weight=0.3 if "kl" in more else 0.0,
        samples=3 if "several" in more else 1,
        trials="best" if "best" in more else "mean",
        training_radius="pair" if "pairs" in more else "own",
        support_weight=0.0 if "no_support" in more else 0.8,
    )
    pooled_by = "sample" if "by_sample" in more else "text"
    poolings = [name for name in POOLINGS if name in more]
    pooling = poolings[0] if poolings else "xpool"
    config = ModelConfig(
        num_frames=F,
        pooling=pooling,  # pyright: ignore[reportArgumentType]
        num_heads=2 if "xpool" in pooling else 1,
        dropout=0.3,
        radius=radius,  # pyright: ignore[reportArgumentType]
        mass_score="expected" if "expected" in more else "temperature" if "temperature" in more else "samples",
    )
    head = build_head(config, D).double().train()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    several = dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
    text_BD, frames_BFD, noise_BD = (x.chunk(world)[rank].clone() for x in (text_ND, frames_NFD, noise_ND))
    keys = torch.arange(N).chunk(world)[rank].tolist()
    text_BD.requires_grad_()
    frames_BFD.requires_grad_()
    logit_scale = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    losses = global_losses(
        head,
        text_BD,
        frames_BFD,
        None if radius == "none" else noise_BD,
        logit_scale,
        stochastic,
        pooled_by=pooled_by,
        dropout_keys=keys,
        memory_mb=memory_mb,
    )
    losses.total.backward()
    parameters = {name: parameter.grad for name, parameter in head.named_parameters() if parameter.grad is not None}
    found = {"text": text_BD.grad, "frames": frames_BFD.grad, "scale": logit_scale.grad}
    found["pair_loss"] = losses.pair_loss_B
    numbers = {name: getattr(losses, name).detach().reshape(()) for name in NUMBERS}
    return {**numbers, **found, **parameters}  # type: ignore[dict-item]


POOLINGS = ("mean", "best_frame", "query_scored", "xpool_best_frame", "late_interaction", "weighted_interaction")
NUMBERS = ("total", "stochastic", "support", "divergence", "positive", "hardest", "temperature")
VARIANTS = ["exp_linear", "none", "none+mean", "exp_mean", "variational+kl+no_support", "exp_linear+by_sample"]
VARIANTS += ["exp_linear+several", "linear+several+best", "exp_linear+several+best+pairs", "exp_linear+pairs"]
VARIANTS += ["exp_linear+mean+several+pairs+by_sample"]
VARIANTS += ["none+best_frame", "none+query_scored", "none+xpool_best_frame", "exp_linear+query_scored"]
VARIANTS += ["none+late_interaction", "none+weighted_interaction"]
VARIANTS += ["exp_linear+expected", "variational+temperature+no_support", "exp_mean+best_frame+expected"]
# 7 texts by 1 video; some texts by all videos; everything at once.
BUDGETS_MB = (7 * 1.2 * D * 8 * 8 / 2**20, 64 * 1.2 * D * 8 * 8 / 2**20, None)


def _inputs(variant: str) -> list[Tensor]:
    """Texts, frames and noise of the global batch."""
    generator = torch.Generator().manual_seed(1)
    noise = (N, 3, D) if "several" in variant else (N, D)
    text = (N, 3 * D) if "interaction" in variant else (N, D)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (text, (N, F, D), noise)]
    inputs[0][::2, 2 * D :] = 0  # every other text has two tokens
    return inputs


def _every_variant() -> list[list[dict[str, Tensor]]]:
    return [
        [_loss_and_gradients(variant, *_inputs(variant), memory_mb=budget) for budget in BUDGETS_MB]
        for variant in VARIANTS
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_and_tiles_give_the_loss_and_gradients_of_one_process(num_ranks: int, tmp_path: Path) -> None:
    ranks = on_ranks(num_ranks, _every_variant, tmp_path=tmp_path)
    for variant, *budgets in zip(VARIANTS, *ranks):
        alone = _loss_and_gradients(variant, *_inputs(variant))
        for budget, *shares in zip(BUDGETS_MB, *budgets):
            for name, expected in alone.items():
                where = f"{variant}, {budget} MB: {name}"
                if name in NUMBERS:  # the same on every rank
                    for share in shares:
                        torch.testing.assert_close(share[name], expected, rtol=1e-12, atol=1e-15, msg=where)
                    continue
                if name == "pair_loss":
                    found = torch.cat([share[name] for share in shares])
                    without_kl = alone["total"] - (0.3 if "kl" in variant else 0.0) * alone["divergence"]
                    torch.testing.assert_close(found.mean(), without_kl, rtol=1e-12, atol=1e-15, msg=where)
                elif name in ("text", "frames"):  # each row is on the rank it came from; ZeRO takes the mean over ranks
                    found = torch.cat([share[name] for share in shares]) / num_ranks
                else:
                    found = torch.stack([share[name] for share in shares]).mean(0)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=where)


@pytest.mark.parametrize("scale", [0.0, 2.0, 4.6, 9.0])
def test_the_loss_of_columns_is_that_of_the_matrix(scale: float) -> None:
    """With torch's own cross-entropy as reference; 9 is beyond the limit of the temperature."""
    generator = torch.Generator().manual_seed(4)
    matrices_SNN = torch.rand(3, N, N, generator=generator, dtype=torch.float64) * 2 - 1
    found = []
    for function in (
        lambda matrices, s: torch.stack([symmetric_info_nce(matrix, s) for matrix in matrices]),
        lambda matrices, s: column_info_nce(matrices.transpose(1, 2), s)[0],
    ):
        leaves = [matrices_SNN.clone().requires_grad_(), torch.full((1,), scale).double().requires_grad_()]
        losses_S = function(*leaves)
        weights_S = torch.tensor([1.0, 0.8, -0.3], dtype=torch.float64)
        found.append([losses_S, *torch.autograd.grad((losses_S * weights_S).sum(), leaves)])
    for one, other in zip(*found):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-13)


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
    torch.testing.assert_close(losses.positive, similarity[0].diagonal().mean(), rtol=1e-12, atol=1e-12)
    hardest = similarity[0].clone().fill_diagonal_(-2).amax(dim=1).mean()
    torch.testing.assert_close(losses.hardest, hardest, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("memory_mb", [None, 1e-3])
@pytest.mark.parametrize(
    "variant", ["best_frame", "query_scored", "xpool_best_frame", "weighted_interaction", "expected", "temperature"]
)
def test_training_and_evaluation_score_a_pair_alike(variant: str, memory_mb: float | None) -> None:
    """The loss is InfoNCE of the similarities that an evaluation computes; the oracle has the equations."""
    text, frames, _ = _inputs(variant)
    is_mass = variant in ("expected", "temperature")
    settings = {"mass_score": variant} if is_mass else {"pooling": variant, "radius": "none"}
    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=F, dropout=0.0, **settings), D).double()  # pyright: ignore
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        scale = torch.full((1,), 2.0, dtype=torch.float64)
        stochastic = StochasticConfig(support_weight=0)
        losses = global_losses(head, text, frames, None, scale, stochastic, memory_mb=memory_mb)
        similarity_TV = oracle.similarities(head, text, frames, None)
    torch.testing.assert_close(losses.total, symmetric_info_nce(similarity_TV, scale), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score(head, text, frames), similarity_TV, rtol=1e-12, atol=1e-12)
    if not is_mass:
        return
    # Every parameter of the mass is trained.
    losses = global_losses(head, text, frames, None, scale, stochastic, memory_mb=memory_mb)
    gradients = torch.autograd.grad(losses.total, [*head.mass.parameters()])  # pyright: ignore
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("start", ["rising", "falling"])
def test_an_untrained_radius_rises_or_falls_with_the_match(start: str) -> None:
    head = build_head(ModelConfig(num_frames=F, radius_start=start), D)  # pyright: ignore[reportArgumentType]
    assert head.mass is not None
    poor, good = (head.mass.radius_of(torch.full((F,), cosine), torch.zeros(D)) for cosine in (0.1, 0.6))
    sign = 1 if start == "rising" else -1
    torch.testing.assert_close(good[:F] / poor[:F], torch.full((F,), 0.5 * sign).exp())
    assert (good[F:] == 1).all() and (poor[F:] == 1).all()


@pytest.mark.parametrize(("training", "is_trained"), [("mean", False), ("sampled", True)])
def test_a_mass_that_does_not_affect_the_loss_is_not_trained(training: str, is_trained: bool) -> None:
    model = build_objective(config_of(f"stochastic.training={training}"))
    assert model.head.mass is not None
    assert {parameter.requires_grad for parameter in model.head.mass.parameters()} == {is_trained}
    assert all(parameter.requires_grad for parameter in model.head.pooling.parameters())
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=f"'nothing', and no parameter begins so; the first is {names[0]}$"):
        build_objective(config_of("optim.frozen=[nothing]"))


def test_the_radius_of_a_step_is_the_mean_over_the_width() -> None:
    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=F, dropout=0.0), D).train()
    text_BD, frames_BFD, noise_BD = torch.randn(3, D), torch.randn(3, F, D), torch.randn(3, D)
    scale, settings = torch.full((1,), 2.0), StochasticConfig()
    losses = global_losses(head, text_BD, frames_BFD, noise_BD, scale, settings)
    assert head.mass is not None
    assert torch.equal(losses.radius_B, head.mass.radius(text_BD, frames_BFD).detach().mean(dim=-1))
    none = global_losses(head, text_BD, frames_BFD, None, scale, settings)  # trains on the texts themselves
    assert none.radius_B.tolist() == [0.0] * 3 and none.support == 0 and none.total == none.stochastic


def test_a_sample_that_pools_is_the_first_one() -> None:
    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=F, dropout=0.0), D).double().train()
    perturb(head)
    text_BD, frames_BFD, noise_BKD = (torch.randn(shape).double() for shape in ((3, D), (3, F, D), (3, 2, D)))
    scale = torch.full((1,), 2.0).double()

    def stochastic(noise: Tensor) -> Tensor:
        settings = StochasticConfig(samples=noise.shape[1], trials="mean", support_weight=0.0)
        return global_losses(head, text_BD, frames_BFD, noise, scale, settings, pooled_by="sample").stochastic

    # With the same sample twice, which one pools plays no part; with two, exchanging them does.
    twice = stochastic(noise_BKD[:, :1].expand(-1, 2, -1))
    torch.testing.assert_close(twice, stochastic(noise_BKD[:, :1]), rtol=1e-12, atol=0)
    first, exchanged = stochastic(noise_BKD), stochastic(noise_BKD.flip(1))
    assert not torch.isclose(first, exchanged)
    assert head.mass is not None
    pool_D = head.mass.sample(text_BD, head.mass.radius(text_BD, frames_BFD), noise_BKD[:, 0])
    anchors = [head.mass.sample(text_BD, head.mass.radius(text_BD, frames_BFD), noise_BKD[:, k]) for k in range(2)]
    pooled_VTD = torch.stack(
        [torch.stack([pooled(head, ask_D, video_FD) for ask_D in pool_D]) for video_FD in frames_BFD]
    )
    losses = [
        symmetric_info_nce(
            torch.nn.functional.cosine_similarity(anchor[:, None], pooled_VTD.transpose(0, 1), dim=-1), scale
        )
        for anchor in anchors
    ]
    torch.testing.assert_close(first, torch.stack(losses).mean(), rtol=1e-6, atol=0)
