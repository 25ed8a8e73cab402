"""Checkpoints of the authors' code: a generated file of their form is converted to ours and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run
from tmass_dist.config import load_config
from tmass_dist.convert import from_authors, read_authors, to_authors
from tmass_dist.models.tmass import build_model

WIDTH, LAYERS, FRAMES = 96, {"text": 2, "vision": 3}, 12


def _their_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoints, for towers of the demo's size."""
    config = load_config("demo.yaml")
    vocabulary = build_model(config.model).towers.clip.token_embedding.num_embeddings
    shapes: dict[str, tuple[int, ...]] = {"clip.logit_scale": ()}
    shapes["clip.text_model.embeddings.token_embedding.weight"] = (vocabulary, WIDTH)
    shapes["clip.text_model.embeddings.position_embedding.weight"] = (16, WIDTH)
    shapes["clip.text_model.embeddings.position_ids"] = (1, 16)
    shapes["clip.vision_model.embeddings.position_ids"] = (1, 17)
    shapes["clip.vision_model.embeddings.class_embedding"] = (WIDTH,)
    shapes["clip.vision_model.embeddings.patch_embedding.weight"] = (WIDTH, 3, 8, 8)
    shapes["clip.vision_model.embeddings.position_embedding.weight"] = (17, WIDTH)
    for name in ("text_projection", "visual_projection"):
        shapes[f"clip.{name}.weight"] = (WIDTH, WIDTH)
    for norm in ("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"):
        shapes |= {f"clip.{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    for tower, count in LAYERS.items():
        for number in range(count):
            layer = f"clip.{tower}_model.encoder.layers.{number}."
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= {f"{layer}self_attn.{projection}.weight": (WIDTH, WIDTH)}
                shapes |= {f"{layer}self_attn.{projection}.bias": (WIDTH,)}
            for norm in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{layer}{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
            shapes |= {f"{layer}mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{layer}mlp.fc1.bias": (4 * WIDTH,)}
            shapes |= {f"{layer}mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{layer}mlp.fc2.bias": (WIDTH,)}
    for module in ("cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.out_proj", "linear_proj"):
        shapes |= {f"pool_frames.{module}.weight": (WIDTH, WIDTH), f"pool_frames.{module}.bias": (WIDTH,)}
    for norm in ("layer_norm1", "layer_norm2", "layer_norm3"):
        shapes |= {f"pool_frames.{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    shapes["stochastic.std_branch.linear_proj.weight"] = (WIDTH, FRAMES)
    shapes["stochastic.std_branch.linear_proj.bias"] = (WIDTH,)
    shapes["stochastic.std_branch.learnable_scalar"] = (1,)
    return shapes


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in _their_names().items()}
    path = tmp_path_factory.mktemp("authors") / "model_best.pth"
    torch.save({"epoch": 3, "state_dict": weights, "monitor_best": 50.0, "optimizer": {"state": {}}}, path)
    return path


def test_there_and_back_is_the_same_file(theirs: Path) -> None:
    weights = read_authors(theirs)
    back = to_authors(from_authors(weights))
    kept = {name: value for name, value in weights.items() if not name.endswith(("position_ids", "learnable_scalar"))}
    assert back.keys() - kept.keys() == {"stochastic.std_branch.learnable_scalar"}
    assert all(torch.equal(back[name], value) for name, value in kept.items())


def test_the_converted_model_attends_as_theirs(theirs: Path, tmp_path: Path) -> None:
    """Query, key and value are concatenated in this order: attention computed from their weights equals our block."""
    target = tmp_path / "ours.safetensors"
    done = run("-m", "tmass_dist.convert", str(theirs), str(target))
    assert done.returncode == 0, done.stderr
    model = build_model(load_config("demo.yaml").model).eval()
    model.load_state_dict(load_file(target))
    weights, layer = read_authors(theirs), "clip.vision_model.encoder.layers.1.self_attn."
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    q, k, v = (
        torch.nn.functional.linear(x, weights[f"{layer}{p}_proj.weight"], weights[f"{layer}{p}_proj.bias"])
        .unflatten(-1, (3, 32))
        .transpose(1, 2)
        for p in "qkv"
    )
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = torch.nn.functional.linear(
        attended, weights[f"{layer}out_proj.weight"], weights[f"{layer}out_proj.bias"]
    )
    block = model.towers.clip.visual.transformer.resblocks[1]
    torch.testing.assert_close(block.attn(x, x, x, need_weights=False)[0], expected)


def test_what_is_no_checkpoint_of_theirs_is_one_line(tmp_path: Path) -> None:
    torn, code, other = tmp_path / "torn.pth", tmp_path / "code.pth", tmp_path / "other.pth"
    torn.write_bytes(b"PK torn")
    torch.save({"state_dict": {"a": tmp_path}}, code)
    torch.save({"state_dict": {"backbone.weight": torch.ones(2)}}, other)
    for path, said in ((torn, "damaged"), (code, "not a file of weights"), (other, "not a checkpoint of the authors")):
        done = run("-m", "tmass_dist.convert", str(path), str(tmp_path / "out.safetensors"))
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.safetensors").exists()
