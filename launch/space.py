"""The settings that ``--tune`` searches: ``optim.lr=log:1e-6..1e-4``, ``stochastic.samples=1..4``, ``seed=1,2``."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from tmass_dist.config import Config, flat, load_config
from tmass_dist.errors import UserError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")
_FORMS = "write KEY=LOW..HIGH, KEY=log:LOW..HIGH or KEY=A,B,..."
_FIXED = ("run_dir", "evaluation.selected_on", "data.val", "data.test", "data.holdout")
"""Settings that say where a trial is, or by what it is judged."""


@dataclass(frozen=True)
class Dimension:
    """One setting: a range from ``low`` to ``high``, both included, or ``choices``."""

    key: str
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    choices: tuple[str, ...] = ()

    def suggest(self, trial: Any) -> None:
        """Draw a value for an Optuna trial; it is kept if the trial has one."""
        if self.choices:
            trial.suggest_categorical(self.key, self.choices)
        elif isinstance(self.low, int):
            trial.suggest_int(self.key, self.low, self.high, log=self.log)
        else:
            trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def ends(self) -> tuple[str, ...]:
        """Values that must be valid: both ends of the range, or every choice."""
        return self.choices or (str(self.low), str(self.high))


def parse_space(specs: list[str], page: str, overrides: list[str]) -> list[Dimension]:
    """The settings to search.

    Args:
        specs: ``KEY=VALUES`` each.
        page: config file of the trials.
        overrides: of all trials.

    Raises:
        UserError: one is not of a known form, is empty, appears twice or among the overrides, or has an end that the
            setting does not allow.
    """
    kinds = flat(asdict(load_config(page, overrides)))
    fixed = {override.partition("=")[0] for override in overrides}
    space: list[Dimension] = []
    for spec in specs:
        key, _, values = spec.partition("=")
        if not values:
            raise UserError(f"--tune {spec}: {_FORMS}")
        if key in _FIXED:
            raise UserError(f"--tune {spec}: {key} must be the same for all trials")
        if key in fixed:
            raise UserError(f"--tune {spec}: {key} is also given as {key}=...; leave one of them out")
        if any(dimension.key == key for dimension in space):
            raise UserError(f"--tune {spec}: {key} appears twice")
        dimension = _dimension(spec, key, values, kinds.get(key))
        for value in dimension.ends():
            try:
                load_config(page, [*overrides, f"{key}={value}"])
            except UserError as error:
                raise UserError(f"--tune {spec}: {error}") from error
        space.append(dimension)
    return space


def _dimension(spec: str, key: str, values: str, current: Any) -> Dimension:
    match = _RANGE.fullmatch(values)
    if match is None:
        choices = tuple(value for value in values.split(",") if value)
        if values.startswith("log:") or ".." in values:
            raise UserError(f"--tune {spec}: {_FORMS}, with numbers")
        if len(set(choices)) < 2:
            raise UserError(f"--tune {spec}: fewer than two values; {_FORMS}, or give the setting as {key}=VALUE")
        return Dimension(key, choices=tuple(dict.fromkeys(choices)))
    if isinstance(current, str | bool | list | tuple):
        raise UserError(f"--tune {spec}: {key} is no number; write {key}=A,B,...")
    is_log, low, high = bool(match[1]), float(match[2]), float(match[3])
    if not low < high:
        raise UserError(f"--tune {spec}: the range is empty; {_FORMS}")
    if is_log and low <= 0:
        raise UserError(f"--tune {spec}: a logarithmic range begins above 0")
    # An integer setting, or one without a default whose ends are written as integers.
    if isinstance(current, int) or (current is None and match[2].isdigit() and match[3].isdigit()):
        if not (low.is_integer() and high.is_integer()):
            raise UserError(f"--tune {spec}: {key} is a whole number")
        return Dimension(key, int(low), int(high), is_log)
    return Dimension(key, low, high, is_log)


def as_overrides(params: dict[str, Any]) -> list[str]:
    """The drawn values as overrides, exact to the last digit."""
    return [f"{key}={value}" for key, value in params.items()]


def describe_space(config: Config, space: list[Dimension], specs: list[str]) -> str:
    """One line for each setting, with its value in the config."""
    current = flat(asdict(config))
    return "\n".join(f"  {spec}    (the config has {current[d.key]})" for d, spec in zip(space, specs))
