"""The folded scores equal the plain equations, for every variant of the model."""

import pytest
import torch

from tests import oracle
from tmass_dist.config import ModelConfig
from tmass_dist.evaluation.scoring import score
from tmass_dist.models.folding import FoldedVideos
from tmass_dist.models.head import build_head
from tmass_dist.models.stochastic import TextMass, frame_cosines, matching_frame_cosines
from tmass_dist.noise import keyed_mask, keyed_noise, text_key

T, V, F, M, D = 9, 7, 5, 3, 24


@pytest.mark.parametrize("radius", ["none", "exp_linear", "exp_mean", "linear", "scaled_exp_mean", "variational"])
@pytest.mark.parametrize(
    ("pooling", "num_heads"),
    [("xpool", 1), ("xpool", 4), ("mean", 1), ("best_frame", 1), ("query_scored", 1), ("xpool_best_frame", 4)],
)
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


@pytest.mark.parametrize("pooling", ["late_interaction", "weighted_interaction"])
@torch.no_grad()
def test_late_interaction_is_the_mean_over_tokens_of_the_closest_frames(pooling: str) -> None:
    generator = torch.Generator().manual_seed(0)
    head = build_head(ModelConfig(num_frames=F, pooling=pooling, radius="none"), D).eval()  # pyright: ignore
    for parameter in head.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))
    tokens, frames = torch.randn(T, 6, D, generator=generator), torch.randn(V, F, D, generator=generator)
    for row, tokens_LD in enumerate(tokens):
        tokens_LD[1 + row % 6 :] = 0  # texts have 1 to 6 tokens
    text = tokens.flatten(1)
    expected = oracle.similarities(head, text, frames, None)
    torch.testing.assert_close(score(head, text, frames, tile_texts=4, tile_videos=3), expected, rtol=0, atol=1e-6)
    # With the one token of a whole text, it is the best frame.
    best = build_head(ModelConfig(num_frames=F, pooling="best_frame", radius="none"), D).eval()
    alone = score(head, tokens[:, 0], frames)
    torch.testing.assert_close(alone, score(best, tokens[:, 0], frames), rtol=0, atol=1e-6)
    # A token without a match in any frame counts: the mean is over all of them.
    doubled = torch.cat([tokens[:1, :1], -frames[0].sum(0).expand(1, 1, D)], dim=1).flatten(1)
    assert score(head, doubled, frames)[0, 0] < alone[0, 0]


@pytest.mark.parametrize("mass_score", ["expected", "temperature"])
@pytest.mark.parametrize("radius", ["exp_linear", "exp_mean", "variational"])
@pytest.mark.parametrize("pooling", ["xpool", "best_frame"])
@torch.no_grad()
def test_scores_of_the_whole_mass_are_the_equations(mass_score: str, radius: str, pooling: str) -> None:
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig(num_frames=F, pooling=pooling, radius=radius, mass_score=mass_score)  # pyright: ignore
    head = build_head(config, D).eval()
    for parameter in head.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    text, frames = 3 * torch.randn(T, D, generator=generator), torch.randn(V, F, D, generator=generator)
    expected = oracle.similarities(head, text, frames, None)
    torch.testing.assert_close(score(head, text, frames, tile_texts=4, tile_videos=3), expected, rtol=0, atol=1e-6)
    # Noise is ignored.
    noise = keyed_noise(torch.arange(T), M * D, seed=0).view(T, M, D)
    torch.testing.assert_close(score(head, text, frames, noise), expected, rtol=0, atol=1e-6)
    # With the largest M, the mean over samples comes near the closed form: the noise averages out over dimensions.
    if mass_score == "expected":
        many = torch.randn(20_000, D, generator=generator)
        radius_D = head.mass.radius_of(torch.nn.functional.cosine_similarity(frames[0], text[0][None]), text[0])
        samples_MD = text[0] + radius_D * many
        direction_D = torch.nn.functional.normalize(oracle.pooled(head, text[0], frames[0]), dim=0)
        ratio = (samples_MD @ direction_D).mean() / samples_MD.square().sum(dim=1).mean().sqrt()
        torch.testing.assert_close(ratio, expected[0, 0], rtol=0, atol=0.01)


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


def _mix(x: int) -> int:  # "lowbias32"
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def _states(key: int, start: int) -> tuple[int, int]:
    low, high = key % 2**32, key >> 32
    first = _mix(low ^ _mix(high ^ _mix(start % 2**32)))
    return first, _mix(high ^ first)


KEYS = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, text_key("evaluation", "v7", 3)]


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5])
def test_noise_is_that_of_plain_integers(seed: int) -> None:
    expected = []
    for first, second in (_states(key, 2 * seed) for key in KEYS):
        expected.append([(_mix(_mix(number ^ first) ^ second) >> 8) / 2**24 for number in range(50)])
    assert keyed_noise(torch.tensor(KEYS), 50, seed=seed).tolist() == expected


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_a_dropout_mask_is_that_of_plain_integers(kind: torch.dtype) -> None:
    texts, width = 4, 7
    expected = []
    for first, second in (_states(key, 0x6D61736B) for key in KEYS):
        pairs = [_mix(_mix(text ^ first) ^ second) for text in range(3, 3 + texts)]
        words = [[_mix(pair ^ _mix(number)) for number in range((width + 1) // 2)] for pair in pairs]
        draws = [[half for word in row for half in (word % 2**16, word >> 16)][:width] for row in words]
        signed = [[draw - 2**16 * (draw >= 2**15) for draw in row] for row in draws]
        expected.append([[float(draw >= round(0.3 * 2**16) - 2**15) for draw in row] for row in signed])
    found = keyed_mask(KEYS, torch.empty(len(KEYS), texts, width, dtype=kind), 0.3, first_text=3)
    assert found.dtype == kind and found.tolist() == expected


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5])
def test_a_dropout_mask_has_its_rate_whatever_the_tile(probability: float) -> None:
    keys = [text_key("mask", number) for number in range(40)]
    whole = keyed_mask(keys, torch.empty(40, 300, 512), probability)
    part = keyed_mask(torch.tensor(keys[7:9]), torch.empty(2, 11, 512), probability, first_text=200)
    assert torch.equal(part, whole[7:9, 200:211])
    # Bits, texts and videos are independent: rates of every slice and of products of neighbours, to 5 deviations.
    kept = 1 - probability
    for dimensions, size in {(0, 1): 40 * 300, (0, 2): 40 * 512, (1, 2): 300 * 512}.items():
        rates = whole.mean(dimensions)
        assert (rates - kept).abs().max() < 5 * (kept * probability / size) ** 0.5
    for one, other in ((whole[1:], whole[:-1]), (whole[:, 1:], whole[:, :-1]), (whole[..., 1:], whole[..., :-1])):
        both = (one * other).mean()
        assert abs(both - kept**2) < 5 * kept / one.numel() ** 0.5


@torch.no_grad()
def test_every_pair_of_twins_agrees() -> None:
    """Functions that are written twice, once for training and once for speed in scoring."""
    generator = torch.Generator().manual_seed(3)
    text, frames = 3 * torch.randn(T, D, generator=generator), torch.randn(T, F, D, generator=generator)
    cosines = frame_cosines(text, torch.nn.functional.normalize(frames, dim=-1))
    torch.testing.assert_close(cosines.diagonal().T, matching_frame_cosines(text, frames), rtol=0, atol=1e-6)
    for radius in ("exp_linear", "exp_mean", "linear", "scaled_exp_mean", "variational"):
        for num_heads in (1, 4):
            config = ModelConfig(num_frames=F, num_heads=num_heads, radius=radius)
            head = build_head(config, D).eval()
            assert isinstance(head.mass, TextMass)
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            written = torch.empty(T, T, D)
            head.mass.radius_into(cosines, text.expand(T, T, D), written)
            expected = head.mass.radius_of(cosines, text.expand(T, T, D)).expand(T, T, D)
            torch.testing.assert_close(written, expected, rtol=1e-6, atol=1e-6)
            folded = FoldedVideos(head.pooling, frames).pooled(text)
            torch.testing.assert_close(folded, head.pooling(text, frames), rtol=0, atol=2e-6)
