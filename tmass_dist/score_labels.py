"""What every score states, wherever it is printed or written: how it was computed, and what selected the checkpoint."""

from __future__ import annotations

from typing import Any

from tmass_dist.config import Config

LABELS = (
    "protocol",
    "num_trials",
    "tau",
    "selected_on",
    "post_processing",
    "precision",
    "feature_precision",
    "noise",
    "search",
)
"""Keys of the labels of a result, in the order in which they are shown; those that do not apply are absent or None."""


def scoring_labels(config: Config, tau: float | None) -> dict[str, Any]:
    """The labels that follow from the settings of an evaluation.

    Args:
        config: of the evaluation.
        tau: the learnt temperature of ``model.pooling=query_scored``; None with another pooling.
    """
    evaluation = config.evaluation
    return {
        "protocol": evaluation.protocol,
        "num_trials": config.stochastic.num_trials if config.model.draws_samples else None,
        "tau": None if tau is None else round(tau, 5),
        "post_processing": evaluation.post_processing,
        "precision": evaluation.precision,
        "noise": f"seed {config.seed}, caption text and trial" if config.model.draws_samples else None,
    }


def label_words(result: dict[str, Any]) -> list[str]:
    """The labels of a result as words: ``protocol query_conditioned``, ``M = 20``, ...

    Args:
        result: with the keys of :data:`LABELS`. Those that are missing, as in results of older versions, are left out.
    """
    words = []
    for key in LABELS:
        value = result.get(key)
        if value is None:
            continue
        name = {
            "num_trials": "M =",
            "tau": "learnt tau",
            "selected_on": "checkpoint selected on",
            "post_processing": "post-processing",
            "feature_precision": "feature precision",
            "noise": "noise keyed by",
        }.get(key, key)
        transductive = " (transductive)" if key == "post_processing" and value != "none" else ""
        words.append(f"{name} {value}{transductive}")
    return words
