"""Independent random texts and videos must score at chance; the published evaluation does not."""

import pytest
import torch

from tests.oracle import rank_texts, rank_videos
from tmass_dist.config import ModelConfig
from tmass_dist.evaluation.ranking import metrics
from tmass_dist.evaluation.scoring import score
from tmass_dist.models.head import build_head
from tmass_dist.noise import keyed_noise

# Shapes: T texts, V videos, F frames, M trials, D embedding width.
NUM_SEEDS, V, F, M, D = 6, 100, 12, 5, 64


def _scores(seed: int, protocol: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    captions_V = torch.randint(1, 4, (V,), generator=generator)  # ragged
    owner_T = torch.arange(V).repeat_interleave(captions_V)
    text_TD = torch.randn(len(owner_T), D, generator=generator)
    frames_VFD = torch.randn(V, F, D, generator=generator)
    noise = keyed_noise(torch.arange(len(owner_T)), M * D, seed=seed).view(-1, M, D)
    head = build_head(ModelConfig(num_frames=F), D).eval()
    similarity = score(head, text_TD, frames_VFD, noise, protocol=protocol, caption_owner_T=owner_T)
    # The published protocol has no number where a video lacks the slot; such videos cannot win.
    return metrics(rank_texts(similarity.nan_to_num(-2.0), owner_T)) | {"num_texts": float(len(owner_T))}


@pytest.mark.parametrize("k", [1, 5, 10])
def test_query_conditioned_is_at_chance(k: int) -> None:
    found = [_scores(seed, "query_conditioned") for seed in range(NUM_SEEDS)]
    chance = k / V
    sigma = (chance * (1 - chance) / sum(scores["num_texts"] for scores in found)) ** 0.5
    mean = sum(scores[f"R@{k}"] for scores in found) / 100 / NUM_SEEDS
    assert abs(mean - chance) < 3 * sigma


def test_published_code_leaks() -> None:
    """Pooling each video with its own caption lifts random features far above chance."""
    mean = sum(_scores(seed, "published_code")["R@1"] for seed in range(NUM_SEEDS)) / NUM_SEEDS
    assert mean > 3 * 100 / V


def test_ties_count_against_us() -> None:
    flat = torch.zeros(4, 4)
    assert rank_texts(flat, torch.arange(4)).tolist() == [4, 4, 4, 4]
    assert rank_videos(flat, torch.arange(4)).tolist() == [4, 4, 4, 4]


def test_not_a_number_is_named() -> None:
    head = build_head(ModelConfig(num_frames=F), D).eval()
    text = torch.randn(3, D)
    text[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1 texts .* \[1\]"):
        score(head, text, torch.randn(2, F, D))
    with pytest.raises(ValueError, match="num_trials is 0"):
        score(head, torch.randn(3, D), torch.randn(2, F, D), torch.zeros(3, 0, D))
    with pytest.raises(ValueError, match="built for 12"):
        score(head, torch.randn(3, D), torch.randn(2, F + 1, D), torch.zeros(3, 2, D))


def test_tiles_and_blocks_give_the_full_matrix() -> None:
    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=F, num_heads=2), D).eval()
    text, frames = torch.randn(30, D), torch.randn(20, F, D)
    noise = keyed_noise(torch.arange(30), M * D, seed=0, prior="normal", std=0.3).view(-1, M, D)
    whole = score(head, text, frames, noise, tile_texts=1000, tile_videos=1000)
    torch.testing.assert_close(score(head, text, frames, noise, tile_texts=7, tile_videos=3), whole, atol=1e-6, rtol=0)


def test_noise_depends_on_its_key_alone_and_follows_its_prior() -> None:
    keys = torch.tensor([5, 2**62, 7])
    one = keyed_noise(keys, 20_000, seed=3)
    torch.testing.assert_close(keyed_noise(keys[[2, 0]], 20_000, seed=3), one[[2, 0]], rtol=0, atol=0)
    assert one.min() >= 0 and one.max() < 1 and abs(one.mean().item() - 0.5) < 0.01
    normal = keyed_noise(keys, 20_000, seed=3, prior="normal", std=2.0)
    assert abs(normal.mean().item()) < 0.04 and abs(normal.std().item() - 2) < 0.04
    assert not torch.equal(keyed_noise(keys, 8, seed=4), one[:, :8])
