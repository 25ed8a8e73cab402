"""Pretrained towers by tag: found in the cache, fetched from a Hub on this machine, or refused in one line."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import run
from tests.hub import Hub, running_hub
from tests.small_model import TOWERS
from tmass_dist.config import load_config
from tmass_dist.errors import UserError
from tmass_dist.models import library
from tmass_dist.models.pretrained import check_pretrained, file_name, pretrained_cfg
from tmass_dist.network import answers

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY = {"embed_dim": 32, "vision_cfg": TOWERS["vision_cfg"], "text_cfg": TEXT}
"""The description of an architecture of open_clip."""
REGISTER = """
import sys
from tmass_dist.models import library
open_clip = library.open_clip()
open_clip.add_model_config({folder!r})
open_clip.pretrained._PRETRAINED["Tiny"] = {{"lab": {{"hf_hub": "lab/tiny/", "mean": (0.1,) * 3, "std": (0.9,) * 3}}}}
"""
FETCH = """
from tmass_dist.cli import run_command
from tmass_dist.weights import main
run_command(main)
"""
COMPARE = """
import torch
from tmass_dist.models.backbone import build_towers
tag, file = (build_towers("Tiny", pretrained) for pretrained in ("lab", sys.argv[1]))
one, other = tag.state_dict(), file.state_dict()
assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
assert tag.mean_C.tolist() == file.mean_C.tolist() == torch.full((3,), 0.1).tolist()
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """Address of a Hub that holds weights of the architecture ``Tiny``, and its handler."""
    torch.manual_seed(3)
    clip = library.open_clip().CLIP(**TINY)
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, tmp_path / "w.safetensors")
    with running_hub({"lab/tiny/open_clip_model.safetensors": (tmp_path / "w.safetensors").read_bytes()}) as running:
        yield running


def _script(tmp_path: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter in which open_clip knows ``Tiny``; its cache is below ``tmp_path``."""
    folder = tmp_path / "models"
    folder.mkdir(exist_ok=True)
    (folder / "Tiny.json").write_text(json.dumps(TINY))
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"} | environment
    return run("-c", REGISTER.format(folder=str(folder)) + code, *arguments, **environment)


def test_fetch_writes_a_file_that_loads_as_the_tag_does(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, handler = hub
    fetched = _script(tmp_path, FETCH, "fetch", "Tiny", "lab", "--out", str(tmp_path / "w"), HF_ENDPOINT=address)
    assert fetched.returncode == 0, fetched.stderr
    path = tmp_path / "w" / "Tiny.lab.safetensors"
    assert f"{path} is written" in fetched.stdout
    published, written = load_file(tmp_path / "w.safetensors"), load_file(path)
    assert published.keys() == written.keys() and all(torch.equal(written[name], published[name]) for name in published)
    num_requests = len(handler.requests)
    compared = _script(tmp_path, COMPARE, str(path), HF_ENDPOINT=address)  # the tag is in the cache: nothing is asked
    assert compared.returncode == 0, compared.stderr
    assert len(handler.requests) == num_requests


def test_a_repository_that_gives_no_access_is_one_line(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, handler = hub
    handler.status = 404
    done = _script(tmp_path, FETCH, "fetch", "Tiny", "lab", "--out", str(tmp_path), HF_ENDPOINT=address)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "the Hub gives no access to lab/tiny" in done.stderr and not list(tmp_path.glob("Tiny*"))


TRAIN = "import runpy; runpy.run_module('tmass_dist.train', run_name='__main__', alter_sys=True)"
SUBMIT = "import sys, runpy; sys.argv = ['launch/submit.py', '--cluster', 'local', '--gpus', '0', *sys.argv[1:]]\n"
SUBMIT += "runpy.run_path('launch/submit.py', run_name='__main__')"
WITHOUT_TORCH = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\n"


@pytest.mark.parametrize(
    ("script", "offline"),
    [(TRAIN, {"HF_HUB_OFFLINE": "1"}), (WITHOUT_TORCH + SUBMIT, {"HF_ENDPOINT": "http://127.0.0.1:9"})],
    ids=["train", "submit"],
)
def test_missing_weights_are_one_line_before_anything_starts(
    tmp_path: Path, script: str, offline: dict[str, str]
) -> None:
    run_dir = tmp_path / "run"
    # A new interpreter, because HF_* are read once.
    done = run("-c", script, "--config", "msrvtt.yaml", f"run_dir={run_dir}", HF_HOME=str(tmp_path), **offline)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in (
        "the weights openai of ViT-B-32-quickgelu are not in the cache",
        "HF_HUB_OFFLINE is set" if "HF_HUB_OFFLINE" in offline else "http://127.0.0.1:9 cannot be reached",
        "`tmass weights fetch ViT-B-32-quickgelu openai --out weights`",
        "copy weights/ViT-B-32-quickgelu.openai.safetensors",
        "set model.pretrained",
    ):
        assert part in done.stderr
    assert done.stdout.strip() in ("", "False")  # torch takes seconds to import
    assert not run_dir.exists()


CATALOGS = """
import sys
from tmass_dist.models import library
files = library.catalog()
assert "open_clip" not in sys.modules and "torch" not in sys.modules
library.open_clip()
import safetensors.torch
assert files == library.catalog(), "the files say something else than the package"
print(len(files.architectures), sum(map(len, files.weights.values())))
"""


def test_the_catalog_of_open_clips_files_is_that_of_the_package() -> None:
    done = run("-c", CATALOGS)
    assert done.returncode == 0, done.stderr
    assert all(int(number) > 100 for number in done.stdout.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.architecture=ViT-B-31"], "no architecture 'ViT-B-31'; the nearest are ViT-B-32"),
        (["model.architecture=vit_b32"], "no architecture 'vit_b32'; the nearest are ViT-B-32"),
        (["model.architecture=qqqq"], "no architecture 'qqqq'; the nearest are"),
        (["model.architecture=ViT-B-32", "model.pretrained=opnai"], "it has openai, laion400m_e31"),
        (["model.pretrained=nowhere.safetensors"], "model.pretrained=nowhere.safetensors: no file"),
        (
            ["model.pretrained=openai"],
            "is a tag of open_clip, and model.architecture=towers/demo.json",
        ),
        (["model.architecture=nowhere.json"], "no file nowhere.json"),
    ],
)
def test_what_open_clip_does_not_know_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_pretrained(load_config("demo.yaml", overrides).model)


def test_a_file_that_is_no_towers_is_named_before_ranks_start(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"towers.clip.logit_scale": torch.ones(1), "head.mass.scale": torch.ones(1)}, path)
    model = load_config("demo.yaml", [f"model.pretrained={path}"]).model
    with pytest.raises(UserError, match=r"holds a whole model .* start from a whole model with init_from=PATH"):
        check_pretrained(model)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"model\.pretrained=.*model\.safetensors is damaged"):
        check_pretrained(model)


def test_the_normalisation_follows_the_tag_in_the_name_of_a_fetched_file() -> None:
    tags = library.open_clip().list_pretrained_tags_by_model("ViT-L-14")
    by_tag = {tag: pretrained_cfg("ViT-L-14", tag)["mean"] for tag in tags}
    assert len(set(by_tag.values())) > 1
    for tag, mean in by_tag.items():
        assert pretrained_cfg("ViT-L-14", f"/x/{file_name('ViT-L-14', tag)}")["mean"] == mean


def test_a_server_answers_with_any_status_and_nothing_else_counts(hub: tuple[str, type[Hub]]) -> None:
    assert answers(hub[0]) and answers(f"{hub[0]}/missing")
    assert not answers("http://127.0.0.1:9") and not answers("no address") and not answers("http://name.invalid")
