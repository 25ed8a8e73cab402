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

SCORES = "metrics/"
"""Prefix of the tags of validation and test results."""


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


def score_prefix(split: str, labels: dict[str, Any]) -> str:
    """Beginning of the tags of a result, such as ``metrics/val/query_conditioned/M20``.

    Args:
        split: that was scored.
        labels: of the result, with the keys of :data:`LABELS`. ``selected_on`` is that of a
            selected checkpoint; a validation, which selects, has None. Post-processing and precisions are left out
            where they are ``none`` and ``float32``. The learnt tau is a value of its own, since it changes.
    """
    words = [split, f"selected_on_{labels['selected_on']}" if labels.get("selected_on") else None, labels["protocol"]]
    words += [f"M{labels['num_trials']}" if labels.get("num_trials") is not None else None]
    words += [*({labels["post_processing"]} - {"none"}), *({labels.get("precision", "float32")} - {"float32"})]
    words += [f"features_{labels['feature_precision']}" if labels.get("feature_precision") else None]
    return SCORES + "/".join(word for word in words if word)


def score_tags(split: str, labels: dict[str, Any], **directions: dict[str, float]) -> dict[str, float]:
    """Values by tag, such as ``metrics/val/query_conditioned/M20/t2v_R@1``; with a learnt tau, it too.

    Args:
        split: that was scored.
        labels: as for :func:`score_prefix`.
        directions: metrics of ``t2v`` and ``v2t``.
    """
    prefix = score_prefix(split, labels)
    values = {
        f"{prefix}/{direction}_{name}": value
        for direction, metrics in directions.items()
        for name, value in metrics.items()
    }
    return values if labels.get("tau") is None else values | {f"{prefix}/learnt_tau": labels["tau"]}
