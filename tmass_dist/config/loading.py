"""Settings from a file of ``configs/`` and from the command line, and back to YAML."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from tmass_dist.config.schema import Config, flat
from tmass_dist.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_DIR = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())
"""``configs/`` of the repository; an installed wheel has its own copy, ``tmass_dist/configs``."""


def find_config(name: str) -> Path:
    """Path of a config file: ``name`` as a path, else a file of ``configs/``.

    Raises:
        UserError: there is no such file; the message lists those of ``configs/``.
    """
    for path in (Path(name), CONFIG_DIR / name):
        if path.is_file():
            return path
    pages = ", ".join(sorted(page.name for page in CONFIG_DIR.glob("*.yaml")))
    raise UserError(f"no config file {name!r}, neither here nor in configs/, which has {pages}")


def load_config(name: str, overrides: list[str] | None = None, *, allow_env: bool = True) -> Config:
    """The defaults, changed by a config file, then by dotted overrides (``optim.lr=1e-5``).

    Args:
        name: a path, or the name of a file of ``configs/``.
        overrides: ``key=value`` each.
        allow_env: whether ``${...}`` may call a resolver such as ``oc.env``. False for files that others wrote: they
            could read environment variables of this machine.

    Raises:
        UserError: an unknown key (the nearest one is named), a value of the wrong type, or one out of range.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        page = OmegaConf.load(find_config(name))
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{name}: {error}") from error
    return make_config(page, overrides, name, allow_env=allow_env)


def make_config(
    settings: Any, overrides: list[str] | None = None, name: str = "the settings", *, allow_env: bool = True
) -> Config:
    """The defaults, changed by ``settings`` (nested dictionaries), then by dotted overrides; see :func:`load_config`.

    Raises:
        UserError: as :func:`load_config`; ``name`` says where the settings come from.
    """
    from omegaconf import OmegaConf

    overrides = overrides or []
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"{override!r} is not an override; write key=value, for example optim.lr=1e-5")
    plain = OmegaConf.to_container(settings, resolve=False) if OmegaConf.is_config(settings) else settings
    if not isinstance(plain, dict):
        raise UserError(f"{name} must be a mapping of keys to values")
    if not allow_env:
        _refuse_resolvers(plain, name)
    try:
        return _merge(settings, overrides)
    except UserError as error:
        line = _without_environment(str(error), [plain, overrides])
        if overrides and _error_of(settings) != str(error):
            raise UserError(line) from None  # an override is wrong: the message names its key
        raise UserError(f"{name}: {line}") from None


def _merge(settings: Any, overrides: list[str]) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        changes = OmegaConf.merge(settings, OmegaConf.from_dotlist(overrides))
        _check_keys(OmegaConf.to_container(changes, resolve=True), Config)
        merged = OmegaConf.merge(OmegaConf.structured(Config), changes)
        return _require_config(OmegaConf.to_object(merged))
    except (OmegaConfBaseException, TypeError, RecursionError) as error:
        line, key = str(error).partition("\n")[0], getattr(error, "full_key", None)
        raise UserError(f"{key}: {line}" if key and str(key) not in line else line) from error
    except (YAMLError, UnicodeEncodeError) as error:
        raise UserError(f"an override is not valid YAML: {' '.join(str(error).split())}") from error


def _error_of(settings: Any) -> str:
    """What is wrong with settings that no override changes; empty if they are valid."""
    try:
        _merge(settings, [])
        return ""
    except UserError as error:
        return str(error)


def _without_environment(line: str, settings: Any) -> str:
    """``line`` without the values of the environment variables that the settings read: some are secret."""
    for name in re.findall(r"oc\s*\.\s*env\s*:\s*(\w+)", str(settings)):
        if value := os.environ.get(name):
            line = line.replace(value, f"(the value of {name})")
    return line


def _refuse_resolvers(value: Any, name: str) -> None:
    """Raise an error if a string of the settings calls a resolver (``${oc.env:HOME}``); it never prints the value."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_resolvers(key, name)
            _refuse_resolvers(item, name)
    elif isinstance(value, list):
        for item in value:
            _refuse_resolvers(item, name)
    # A resolver's name may itself be interpolated: ${oc.${kind}:HOME}.
    elif isinstance(value, str) and re.search(r"\$\{.*:", value, re.DOTALL):
        raise UserError(
            f"{name} reads the environment of this machine ({value[:60]!r}); write the value there, or, if you trust "
            "the file, use a command that has --allow-env"
        )


def _require_config(value: object) -> Config:
    assert isinstance(value, Config)
    return value


def _check_keys(settings: Any, cls: type, prefix: str = "") -> None:
    """Raise an error that names the nearest key for an unknown one; OmegaConf's own message is longer and does not."""
    if not isinstance(settings, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the config'} must be a mapping of keys to values")
    known = {f.name: f for f in fields(cls)}
    for key, value in settings.items():
        if key not in known:
            near = [f"{prefix}{name}" for name in difflib.get_close_matches(str(key), known, n=1)]
            near += [name for name in flat(asdict(Config())) if name.split(".")[-1] == key]  # in another section
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise UserError(f"unknown config key {prefix}{key}; {hint}")
        factory = known[key].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            _check_keys(value, factory, f"{prefix}{key}.")


def to_yaml(config: Config) -> str:
    """All settings as YAML; :func:`load_config` reads it back."""
    import yaml

    # PyYAML writes 1e-06, which YAML 1.1 readers take for a string; with a dot (1.0e-06) they read a number.
    return re.sub(r"(?m)(: -?\d+)(e[-+]\d+)$", r"\1.0\2", yaml.safe_dump(asdict(config), sort_keys=False))
