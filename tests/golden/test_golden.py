"""Our numbers against the authors' code: every file of ``$TMASS_GOLDEN`` (default: the copies beside this file)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracle import dsl, rank_texts, rank_videos
from tmass_dist.config import Config, ModelConfig, OptimConfig, StochasticConfig
from tmass_dist.convert import HEAD_NAMES
from tmass_dist.data.frames import random_frame_indices, uniform_frame_indices, window_frame_indices
from tmass_dist.data.transforms import crop_flip, resize_centre_crop
from tmass_dist.evaluation.ranking import metrics
from tmass_dist.evaluation.scoring import score
from tmass_dist.models.backbone import build_towers
from tmass_dist.models.head import RetrievalHead, build_head
from tmass_dist.models.tmass import RetrievalModel
from tmass_dist.training.checks import validation_steps
from tmass_dist.training.groups import parameter_groups
from tmass_dist.training.objective import Objective, global_losses
from tmass_dist.training.optim import AuthorsAdamW, warmup_cosine
from tmass_dist.training.validation import improves

DIRECTORY = Path(os.environ.get("TMASS_GOLDEN", Path(__file__).parent / "data"))
FILES = {path.stem: path for path in sorted(DIRECTORY.glob("*.npz"))}


def _files(prefix: str) -> list[str]:
    return [name for name in FILES if name.startswith(prefix)]


def _load(name: str) -> dict[str, Tensor]:
    with np.load(FILES[name], allow_pickle=False) as data:
        numeric = {key: data[key] for key in data.files if data[key].dtype.kind in "iuf"}
    return {
        key: torch.from_numpy(np.array(a, np.float32 if a.dtype == np.float16 else a.dtype))
        for key, a in numeric.items()
    }


def _our_name(theirs: str) -> str:
    if theirs.startswith("radius."):
        return theirs.replace("radius.", "mass.linear.")
    module, leaf = theirs.removeprefix("pool.").rsplit(".", 1)
    return f"pooling.{HEAD_NAMES[module]}.{leaf}"


def _head(data: dict[str, Tensor], num_heads: int) -> RetrievalHead:
    num_frames, width = data["video"].shape[1:]
    head = build_head(ModelConfig(num_frames=num_frames, num_heads=num_heads, dropout=0.0), width)
    theirs = {k.removeprefix("w_"): v for k, v in data.items() if k.startswith(("w_pool.", "w_radius."))}
    head.load_state_dict({_our_name(name): value for name, value in theirs.items()})
    return head.eval()


def _close_to_largest(found: Tensor, expected: Tensor, name: str) -> None:
    """README of the golden data: gradients to 1e-4 of the tensor's largest absolute value.

    The floor is for gradients that are zero but for rounding: a softmax does not see the bias of its keys.
    """
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-4 * expected.abs().max().item() + 1e-6, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("name", _files("train_"))
def test_training_forward_losses_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _load(name)
    num_heads, _, weight, dropout, _ = data["hyper_heads_prior_w_dropout_std"].tolist()
    head = _head(data, int(num_heads))
    if dropout:
        head.train().pooling.dropout = dropout
        keep = data["dropout_keep"].float()
        monkeypatch.setattr("tmass_dist.models.pair_products.keyed_mask", lambda rows, *_: keep[rows])
    text = data["text"].clone().requires_grad_()
    video = data["video"].clone().requires_grad_()
    scale = data["w_logit_scale"].reshape(1).clone().requires_grad_()

    keys = list(range(len(video)))
    stochastic = StochasticConfig(support_weight=weight)
    losses = global_losses(head, text, video, data["eps"], scale, stochastic, dropout_keys=keys)
    losses.total.backward()

    close = {"rtol": 1e-4, "atol": 1e-5}
    if "pooled" in data:
        torch.testing.assert_close(head.pooling(data["text"], data["video"], keys), data["pooled"], **close)
    torch.testing.assert_close(head.mass.radius(data["text"], data["video"]).log(), data["log_radius"], **close)
    torch.testing.assert_close(losses.total, data["loss_total"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.stochastic, data["loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.support, data["loss_support"], rtol=1e-4, atol=1e-6)
    found = {"text": text.grad, "video": video.grad, "logit_scale": scale.grad}
    found["video_norm"] = video.grad.norm(dim=-1)  # the large file's summary of the videos it leaves out
    found |= {name: parameter.grad for name, parameter in head.named_parameters()}
    checked = 0
    for key, expected in data.items():
        if key.startswith("g_"):
            theirs = key.removeprefix("g_").removesuffix("_first16")  # the large file keeps the first 16 videos
            ours = theirs if theirs in found else _our_name(theirs)
            _close_to_largest(found[ours][: len(expected)] if expected.dim() else found[ours][0], expected, theirs)
            checked += 1
    assert checked >= 3


def _hashed_noise(start: int, shape: tuple[int, ...]) -> Tensor:
    x = np.arange(start, start + int(np.prod(shape)), dtype=np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return torch.from_numpy(((x >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape))


def _agrees(found: dict[str, float], expected: Tensor) -> None:
    names = ["R@1", "R@5", "R@10", "R@50", "R@100", "MdR", "MnR"]
    np.testing.assert_allclose([found[name] for name in names], expected.numpy(), rtol=1e-9)


@pytest.mark.parametrize("name", _files("eval_d") + _files("eval_real"))
def test_evaluation_with_given_noise(name: str) -> None:
    data = _load(name)
    num_heads, _, num_trials, _ = (int(x) for x in data["hyper_heads_prior_M_std"].tolist())
    head = _head(data, num_heads)
    text, video, owner = data["text"], data["video"], data["caption_owner"]
    noise = data.get("eps")
    if noise is None:
        noise = _hashed_noise(int(data["noise_hash_start"]), (len(video), num_trials, len(text), text.shape[1]))

    honest = score(head, text, video, pair_noise_VMTD=noise, tile_texts=7, tile_videos=5)
    torch.testing.assert_close(honest, data["sims_query"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score(head, text, video), data["sims_mean_text"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dsl(data["sims_query"]), data["sims_query_dsl"], rtol=1e-4, atol=1e-5)
    _agrees(metrics(rank_texts(honest, owner)), data["sims_query_t2v_f64"])
    _agrees(metrics(rank_videos(honest, owner)), data["sims_query_v2t_f64"])

    published = score(head, text, video, pair_noise_VMTD=noise, protocol="published_code", caption_owner_T=owner)
    expected = data["sims_official"][owner, data["caption_slot"]]
    torch.testing.assert_close(published, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", _files("metrics"))
def test_metrics_of_given_similarities(name: str) -> None:
    """Ties are left out on purpose: the published code lets the lower index win, here a tie counts against us."""
    data = _load(name)
    for case in [key for key in data if f"{key}_t2v_f64" in data and "ties" not in key]:
        padded = data[case]
        owner, slot = (padded[:, :, 0] != -torch.inf).nonzero(as_tuple=True)
        similarity = padded[owner, slot]
        _agrees(metrics(rank_texts(similarity, owner)), data[f"{case}_t2v_f64"])
        _agrees(metrics(rank_videos(similarity, owner)), data[f"{case}_v2t_f64"])


@pytest.mark.parametrize("name", _files("lr_table"))
def test_learning_rates(name: str) -> None:
    data = _load(name)
    steps, warmup = int(data["steps"]), int(data["warmup"])
    rates = [
        [base * warmup_cosine(step, steps, warmup) for base in data["base_lr_f64"].tolist()] for step in range(steps)
    ]
    np.testing.assert_allclose(rates[: len(data["lr_used_f64"])], data["lr_used_f64"].numpy(), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("name", _files("optim"))
def test_optimiser_steps(name: str) -> None:
    data = _load(name)
    parameters = [torch.nn.Parameter(data[f"p{i}_init"].clone()) for i in range(5)]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    optimizer = AuthorsAdamW(groups, lr=0.0, weight_decay=float(data["weight_decay"]))
    for step, rates in enumerate(data["lr_used_f64"].tolist()):
        for i, parameter in enumerate(parameters):
            grads = data.get(f"p{i}_grads")  # one parameter never gets a gradient, and must not decay either
            parameter.grad = None if grads is None else grads[step].clone()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        optimizer.step()
        for i, parameter in enumerate(parameters):
            torch.testing.assert_close(parameter.data, data[f"p{i}_after"][step], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _files("frames"))
def test_uniform_frames(name: str) -> None:
    for length, num_frames, _, *indices in _load(name)["uniform"].tolist():
        assert uniform_frame_indices(length, num_frames) == indices[:num_frames], (length, num_frames)


@pytest.mark.parametrize("name", _files("frames"))
def test_windowed_frames(name: str) -> None:
    for length, fps, start, end, num_frames, works, _, *indices in _load(name)["clip_window"].tolist():
        if works:
            found = window_frame_indices(int(length), fps, start, end, int(num_frames))
            assert found == [int(index) for index in indices[: int(num_frames)]]
        elif start * fps < length:
            # The published code raises on a video shorter than the frames asked of it; here its last frame repeats.
            found = window_frame_indices(int(length), fps, start, end, int(num_frames))
            assert found == uniform_frame_indices(int(length), int(num_frames))
        else:
            with pytest.raises(ValueError, match="no frame"):
                window_frame_indices(int(length), fps, start, end, int(num_frames))


@pytest.mark.parametrize("name", _files("frames"))
def test_random_frames_also_take_what_the_published_code_never_draws(name: str) -> None:
    """Its ranges leave out each segment's last frame, and segments of one frame fail; ours draw the whole segment."""
    rng = np.random.default_rng(0)
    for length, num_frames, works, number, *slots in _load(name)["rand_ranges"].tolist():
        starts, ends = slots[:number], slots[32 : 32 + number]
        draws = np.array([random_frame_indices(length, num_frames, rng) for _ in range(20)])
        assert draws.min() >= 0 and draws.max() < length
        if works:
            longest = max(end - start for start, end in zip(starts, ends))
            if longest <= 4:  # few enough to have been drawn
                segment = [end - start for start, end in zip(starts, ends)].index(longest)
                drawn = {random_frame_indices(length, num_frames, rng)[segment] for _ in range(200)}
                assert drawn == set(range(starts[segment], ends[segment] + 1))


@pytest.mark.parametrize("name", _files("image_transform"))
def test_image_transforms(name: str) -> None:
    data = _load(name)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def finished(pixels_NHWC: Tensor) -> Tensor:
        return ((pixels_NHWC / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)

    for case in {key.split("_")[0] for key in data}:
        pixels, side = data[f"{case}_image"].permute(0, 2, 3, 1), int(data[f"{case}_res"])
        expected = data[f"{case}_test_antialias"]
        torch.testing.assert_close(finished(resize_centre_crop(pixels[None], side)[0]), expected, rtol=1e-4, atol=1e-5)
        for key in data:
            if key.startswith(f"{case}_train") and key.endswith("_top_left_h_w"):
                box = tuple(data[key].tolist())
                for flip in (0, 1):
                    expected = data[key.replace("top_left_h_w", f"flip{flip}_antialias")]
                    found = finished(crop_flip(pixels, box, bool(flip), side))
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _files("eval_schedule"))
def test_when_the_authors_validate_and_what_they_keep(name: str) -> None:
    data = _load(name)
    steps, window = int(data["steps_per_epoch"]), int(data["window"])
    points = data["eval_epoch_step"].tolist()
    num_epochs = max(epoch for epoch, _ in points)
    config = Config(epochs=num_epochs, evals_per_epoch=int(data["evals_per_epoch"]))
    expected = [(epoch - 1) * steps + batch + 1 for epoch, batch in points]
    assert sorted(validation_steps(config, steps, num_epochs * steps)) == expected
    scores = data["R1_f64"].tolist()
    kept = [end for end in range(len(scores)) if improves(scores[: end + 1], window)]
    assert kept == data["saved_at_eval"].tolist()


@pytest.mark.parametrize("name", _files("metrics"))
def test_ties_count_against_us(name: str) -> None:
    """The published code lets the lower index win a tie, so its metrics can only look better."""
    data = _load(name)
    padded = data["ties"]
    owner, slot = (padded[:, :, 0] != -torch.inf).nonzero(as_tuple=True)
    ours, theirs = metrics(rank_texts(padded[owner, slot], owner)), data["ties_t2v_f64"]
    assert ours["MnR"] > float(theirs[6]) and ours["R@1"] <= float(theirs[0])
    torch.testing.assert_close(dsl(padded[owner, slot]), data["ties_dsl"][owner, slot], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _files("eval_d32_ragged"))
def test_dsl_ranks_every_caption(name: str) -> None:
    """The published DSL drops the captions whose slot some video lacks; here every caption is ranked."""
    data = _load(name)
    ranks = rank_texts(dsl(data["sims_query"]), data["caption_owner"])
    assert len(ranks) == len(data["caption_owner"]) and not torch.isnan(data["sims_query"]).any()
    assert torch.isnan(data["sims_official"]).any()  # what a missing slot is to the published code


@pytest.mark.parametrize("name", _files("clip_tiny_train5"))
def test_five_full_training_steps_of_a_tiny_clip(name: str, tmp_path: Path) -> None:
    data = _load(name)
    layers, width, head_width, patch, side = data["vision_layers_width_headwidth_patch_res"].tolist()
    context, vocabulary, text_width, heads, text_layers = data["text_ctx_vocab_width_heads_layers"].tolist()
    vision = {"image_size": side, "patch_size": patch, "width": width, "layers": layers, "head_width": head_width}
    text = {"context_length": context, "vocab_size": vocabulary, "width": text_width, "heads": heads}
    description = {"embed_dim": int(data["embed_dim"]), "vision_cfg": vision, "quick_gelu": True}
    description["text_cfg"] = text | {"layers": text_layers}
    (tmp_path / "tiny.json").write_text(json.dumps(description))
    towers = build_towers(str(tmp_path / "tiny.json"), None)
    weights = {key.removeprefix("clip/"): value for key, value in data.items() if key.startswith("clip/")}
    weights["logit_scale"] = weights["logit_scale"].reshape(1)
    towers.clip.load_state_dict(weights)
    head = build_head(ModelConfig(num_frames=int(data["num_frames"]), dropout=0.0), towers.embed_dim)
    theirs = {key.removeprefix("head/"): value for key, value in data.items() if key.startswith("head/")}
    head.load_state_dict({_our_name(key): value for key, value in theirs.items()})
    stochastic = StochasticConfig(support_weight=float(data["support_weight"]))
    model = Objective(RetrievalModel(towers, head), Config(stochastic=stochastic))
    # The set's network input is u8 / 255 * 4 - 2.
    towers.mean_C, towers.std_C = torch.full((3,), 0.5), torch.full((3,), 0.25)
    groups = parameter_groups(model, OptimConfig())
    optimizer = AuthorsAdamW(groups, lr=0.0, weight_decay=0.2)

    def pixels_of(step: int) -> Tensor:
        size = int(data["batch_sizes"][step])
        return data["images_u8"][step, :size].permute(0, 1, 3, 4, 2)

    with torch.no_grad():
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(towers.encode_text(data["tokens0"]), data["init_text_features"], **close)
        torch.testing.assert_close(towers.encode_frames(pixels_of(0)), data["init_image_features"], **close)
    for step, rates in enumerate(data["lr_used_f64"].tolist()):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        losses = model("whole", pixels_of(step), data[f"tokens{step}"], data[f"eps{step}"], None)
        torch.testing.assert_close(losses.stochastic, data["loss"][step], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses.support, data["loss_support"][step], rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.testing.assert_close(norm, data["grad_norm"][step], rtol=1e-3, atol=0)
        optimizer.step()
    final = {f"final_clip/{key}": value for key, value in towers.clip.state_dict().items()}
    own = {_our_name(key): key for key in theirs}
    final |= {f"final_head/{own[key]}": value for key, value in head.state_dict().items()}
    for key, expected in data.items():
        if key in final:
            torch.testing.assert_close(final[key].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
