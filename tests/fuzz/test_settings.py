"""Hostile config files, overrides and settings of others."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.inputs import CHANGES, OBJECTS, TEXTS, VALUES
from tests.fuzz.rule import cases, result_or_error
from tmass_dist.config import Config, find_config, flat, load_config, make_config, to_yaml

TYPES: dict[str, Any] = {}
for name, kind in get_type_hints(Config).items():
    inner = (
        {f"{name}.{key}": value for key, value in get_type_hints(kind).items()}
        if hasattr(kind, "__annotations__")
        else {}
    )
    TYPES |= inner or {name: kind}
KEYS = st.sampled_from(sorted(TYPES))
PAGE = find_config("demo.yaml").read_bytes()
DEFAULT = flat(asdict(Config()))
WORDS = st.sampled_from(
    ["true", "False", "yes", "null", "~", "1e3", "0x10", "1_000", "[1, 2]", "{a: 1}", "'x'", "-1", "nan", ".inf", "1.5"]
) | st.sampled_from(
    ["${seed}", "${oc.env:HOME}", "${a}", "${", "${oc.env:SECRET_OF_TEST}", "&a [*a]", "!!python/none", "=", ""]
)


def test_every_setting_is_known_to_these_tests() -> None:
    assert set(TYPES) == set(DEFAULT) and len(TYPES) > 60


@given(change=CHANGES, name=st.sampled_from(["demo.yaml", "msrvtt.yaml"]))
@cases(120)
def test_any_config_file_is_read_or_refused(change: Any, name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "page.yaml"
        path.write_bytes(change(find_config(name).read_bytes()))
        result = result_or_error("config file, damaged", lambda: flat(asdict(load_config(str(path)))), "page.yaml")
        if result is not None:  # what it says is in force; the rest is the default
            page = flat(yaml.safe_load(path.read_bytes()) or {})
            for key, value in result.items():
                expected = page.get(key, DEFAULT[key])
                assert _alike(value, expected), (key, value, expected)


def _alike(value: Any, expected: Any) -> bool:
    """Whether a setting is what YAML holds; text may have been written as a number, and numbers as text."""
    if isinstance(value, float) and isinstance(expected, int | float | str):
        return value == float(expected) or value != value
    if isinstance(expected, str) and ("${" in expected or isinstance(value, bool)):
        return "${" in expected or str(value).lower() == expected.lower()
    return value == expected or str(value) == str(expected) or list(value or ()) == list(expected or ())


@given(tree=st.recursive(VALUES, lambda inner: st.dictionaries(KEYS.map(lambda key: key.split(".")[0]) | TEXTS, inner)))
@cases(150)
def test_any_yaml_is_read_or_refused(tree: Any) -> None:
    try:
        content = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "page.yaml"
        path.write_bytes(content)
        result_or_error("config file, any YAML", lambda: load_config(str(path)) and None, "page.yaml")


@given(key=KEYS, value=WORDS | TEXTS | st.integers().map(str) | st.floats().map(str))
@cases(300)
def test_an_override_is_in_force_or_refused(key: str, value: str) -> None:
    result = result_or_error("override", lambda: flat(asdict(load_config("demo.yaml", [f"{key}={value}"]))))
    if result is None:
        return
    before = flat(asdict(load_config("demo.yaml")))
    assert {name: result[name] for name in result if name != key} == {
        name: before[name] for name in before if name != key
    }
    kind, found = TYPES[key], result[key]
    try:
        plain = yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        plain = value
    if kind in (int, float) and isinstance(plain, int | float) and not isinstance(plain, bool):
        assert found == plain
    elif kind is bool and isinstance(plain, int | float):
        assert found == bool(plain)
    elif kind is bool:
        assert str(found).lower() == value.strip().lower() or value.strip().lower() in (
            "yes",
            "no",
            "on",
            "off",
            "1",
            "0",
        )
    elif kind is str and re.fullmatch(r"[a-z]+", value) and value not in ("null", "true", "yes", "nan"):
        assert found == value


@given(text=TEXTS | st.text(max_size=40))
@cases(150)
def test_any_argument_is_an_override_or_refused(text: str) -> None:
    result_or_error("override, any text", lambda: load_config("demo.yaml", [text]) and None)


@given(key=KEYS | TEXTS, value=OBJECTS)
@cases(180)
def test_settings_of_others_are_read_or_refused_and_read_no_environment(key: str, value: Any) -> None:
    tree: dict[str, Any] = json.loads(json.dumps(asdict(Config())))
    section, _, name = key.partition(".")
    if name and isinstance(tree.get(section), dict):
        tree[section][name] = value
    else:
        tree[key] = value

    def work() -> str:
        return to_yaml(make_config(tree, [], "config.json", allow_env=False))

    result = result_or_error("settings of others", work, "config.json")
    if result is not None:
        assert yaml.safe_load(result).keys() == {field.name for field in fields(Config)}
        assert "oc.env" not in json.dumps(tree)


@given(
    page=st.sampled_from(["a: &a [*a]", "a: &a {b: *a}", "? {a: b}\n: c", "&a b: *a", "!!python/object:os.system x"])
)
@cases(60)
def test_yaml_that_contains_itself_or_runs_code_is_refused(page: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "page.yaml"
        path.write_text(page)
        assert result_or_error("config file, hostile YAML", lambda: bool(load_config(str(path))), "page.yaml") is None


def test_aliases_that_multiply_are_refused_in_little_memory() -> None:
    """The "billion laughs" document: nine lines that stand for a billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 9)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "page.yaml"
        path.write_text("\n".join(lines))
        assert result_or_error("config file, hostile YAML", lambda: bool(load_config(str(path))), "page.yaml") is None
