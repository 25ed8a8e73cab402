"""Towers built by open_clip: architectures, every form of weights, tokens, error messages."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tmass_dist.config import load_config
from tmass_dist.models.backbone import build_tokenizer, build_towers
from tmass_dist.models.head import build_head
from tmass_dist.models.loading import load_weights, settings_of
from tmass_dist.models.tmass import build_model


def test_committed_towers_load_and_encode() -> None:
    towers = build_towers("towers/demo.json", "towers/demo.safetensors")
    tokens = build_tokenizer("towers/demo.json")(["a red circle moving left on a plain ground"])
    assert towers.logit_scale.shape == (1,)
    assert towers.encode_text(tokens).shape == (1, towers.embed_dim)
    pixels = torch.zeros(1, 12, 32, 32, 3, dtype=torch.uint8)
    assert towers.encode_frames(pixels).shape == (1, 12, towers.embed_dim)


@pytest.mark.parametrize(
    ("name", "embed_dim"), [("ViT-B-32-quickgelu", 512), ("ViT-B-16-quickgelu", 512), ("EVA02-B-16", 512)]
)
def test_real_architecture_builds(name: str, embed_dim: int) -> None:
    towers = build_towers(name, None)
    assert towers.embed_dim == embed_dim and towers.image_size == 224 and towers.logit_scale.shape == (1,)
    with torch.inference_mode():
        assert towers.encode_text(build_tokenizer(name)(["a cat"])).shape == (1, embed_dim)
        assert towers.encode_frames(torch.zeros(1, 1, 224, 224, 3, dtype=torch.uint8)).shape == (1, 1, embed_dim)


def test_openai_weights_load_from_each_form_of_file(tmp_path: Path) -> None:
    """OpenAI's own ``.pt`` is a TorchScript archive; others hold a state_dict, or are safetensors."""
    towers = build_towers("towers/demo.json", "towers/demo.safetensors")
    weights = towers.clip.state_dict()
    torch.save(weights, tmp_path / "plain.pt")

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("input_resolution", torch.tensor(32))
            for name, value in weights.items():
                module: torch.nn.Module = self
                *path, leaf = name.split(".")
                for step in path:
                    if not hasattr(module, step):
                        module.add_module(step, torch.nn.Module())
                    module = getattr(module, step)
                value = value.reshape(()) if name == "logit_scale" else value
                module.register_parameter(leaf, torch.nn.Parameter(value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Archive()).save(str(tmp_path / "archive.pt"))
    for name in ("plain.pt", "archive.pt"):
        found = build_towers("towers/demo.json", str(tmp_path / name)).clip.state_dict()
        assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_checkpoint_of_another_architecture_names_the_differences_and_the_settings_that_fit() -> None:
    made = build_model(load_config("demo.yaml", ["model.num_frames=8"]).model)
    for overrides, said in (
        (["model.num_frames=12"], r"mass\.linear\.weight is \(96, 8\) and not \(96, 12\).*model\.num_frames=8"),
        (["model.pooling=mean"], r"has an additional head\.pooling\.query\.weight.*model\.pooling=xpool"),
    ):
        with pytest.raises(ValueError, match=said):
            load_weights(build_model(load_config("demo.yaml", overrides).model), made.state_dict(), "best.safetensors")
    clip = build_towers("ViT-B-32-quickgelu", None).clip.state_dict()
    with pytest.raises(ValueError, match=r"model\.architecture=ViT-B-32-quickgelu"):
        load_weights(build_towers("towers/demo.json", None).clip, clip, "file.pt")


@pytest.mark.parametrize(
    "pooling", ["xpool", "xpool_best_frame", "query_scored", "best_frame", "mean", "weighted_interaction"]
)
def test_the_pooling_of_weights_is_named(pooling: str) -> None:
    radius = ["model.radius=none"] if pooling == "weighted_interaction" else []
    made = build_head(load_config("demo.yaml", [f"model.pooling={pooling}", *radius]).model, 96)
    settings = settings_of({f"head.{name}": value for name, value in made.state_dict().items()})
    expected = pooling if pooling not in ("best_frame", "mean") else "mean or best_frame"
    assert settings[0] == f"model.pooling={expected}"


def test_bad_towers_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ViT-B-32"):
        build_towers("ViT-B-33", None)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((ROOT / "configs" / "towers" / "demo.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn"):
        build_towers("towers/demo.json", str(torn))
    with pytest.raises(ValueError, match="it has openai"):
        build_towers("ViT-B-32-quickgelu", "opnai")
    with pytest.raises(ValueError, match="no file"):
        build_towers("towers/demo.json", "nowhere.safetensors")


@pytest.mark.parametrize("name", ["towers/demo.json", "ViT-B-32-quickgelu", "EVA02-B-16"])
def test_text_without_its_common_padding_is_the_same_text(name: str) -> None:
    torch.manual_seed(0)
    towers = build_towers(name, None).eval()
    texts = ["a red circle", "a much longer text about a blue square moving down over a plain ground"]
    tokens = build_tokenizer(name)(texts)
    full = torch.zeros(2, towers.context_length, dtype=torch.int64)
    full[:, : tokens.shape[1]] = tokens
    if name != "EVA02-B-16":  # open_clip builds this one otherwise, and its texts keep their length
        assert tokens.shape[1] < towers.context_length
    with torch.inference_mode():
        trimmed, whole = towers.encode_text(tokens), towers.encode_text(full)
    assert torch.allclose(trimmed, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["towers/demo.json", "ViT-B-32-quickgelu"])
def test_a_text_by_its_tokens_has_the_whole_text_first_and_zeros_last(name: str) -> None:
    torch.manual_seed(0)
    towers = build_towers(name, None).eval()
    texts = ["a red circle", "a much longer text about a blue square moving down over a plain ground"]
    tokens = build_tokenizer(name)(texts)
    with torch.inference_mode():
        whole_TD = towers.encode_text(tokens)
        alone_TD = towers.encode_text(build_tokenizer(name)([texts[0].rpartition(" ")[0]]))
        towers.keep_tokens()
        vectors_TLD = towers.encode_text(tokens).unflatten(1, (-1, towers.embed_dim))
        full = torch.zeros(2, towers.context_length, dtype=torch.int64)
        full[:, : tokens.shape[1]] = tokens
        full_TW = towers.encode_text(full)
    assert full_TW.shape == (2, towers.text_width) and vectors_TLD.shape[1] == towers.context_length
    bound = 1e-5 * float(whole_TD.abs().max())
    torch.testing.assert_close(vectors_TLD[:, 0], whole_TD, rtol=0, atol=bound)
    torch.testing.assert_close(full_TW, vectors_TLD.flatten(1), rtol=0, atol=bound)
    # As many vectors as tokens up to the end token; the tower is causal, so the first ones are those of a shorter text.
    is_token_TL = vectors_TLD.abs().amax(dim=-1) > 0
    assert is_token_TL.sum(dim=1).tolist() == (tokens.argmax(dim=1) + 1).tolist()
    assert is_token_TL[0].int().diff().tolist().count(-1) == 1 and is_token_TL[0, 0]
    with torch.inference_mode():
        shorter = towers.encode_text(build_tokenizer(name)(["a red"])).unflatten(1, (-1, towers.embed_dim))
    num_tokens = int(is_token_TL[0].sum())
    torch.testing.assert_close(vectors_TLD[0, 1 : num_tokens - 1], shorter[0, 1 : num_tokens - 1], rtol=0, atol=bound)
    torch.testing.assert_close(shorter[0, 0], alone_TD[0], rtol=0, atol=bound)


def test_towers_without_an_end_token_have_no_late_interaction() -> None:
    config = load_config("demo.yaml", ["model.pooling=late_interaction", "model.radius=none"]).model
    with pytest.raises(ValueError, match="late interaction needs a text tower like CLIP's"):
        build_model(replace(config, architecture="EVA02-B-16", pretrained=None))
