"""The folded scores equal the plain equations, for every variant of the model."""

import pytest
import torch

from tests import oracle
from tmass_dist.evaluation.scoring import score
from tmass_dist.models.head import build_head
from tmass_dist.noise import keyed_noise

T, V, F, M, D = 9, 7, 5, 3, 24


@pytest.mark.parametrize("radius", ["none", "exp_linear", "exp_mean", "linear", "scaled_exp_mean", "variational"])
@pytest.mark.parametrize(("pooling", "num_heads"), [("xpool", 1), ("xpool", 4), ("mean", 1)])
@pytest.mark.parametrize("pooled_by", ["text", "sample"])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_folded_scores_are_the_equations(
    radius: str, pooling: str, num_heads: int, pooled_by: str, shared: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    head = build_head(embed_dim=D, num_frames=F, pooling=pooling, num_heads=num_heads, radius=radius).eval()
    for parameter in head.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    text, frames = 3 * torch.randn(T, D, generator=generator), torch.randn(V, F, D, generator=generator)
    keys = torch.arange(1 if shared else T)
    noise = None if radius == "none" else keyed_noise(keys, M * D, seed=0).view(-1, M, D)
    found = score(head, text, frames, noise, pooled_by=pooled_by, tile_texts=4, tile_videos=3)
    torch.testing.assert_close(found, oracle.similarities(head, text, frames, noise, pooled_by), rtol=0, atol=1e-6)


@torch.no_grad()
def test_at_the_real_width_too() -> None:
    generator = torch.Generator().manual_seed(1)
    head = build_head(embed_dim=512, num_frames=12).eval()
    for parameter in head.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    text, frames = torch.randn(5, 512, generator=generator), torch.randn(4, 12, 512, generator=generator)
    noise = keyed_noise(torch.arange(5), 20 * 512, seed=0).view(5, 20, 512)
    torch.testing.assert_close(
        score(head, text, frames, noise), oracle.similarities(head, text, frames, noise), rtol=0, atol=1e-6
    )
