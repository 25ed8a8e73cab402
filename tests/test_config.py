"""Config files and overrides that are wrong: one line that names the file, or the key of the override."""

from pathlib import Path

import pytest

from tmass_dist.config import load_config, make_config
from tmass_dist.errors import UserError

PAGES = {
    "another encoding": b"# \xa3\nseed: 1\n",
    "a list": b"- seed\n",
    "a text": b"seed\n",
    "an unknown key": b"seeds: 1\n",
    "a section that is a list": b"optim: [1]\n",
    "a value of another type": b"seed: many\n",
    "a value out of range": b"epochs: 0\n",
    "a mapping that contains itself": b"data: &a {train: *a}\n",
    "not YAML": b"seed: [\n",
    "code": b"seed: !!python/object/apply:os.getpid []\n",
    "a key that is a mapping": b"? {a: b}\n: c\n",
}


@pytest.mark.parametrize("name", PAGES)
def test_the_message_names_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "page.yaml"
    path.write_bytes(PAGES[name])
    for overrides in ([], ["epochs=3", "data.batch_size=8"] if name != "a value out of range" else ["seed=3"]):
        with pytest.raises(UserError) as error:
            load_config(str(path), overrides)
        assert "page.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["optim.lrr=1", "seed=many", "epochs=0", "seed=[", "run_dir=\udcff", "seed.x=1"])
def test_an_override_is_not_blamed_on_the_file(override: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("demo.yaml", [override])
    assert "demo.yaml" not in str(error.value)


def test_settings_of_others_must_be_a_mapping() -> None:
    for settings in ([], ["seed"], [{"seed": 1}]):
        with pytest.raises(UserError, match=r"^config\.json must be a mapping of keys to values$"):
            make_config(settings, [], "config.json", allow_env=False)


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "${oc.${run_dir}:HOME}", "${ oc.env :HOME}", "x${seed}${oc.env:HOME}"]
)
def test_settings_of_others_read_no_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "hunter2")
    with pytest.raises(UserError) as error:
        make_config({"run_dir": "env", "data": {"train": value}}, [], "config.json", allow_env=False)
    assert "config.json reads the environment" in str(error.value) and "hunter2" not in str(error.value)


@pytest.mark.parametrize("place", ["page", "override"])
@pytest.mark.parametrize("key", ["optim.lr", "model.radius", "engine.bf16", "optim.kind"])
def test_an_error_does_not_print_the_value_of_an_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, place: str
) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", "hunter2")
    section, _, name = key.partition(".")
    path = tmp_path / "page.yaml"
    path.write_text(f"{section}: {{{name}: '${{oc.env:SECRET_OF_TEST}}'}}\n" if place == "page" else "seed: 1\n")
    with pytest.raises(UserError, match=key) as error:
        load_config(str(path), [] if place == "page" else [f"{key}=${{oc.env:SECRET_OF_TEST}}"])
    assert "hunter2" not in str(error.value), error.value


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "seed=2147483648",
        "data.batch_size=100000000000",
        "data.num_workers=5000",
        "data.eval_batch_size=9999999",
    ],
)
def test_numbers_that_no_machine_can_use_are_refused(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"^{key} is {value}: "):
        load_config("demo.yaml", [override])


@pytest.mark.parametrize(
    "override", ["optim.lr=abc", "data.batch_size=1.5", "model.radius=circle", "log.to=5", "seed=null"]
)
def test_a_value_of_the_wrong_type_is_named_by_its_key(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("demo.yaml", [override])
    assert str(caught.value).startswith(f"{override.partition('=')[0]}: ")
