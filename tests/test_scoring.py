"""The folded scores equal the plain equations, for every variant of the model."""

import pytest
import torch

from tests import oracle
from tmass_dist.config import ModelConfig
from tmass_dist.evaluation.scoring import score
from tmass_dist.models.head import build_head
from tmass_dist.noise import keyed_noise, text_key

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
    head = build_head(ModelConfig(num_frames=F, pooling=pooling, num_heads=num_heads, radius=radius), D).eval()
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
    head = build_head(ModelConfig(num_frames=12), 512).eval()
    for parameter in head.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    text, frames = torch.randn(5, 512, generator=generator), torch.randn(4, 12, 512, generator=generator)
    noise = keyed_noise(torch.arange(5), 20 * 512, seed=0).view(5, 20, 512)
    torch.testing.assert_close(
        score(head, text, frames, noise), oracle.similarities(head, text, frames, noise), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("radius", ["exp_linear", "exp_mean"])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_bfloat16_is_within_1e_3_and_ranks_alike(radius: str, shared: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    head = build_head(ModelConfig(num_frames=12, radius=radius), 512).eval()
    for parameter in head.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    frames = torch.randn(300, 12, 512, generator=generator)
    text = frames[:100].mean(dim=1) + 1.2 * torch.randn(100, 512, generator=generator)  # R@1 is about a half
    noise = keyed_noise(torch.arange(1 if shared else 100), 20 * 512, seed=0).view(-1, 20, 512)
    exact, found = (score(head, text, frames, noise, precision=kind) for kind in (torch.float32, torch.bfloat16))
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)
    one, other = ((rows >= rows.diagonal()[:, None]).sum(dim=1) for rows in (exact, found))
    assert 20 < int((one == 1).sum()) < 80
    assert int(((one == 1) != (other == 1)).sum()) <= 1
    assert int(((one - other).abs() > 1).sum()) <= 2


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5])
def test_noise_is_that_of_plain_integers(seed: int) -> None:
    def mix(x: int) -> int:  # "lowbias32"
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    keys = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, text_key("evaluation", "v7", 3)]
    expected = []
    for low, high in ((key % 2**32, key >> 32) for key in keys):
        row = mix(low ^ mix(high ^ mix(2 * seed % 2**32)))
        second = mix(high ^ row)
        expected.append([(mix(mix(number ^ row) ^ second) >> 8) / 2**24 for number in range(50)])
    assert keyed_noise(torch.tensor(keys), 50, seed=seed).tolist() == expected
