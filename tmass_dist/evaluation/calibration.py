"""Does anything that is known without the answer tell which queries fail? AUROC of scores, margins and radii."""

# Shapes: Q queries, T texts, V videos, F frames, D embedding width, S draws.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmass_dist.evaluation.bootstrap import LEVEL
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.ranking import Ranks
from tmass_dist.evaluation.retrieved import Retrieved
from tmass_dist.models.stochastic import TextMass

NUM_DRAWS = 200
TEXTS_AT_ONCE = 4096


def auroc(signal_Q: np.ndarray, succeeds_Q: np.ndarray, weight_Q: np.ndarray) -> float:
    """Probability that a query that succeeds has a larger signal than one that fails; ties count half.

    Args:
        signal_Q: of each query.
        succeeds_Q: bool.
        weight_Q: how often each query counts.

    Returns:
        NaN where all queries succeed, or all fail.
    """
    _, group_Q = np.unique(signal_Q, return_inverse=True)
    fails_G, succeeds_G = (np.bincount(group_Q, weight_Q * kind_Q) for kind_Q in (~succeeds_Q, succeeds_Q))
    pairs = fails_G.sum() * succeeds_G.sum()
    below_G = np.cumsum(fails_G) - fails_G / 2
    return float((succeeds_G * below_G).sum() / pairs) if pairs else float("nan")


def calibration(ranks: Ranks, retrieved: Retrieved, features: Features, mass: TextMass | None) -> dict[str, Any]:
    """By signal: how well it tells the texts whose video is ranked first from the others.

    The signals are what a search knows: the score of the first answer, its margin over the second, and the size
    ``|R|_1`` of the text's mass with the first answer, where a small one should mean success.

    Returns:
        ``{signal: {"auroc": value, "interval_95": [low, high]}}``; 0.5 is no better than chance. The interval draws
        videos with all their captions. Empty where all texts succeed, or all fail, or there is one video.
    """
    succeeds_T = ranks.t2v_T.numpy() == 1
    if succeeds_T.all() or not succeeds_T.any() or len(ranks.v2t_V) < 2:
        return {}
    first_two = retrieved.video_score_TK
    signals = {
        "score of the first answer": first_two[:, 0],
        "margin of the first answer over the second": first_two[:, 0] - first_two[:, 1],
    }
    if mass is not None:
        signals["small radius with the first answer"] = -radius_norms(mass, features, retrieved.video_TK[:, 0])
    owner_T, num_videos = ranks.owner_T.numpy(), len(ranks.v2t_V)
    weight_SV = np.random.default_rng(0).multinomial(num_videos, np.full(num_videos, 1 / num_videos), NUM_DRAWS)
    edge = (1 - LEVEL) / 2
    found = {}
    for name, signal_T in signals.items():
        value_T = signal_T.double().numpy()
        draws_S = [auroc(value_T, succeeds_T, weight_V[owner_T]) for weight_V in weight_SV]
        low, high = np.nanquantile(draws_S, [edge, 1 - edge]).tolist()
        value = auroc(value_T, succeeds_T, np.ones(len(value_T)))
        found[name] = {"auroc": value, "interval_95": [low, high]}
    return found


def radius_norms(mass: TextMass, features: Features, video_T: Tensor) -> Tensor:
    """``|R|_1`` of each text with one video, ``(T,)``, on the CPU."""
    device = next(mass.parameters(), features.text_TD).device
    parts = []
    with torch.no_grad():
        for start in range(0, len(video_T), TEXTS_AT_ONCE):
            text_TD = features.text_TD[start : start + TEXTS_AT_ONCE].float()
            frames_TFD = features.frames_VFD[video_T[start : start + TEXTS_AT_ONCE]].float()
            cosine_TF = torch.einsum("td,tfd->tf", F.normalize(text_TD, dim=-1), F.normalize(frames_TFD, dim=-1))
            radius_TD = mass.radius_of(cosine_TF.to(device), text_TD.to(device)).expand_as(text_TD)
            parts.append(radius_TD.abs().sum(dim=1).cpu())
    return torch.cat(parts)
