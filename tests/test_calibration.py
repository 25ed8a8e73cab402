"""AUROC of what a search knows: its definition over all pairs, and signals whose answer is known."""

import numpy as np
import pytest
import torch

from tests.small_model import WIDTH, F
from tmass_dist.evaluation.calibration import auroc, calibration, radius_norms
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.ranking import rank
from tmass_dist.evaluation.retrieved import best_answers
from tmass_dist.models.stochastic import TextMass


def test_auroc_is_its_definition_over_all_pairs_and_weights_repeat_queries() -> None:
    rng = np.random.default_rng(0)
    signal_Q, succeeds_Q, weight_Q = rng.integers(0, 5, 40), rng.random(40) < 0.6, rng.integers(0, 3, 40)
    one_Q, fails_Q = signal_Q.repeat(weight_Q), ~succeeds_Q.repeat(weight_Q)
    pairs = [(a > b) + (a == b) / 2 for a in one_Q[~fails_Q] for b in one_Q[fails_Q]]
    assert auroc(signal_Q, succeeds_Q, weight_Q) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(signal_Q, np.ones(40, bool), weight_Q))


def test_a_margin_that_tells_has_auroc_one_and_the_radius_is_that_of_each_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    score_TV = torch.rand(30, 10, generator=generator)
    owner_T = torch.arange(10).repeat_interleave(3)
    # Every second text is right by a large margin; the others are wrong by a small one.
    first_T = torch.where(torch.arange(30) % 2 == 0, owner_T, (owner_T + 1) % 10)
    score_TV[torch.arange(30), first_T] = torch.where(torch.arange(30) % 2 == 0, 2.0, 1.01)
    ranks = rank(lambda: [score_TV], owner_T, 10)
    retrieved = best_answers(lambda: [score_TV], owner_T, 10)
    text_TD, frames_VFD = torch.randn(30, WIDTH, generator=generator), torch.randn(10, F, WIDTH, generator=generator)
    ids = [(f"v{owner}", number % 3) for number, owner in enumerate(owner_T.tolist())]
    features = Features([f"v{n}" for n in range(10)], frames_VFD, ids, ["a"] * 30, text_TD, owner_T)
    mass = TextMass(F, WIDTH)
    found = calibration(ranks, retrieved, features, mass)
    for name in ("score of the first answer", "margin of the first answer over the second"):
        assert found[name] == {"auroc": 1.0, "interval_95": [1.0, 1.0]}
    low, high = found["small radius with the first answer"]["interval_95"]
    assert low < found["small radius with the first answer"]["auroc"] < high
    expected_T = mass.radius(text_TD, frames_VFD[first_T]).abs().sum(dim=1)
    torch.testing.assert_close(radius_norms(mass, features, first_T), expected_T)
    perfect = rank(lambda: [torch.eye(10)[owner_T]], owner_T, 10)
    assert calibration(perfect, retrieved, features, None) == {}
