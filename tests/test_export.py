"""Export and ``convert --back`` check names, shapes and numbers of weights; a card shows results of its own weights."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import run
from tests.test_evaluate_run import make_run
from tmass_dist import TMass
from tmass_dist.errors import UserError
from tmass_dist.retrieval.model import read_export

WEIGHTS = "checkpoints/best.safetensors"


def _damaged(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return write


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "damaged"),
    "empty file": (lambda path: path.write_bytes(b""), "damaged"),
    "header of 2^60 bytes": (lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"), "damaged"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"weights": Path("/")})), "damaged"),
    "no weights": (lambda path: save_file({}, path), "towers.clip"),
    "another model": (_damaged(lambda w: w.update({"extra": torch.ones(1)})), "extra"),
    "lacks one": (_damaged(lambda w: w.pop("head.pooling.key.weight")), "head.pooling.key.weight"),
    "wrong shape": (
        _damaged(lambda w: w.update({"head.pooling.key.bias": torch.ones(7)})),
        "head.pooling.key.bias is (7,) and not (96,)",
    ),
    "NaN": (_damaged(lambda w: w["head.pooling.key.bias"][3].fill_(torch.nan)), "1 weights are not finite"),
    "infinite": (_damaged(lambda w: w["towers.clip.visual.proj"][0, 0].fill_(torch.inf)), "1 weights are not finite"),
    "integers": (
        _damaged(lambda w: w.update({"head.mass.linear.bias": torch.ones(96, dtype=torch.int32)})),
        "head.mass.linear.bias",
    ),
}


@pytest.fixture(scope="module")
def trained(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(data, tmp_path_factory.mktemp("trained") / "run")


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_neither_exported_nor_converted(trained: Path, tmp_path: Path, name: str) -> None:
    damage, message = BAD_WEIGHTS[name]
    directory = Path(shutil.copytree(trained, tmp_path / "run"))
    damage(directory / WEIGHTS)
    for command in (
        ["-m", "tmass_dist.export", str(directory), str(tmp_path / "out")],
        ["-m", "tmass_dist.convert", "--back", str(directory / WEIGHTS), str(tmp_path / "out.pth")],
    ):
        done = run(*command)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert message in done.stderr and "best.safetensors" in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.pth*"))


def test_bad_weights_are_not_evaluated_either(trained: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(trained, tmp_path / "run"))
    BAD_WEIGHTS["NaN"][0](directory / WEIGHTS)
    done = run("-m", "tmass_dist.evaluate", "--run", str(directory))
    assert done.returncode == 2 and "not finite" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_converted_model_comes_back_with_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    back, again = tmp_path / "theirs.pth", tmp_path / "again.safetensors"
    for command in (["--back", str(trained / WEIGHTS), str(back)], [str(back), str(again)]):
        done = run("-m", "tmass_dist.convert", *command)
        assert done.returncode == 0, done.stderr
    one, other = load_file(trained / WEIGHTS), load_file(again)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_config_that_reads_the_environment_is_refused(trained: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(trained, tmp_path / "run"))
    page = directory / "config.yaml"
    lines = page.read_text().splitlines()
    page.write_text("\n".join("seed: ${oc.env:SECRET_OF_TEST}" if line.startswith("seed:") else line for line in lines))
    done = run("-m", "tmass_dist.export", str(directory), str(tmp_path / "out"), SECRET_OF_TEST="123")
    assert done.returncode == 2 and "reads the environment" in done.stderr and "123" not in done.stderr
    export = tmp_path / "export"
    allowed = run("-m", "tmass_dist.export", str(directory), str(export), "--allow-env", SECRET_OF_TEST="123")
    assert allowed.returncode == 0 and "123" not in allowed.stdout + allowed.stderr
    content = json.loads((export / "config.json").read_text())
    assert content["settings"]["seed"] == 123
    content["settings"]["seed"] = "${oc.env:SECRET_OF_TEST}"
    del content["checksum"], content["weights_sha256"]  # as version 0.1 wrote it
    (export / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="reads the environment"):
        TMass.from_pretrained(export)


EXPORT_DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a bit of the weights": (
        "model.safetensors",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    ),
    "a digit of the settings": (
        "config.json",
        lambda content: content.replace(b'"num_trials": 20', b'"num_trials": 10'),
    ),
    "a torn config": ("config.json", lambda content: content[:-40]),
    "a config that is a list": ("config.json", lambda content: b"[]"),
    "a config in another encoding": ("config.json", lambda content: b"\xfb" + content),
    "no weights": ("model.safetensors", lambda content: b""),
}


@pytest.mark.parametrize("name", EXPORT_DAMAGE)
def test_a_damaged_export_is_not_loaded(trained: Path, tmp_path: Path, name: str) -> None:
    export = tmp_path / "export"
    TMass.of_run(trained).save_pretrained(export)
    file, change = EXPORT_DAMAGE[name]
    content = (export / file).read_bytes()
    (export / file).write_bytes(change(content))
    assert (export / file).read_bytes() != content
    with pytest.raises(UserError, match=file):
        TMass.from_pretrained(export)
    with pytest.raises(UserError, match=file):
        read_export(export, [])


def test_an_export_of_version_0_1_is_loaded_with_a_line(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tmass_dist"), "propagate", True)
    export = tmp_path / "export"
    TMass.of_run(trained).save_pretrained(export)
    TMass.from_pretrained(export)
    assert not caplog.records
    content = json.loads((export / "config.json").read_text())
    del content["checksum"], content["weights_sha256"]
    (export / "config.json").write_text(json.dumps(content))
    TMass.from_pretrained(export)
    assert "config.json has no checksums: it was exported by an older version" in caplog.text


def test_the_card_shows_results_of_these_weights_only(trained: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(trained, tmp_path / "run"))
    assert run("-m", "tmass_dist.evaluate", "--run", str(directory)).returncode == 0
    other = tmp_path / "other.safetensors"
    weights = load_file(directory / WEIGHTS)
    weights["head.mass.linear.bias"] += 1
    save_file(weights, other)
    cards = []
    for more in ([], ["--checkpoint", str(other)], ["--checkpoint", str(tmp_path / "none.safetensors")]):
        done = run("-m", "tmass_dist.export", str(directory), str(tmp_path / f"out{len(cards)}"), *more)
        if "none" in str(more):
            assert done.returncode == 2 and "has no weights" in done.stderr, done.stderr
            continue
        assert done.returncode == 0, done.stderr
        cards.append((tmp_path / f"out{len(cards)}" / "README.md").read_text())
    best, named = cards
    assert "selected on the `val` split" in best and "protocol query_conditioned" in best and "for 3 steps" in best
    assert "What selected the checkpoint is not known" in named and "Not evaluated yet" in named
    assert "for 3 steps" not in named
