"""Which settings an evaluation may change: those of the scores, those of the report, those of the encoding."""

from __future__ import annotations

from typing import Any

from tmass_dist.config import Config
from tmass_dist.errors import UserError

BLOCK_SETTINGS = (
    "seed",
    "model.pooled_by",
    "stochastic.prior",
    "stochastic.prior_std",
    "stochastic.num_trials",
    "evaluation.protocol",
    "evaluation.precision",
)
"""Settings on which the similarities depend, beside the features."""

REPORT_SETTINGS = (
    "evaluation.post_processing",
    "evaluation.baselines",
    "evaluation.thumbnails",
    "evaluation.videos",
    "data.cache",
)
"""Settings of what is made from the similarities; ``data.cache`` finds the frames of a split behind a URL."""

SCORING_SETTINGS = BLOCK_SETTINGS + REPORT_SETTINGS
"""Settings that may differ from those the features were encoded with."""

ENCODING_SETTINGS = (
    "data.test",
    "data.eval_batch_size",
    "data.num_workers",
    "data.retry_s",
    "engine.timeout_s",
    "evaluation.feature_precision",
    "model.num_frames",
    "model.radius",
)
"""Settings of how a run's test split is encoded; whether the weights fit is checked when they are loaded."""


def value_of(config: Config, key: str) -> Any:
    """The setting with a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def not_applicable(config: Config, key: str) -> str | None:
    """Why a setting changes nothing in an evaluation with these settings; None if it may."""
    needs_mass = key in ("seed", "evaluation.precision", "model.pooled_by") or key.startswith("stochastic.")
    if needs_mass and not config.model.draws_samples:
        setting = "radius=none" if config.model.radius == "none" else f"mass_score={config.model.mass_score}"
        return f"with model.{setting} nothing is sampled"
    if key == "stochastic.prior_std" and config.stochastic.prior != "normal":
        return "only stochastic.prior=normal has it"
    return None


def check_overrides(overrides: list[str], config: Config, keys: tuple[str, ...], option: str) -> None:
    """Raise a UserError for an override that changes nothing.

    Args:
        overrides: ``key=value`` each.
        config: with the overrides.
        keys: the settings that apply.
        option: of the command line, for the message.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key not in keys:
            raise UserError(f"{key} does not apply to {option}; these settings do: {', '.join(keys)}")
        reason = not_applicable(config, key)
        if reason:
            raise UserError(f"{key} does not apply: {reason}")


def scoring_overrides(config: Config, keys: tuple[str, ...] = SCORING_SETTINGS) -> list[str]:
    """The settings ``keys`` of ``config`` as overrides for a feature store, without those that do not apply."""
    values = {key: value_of(config, key) for key in keys if not not_applicable(config, key)}
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]
