"""The baselines of every table are their equations, one pair at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import rank_texts, rank_videos
from tmass_dist.evaluation import baselines
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.ranking import metrics

V, D = 30, 24


@pytest.fixture
def features() -> Features:
    generator = torch.Generator().manual_seed(0)
    frames_VFD = 3 * torch.randn(V, 5, D, generator=generator)
    owner_T = torch.arange(V).repeat_interleave(torch.randint(1, 4, (V,), generator=generator))
    text_TD = frames_VFD[owner_T, 2] + 2 * torch.randn(len(owner_T), D, generator=generator)
    ids = [(f"v{owner}", text) for text, owner in enumerate(owner_T.tolist())]
    return Features([f"v{n}" for n in range(V)], frames_VFD, ids, ["a"] * len(ids), text_TD, owner_T)


def _score(name: str, text_D: Tensor, frames_FD: Tensor) -> Tensor:
    frames_FD = F.normalize(frames_FD, dim=-1)
    cosine_F = frames_FD @ F.normalize(text_D, dim=-1)
    if name == "best":
        return cosine_F.max()
    weights_F = torch.ones(5) if name == "mean" else (cosine_F / float(name)).softmax(dim=0)
    return F.cosine_similarity((weights_F[:, None] * frames_FD).sum(dim=0), text_D, dim=0)


@pytest.mark.parametrize("cached_bytes", [0, 2**29])
def test_each_baseline_is_its_equation(features: Features, monkeypatch: pytest.MonkeyPatch, cached_bytes: int) -> None:
    monkeypatch.setattr(baselines, "CACHED_BYTES", cached_bytes)
    monkeypatch.setattr(baselines, "VIDEOS_PER_TILE", 7)
    scores = {"mean": baselines.mean_pooling, "best": baselines.best_frame, "0.2": baselines.query_scoring(0.2)}
    found = baselines.baseline_ranks(features, scores)
    for name, ranks in found.items():
        pairs = [[_score(name, text_D, frames_FD) for frames_FD in features.frames_VFD] for text_D in features.text_TD]
        expected_TV = torch.stack([torch.stack(row) for row in pairs])
        assert torch.equal(ranks.t2v_T, rank_texts(expected_TV, features.owner_T))
        assert torch.equal(ranks.v2t_V, rank_videos(expected_TV, features.owner_T))


def test_large_and_small_tau_are_mean_pooling_and_the_best_frame(features: Features) -> None:
    scores = {
        "mean": baselines.mean_pooling,
        "large": baselines.query_scoring(1e4),
        "best": baselines.best_frame,
        "small": baselines.query_scoring(1e-4),
    }
    found = baselines.baseline_ranks(features, scores)
    assert torch.equal(found["mean"].t2v_T, found["large"].t2v_T)
    assert torch.equal(found["best"].t2v_T, found["small"].t2v_T)
    assert not torch.equal(found["mean"].t2v_T, found["best"].t2v_T)


def test_the_chosen_tau_has_the_best_recall(features: Features) -> None:
    chosen = baselines.choose_tau(features)
    recall = {
        tau: metrics(baselines.baseline_ranks(features, {"q": baselines.query_scoring(tau)})["q"].t2v_T)["R@1"]
        for tau in baselines.TAUS
    }
    assert recall[chosen] == max(recall.values()) and len(set(recall.values())) > 1


def test_a_row_says_whether_its_tau_was_chosen(features: Features) -> None:
    assert list(baselines.frame_baselines(features, 0.2))[2].endswith("(tau 0.2, chosen on validation)")
    assert list(baselines.frame_baselines(features, None))[2].endswith("(tau 0.1, not chosen here)")
