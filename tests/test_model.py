"""``TMass``: what is saved loads again, here and in an environment with the few libraries that it needs."""

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from tests.conftest import ROOT, run
from tests.hub import TOKEN, running_hub
from tests.moved_head import moved_head_model
from tmass_dist import TMass
from tmass_dist.config import load_config
from tmass_dist.errors import UserError
from tmass_dist.evaluation.blocks import BlockScorer
from tmass_dist.evaluation.features import Features
from tmass_dist.models.tmass import build_model

TEXTS = ["a red circle moving left on a plain ground", "a blue ring rising on a striped ground", "ein Kreis, 圆"]
CLIPS = [ROOT / "tests" / "clips" / name for name in ("gradio_a.mp4", "pyfeat_no_face.mp4")]
NOT_NEEDED = ("deepspeed", "submitit", "tensorboard", "webdataset", "usearch", "starlette", "uvicorn", "matplotlib")


@pytest.fixture(scope="module")
def model() -> TMass:
    return moved_head_model(result={"step": 7, "selected_on": "val", "results": "| R@1 |"})


@pytest.fixture(scope="module")
def export(model: TMass, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "tiny"
    model.save_pretrained(out)
    return out


def test_a_saved_model_loads_quietly_and_gives_the_same_bits(
    model: TMass, export: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.clear()
    loaded = TMass.from_pretrained(export)
    assert not caplog.records and capsys.readouterr() == ("", "")
    assert loaded.fingerprint() == model.fingerprint() and not loaded.training
    assert torch.equal(loaded.similarity(TEXTS, CLIPS), model.similarity(TEXTS, CLIPS))
    assert loaded.config == model.config and loaded.trained["step"] == 7


def test_similarity_is_that_of_the_evaluation(model: TMass) -> None:
    frames_VFD, text_TD = model.encode_videos(CLIPS), model.encode_text(TEXTS[:2])
    owners = [("a", 0), ("b", 0)]
    features = Features(["a", "b"], frames_VFD, owners, TEXTS[:2], text_TD, torch.arange(2))
    expected_TV = BlockScorer(model.head, features, model.config).score(slice(0, len(features.owner_T)))
    torch.testing.assert_close(model.similarity(TEXTS[:2], frames_VFD), expected_TV, rtol=0, atol=1e-6)


def test_a_score_does_not_depend_on_the_other_texts_and_videos(model: TMass) -> None:
    frames_VFD = model.encode_videos(CLIPS)
    whole_TV = model.similarity([*TEXTS, *(f"text {n}" for n in range(100))], frames_VFD)
    for number, text in enumerate(TEXTS):
        torch.testing.assert_close(model.similarity([text], frames_VFD[1:])[0], whole_TV[number, 1:], rtol=0, atol=1e-6)


def test_no_trials_score_the_text_itself_and_more_trials_never_score_lower(model: TMass) -> None:
    from tmass_dist.evaluation.scoring import score

    frames_VFD = model.encode_videos(CLIPS)
    plain_TV = model.similarity(TEXTS, frames_VFD, num_trials=0)
    assert torch.equal(plain_TV, score(model.head, model.encode_text(TEXTS), frames_VFD))
    few_TV, many_TV = (model.similarity(TEXTS, frames_VFD, num_trials=trials) for trials in (1, 20))
    assert (many_TV >= few_TV - 1e-6).all() and not torch.allclose(few_TV, plain_TV)


def test_attention_is_a_distribution_over_the_frames(model: TMass) -> None:
    weights_VTF = model.attention(model.encode_text(TEXTS), model.encode_videos(CLIPS))
    assert weights_VTF.shape == (2, 3, 12)
    torch.testing.assert_close(weights_VTF.sum(-1), torch.ones(2, 3))


def test_shards_and_files_are_encoded_alike(model: TMass, data: list[str]) -> None:
    shards = next(entry.removeprefix("data.test=") for entry in data if entry.startswith("data.test="))
    videos = sorted((Path(shards).parent / "v" / "videos").glob("test*.mp4"))
    files_VFD, packed_VFD = model.encode_videos(videos), model.encode_videos(shards)
    cosine = torch.nn.functional.cosine_similarity(files_VFD, packed_VFD, dim=-1)
    assert packed_VFD.shape == (14, 12, 96) and cosine.min() > 0.99  # they differ by the JPEG of the shards


def test_open_clip_loads_the_towers(model: TMass, tmp_path: Path) -> None:
    import open_clip

    model.save_open_clip(tmp_path)
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokens_TL = torch.nn.functional.pad(model.tokenize(TEXTS), (0, 16))[:, :16]
    with torch.no_grad():
        torch.testing.assert_close(clip.eval().encode_text(tokens_TL), model.encode_text(TEXTS), rtol=1e-5, atol=1e-5)


def test_it_works_offline_in_an_environment_that_lacks_what_training_needs(export: Path, tmp_path: Path) -> None:
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith((*NOT_NEEDED, "__editable__", "__pycache__")):
            (libraries / entry.name).symlink_to(entry)
    code = f"""
import sys
sys.path += [{str(ROOT)!r}, {str(libraries)!r}]
import importlib.util
assert not any(importlib.util.find_spec(name) for name in {NOT_NEEDED})
from tmass_dist import TMass
model = TMass.from_pretrained({str(export)!r})
print(model.similarity({TEXTS!r}, {[str(clip) for clip in CLIPS]!r}).shape)
"""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("torch.Size([3, 2])\n", "")


def test_the_example_of_the_card_runs_as_it_stands(export: Path, tmp_path: Path) -> None:
    card = (export / "README.md").read_text(encoding="utf-8")
    for fact in ("7 steps", "| R@1 |", "selected on the `val` split", "library_name: tmass-dist"):
        assert fact in card
    [example] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    (tmp_path / "videos").mkdir()
    for clip in CLIPS:
        shutil.copy(clip, tmp_path / "videos")
    (tmp_path / "tiny").symlink_to(export)
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"a dog jumps into a lake -> videos/\w+.mp4\n", done.stdout)


def test_what_is_no_model_is_named_in_one_line(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="holds no model"):
        TMass.from_pretrained(tmp_path)
    for nothing in ("nowhere/at-all", str(tmp_path / "missing")):
        with pytest.raises(UserError, match="there is no model"):
            TMass.from_pretrained(nothing)
    broken = shutil.copytree(export, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="missing or damaged"):
        TMass.from_pretrained(broken)
    for content, said in (
        ("{", "damaged"),
        ("{}", "damaged"),
        ('{"settings": {"optim": {"lrr": 1}}}', "optim.lr"),
    ):
        (broken / "config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            TMass.from_pretrained(broken)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model.encode_text("one text"), "needs a list"),
        (lambda model: model.encode_text([]), "at least one text"),
        (lambda model: model.encode_videos(["nowhere.mp4"]), "do not exist: nowhere.mp4"),
        (lambda model: model.encode_videos([ROOT / "README.md"]), "README.md cannot be decoded"),
        (lambda model: model.encode_videos([]), "at least one video"),
        (lambda model: model.similarity(TEXTS, CLIPS, num_trials=-1), "num_trials is -1"),
    ],
)
def test_bad_input_is_a_user_error(model: TMass, call, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(model)


def test_a_converted_checkpoint_is_a_whole_export(model: TMass, tmp_path: Path) -> None:
    from tmass_dist.convert import to_authors

    theirs = tmp_path / "model_best.pth"
    torch.save({"state_dict": to_authors(model.state_dict())}, theirs)
    done = run("-m", "tmass_dist.convert", str(theirs), str(tmp_path / "out"), "--config", "demo.yaml")
    assert done.returncode == 0, done.stderr
    loaded = TMass.from_pretrained(tmp_path / "out")
    assert loaded.fingerprint() == model.fingerprint()
    assert "model_best.pth" in (tmp_path / "out" / "README.md").read_text()
    back = tmp_path / "back.pth"
    assert run("-m", "tmass_dist.convert", "--back", str(tmp_path / "out"), str(back)).returncode == 0
    assert set(torch.load(back, weights_only=True)["state_dict"]) == set(to_authors(model.state_dict()))
    refused = run("-m", "tmass_dist.convert", str(theirs), str(tmp_path / "w.safetensors"), "seed=1")
    assert refused.returncode == 2 and "name a directory" in refused.stderr


@pytest.mark.parametrize(
    "settings",
    ["training_radius=pair", "samples=2", "training=mean"],
)
def test_settings_of_samples_do_not_apply_where_nothing_is_sampled(settings: str) -> None:
    with pytest.raises(UserError, match=r"model.mass_score=expected nothing is sampled"):
        load_config("demo.yaml", ["model.mass_score=expected", f"stochastic.{settings}"])


@torch.no_grad()
def test_a_number_of_samples_is_refused_where_none_are_drawn() -> None:
    for settings, trials in ((["model.radius=none"], 5), (["model.mass_score=expected"], 0)):
        config = load_config("demo.yaml", settings)
        model = TMass.of_weights(config, build_model(config.model).state_dict(), "this test")
        with pytest.raises(UserError, match="draws no samples"):
            model.similarity(TEXTS, torch.randn(2, 12, model.embed_dim), num_trials=trials)


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make an address the Hub of this process; the library reads it from the environment when it is imported."""

    def use(address: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    return use


def test_a_pushed_model_loads_by_its_name_and_then_offline(
    model: TMass, export: Path, tmp_path: Path, use_hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = TMass.from_pretrained(export)
    with running_hub() as (address, hub):
        use_hub(address)
        with pytest.raises(HfHubHTTPError):
            mine.push_to_hub("lab/tiny", token="hf_wrong")
        assert not hub.files
        assert mine.push_to_hub("lab/tiny", token=TOKEN) == f"{address}/lab/tiny/commit/{'a' * 40}"
        assert {path.removeprefix("lab/tiny/") for path in hub.files} == {path.name for path in export.iterdir()}
        assert hub.files["lab/tiny/model.safetensors"] == (export / "model.safetensors").read_bytes()
        loaded = TMass.from_pretrained("lab/tiny", cache_dir=tmp_path)
        assert loaded.fingerprint() == model.fingerprint() and loaded.trained["step"] == 7
        assert mine.push_to_hub("lab/tiny", token=TOKEN)  # the repository exists
    assert TMass.from_pretrained("lab/tiny", cache_dir=tmp_path).fingerprint() == model.fingerprint()  # Hub gone
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert TMass.from_pretrained("lab/tiny", cache_dir=tmp_path).fingerprint() == model.fingerprint()
    card = hub.files["lab/tiny/README.md"].decode()
    assert 'TMass.from_pretrained("lab/tiny")' in card and "tmass index lab/tiny" in card


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_gives_no_model_is_one_line(
    export: Path, tmp_path: Path, use_hub: Callable[[str], None], status: int
) -> None:
    with running_hub({f"lab/tiny/{path.name}": path.read_bytes() for path in export.iterdir()}) as (address, hub):
        use_hub(address)
        hub.status = status
        with pytest.raises(UserError, match=r"there is no model lab/tiny: [^\n]*$"):
            TMass.from_pretrained("lab/tiny", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"cut", "missing or damaged"),
        ("config.json", b"{}", "damaged"),
        ("config.json", b"\xff{", "damaged"),
        ("config.json", b'"text"', "damaged"),
        ("config.json", None, "no model lab/tiny"),
        ("model.safetensors", None, "no model lab/tiny"),
    ],
)
def test_a_damaged_model_on_the_hub_is_one_line(
    export: Path, tmp_path: Path, use_hub: Callable[[str], None], name: str, content: bytes | None, said: str
) -> None:
    files = {f"lab/tiny/{path.name}": path.read_bytes() for path in export.iterdir()}
    del files[f"lab/tiny/{name}"]
    with running_hub(files if content is None else files | {f"lab/tiny/{name}": content}) as (address, _):
        use_hub(address)
        with pytest.raises(UserError, match=said) as refused:
            TMass.from_pretrained("lab/tiny", cache_dir=tmp_path)
    assert "\n" not in str(refused.value)
