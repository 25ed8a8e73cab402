"""A frozen image tower encodes each training video once; the training is the same."""

import pytest
import torch

from tests.small_model import batch_of, config_of, own_rows, small_objective
from tmass_dist.training.frozen_frames import FrozenFrames


def _steps(*, remember: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps on the same batch, and the gradients of the last."""
    model = small_objective(config_of("optim.frozen=[towers.clip.visual]"))
    assert model.frozen_frames is not None
    if not remember:
        model.frozen_frames = None
    losses = []
    for _ in range(3):
        model.zero_grad()
        loss = model("whole", *own_rows(batch_of(0))).total
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_remembered_frames_give_the_same_losses_and_gradients() -> None:
    (one, one_gradients), (other, other_gradients) = (_steps(remember=remember) for remember in (True, False))
    assert one == pytest.approx(other, rel=1e-6)
    assert one_gradients.keys() == other_gradients.keys()
    assert not any("visual" in name for name in one_gradients)
    for name, gradient in one_gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-6)


def test_a_video_is_encoded_once_and_gives_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    towers, pixels = small_objective(config_of()).towers, own_rows(batch_of(0))[0]
    calls = []
    encode = towers.encode_frames
    monkeypatch.setattr(towers, "encode_frames", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    frozen = FrozenFrames()
    first = frozen.encode(towers, pixels)
    assert calls == [1] * len(pixels)
    assert torch.equal(frozen.encode(towers, pixels.flip(0)), first.flip(0)) and len(calls) == len(pixels)
    assert torch.equal(FrozenFrames().encode(towers, pixels[1:3]), first[1:3])
    assert not first.requires_grad
    monkeypatch.setattr("tmass_dist.training.frozen_frames.MAX_BYTES", 0)
    full = FrozenFrames()
    full.encode(towers, pixels[:2])
    calls.clear()
    assert torch.equal(full.encode(towers, pixels[:2]), first[:2]) and calls == [1, 1]


@pytest.mark.parametrize("settings", [[], ["engine.zero_stage=3", "optim.frozen=[towers.clip.visual]"]])
def test_frames_are_not_remembered_where_the_tower_learns_or_is_shared_out(settings: list[str]) -> None:
    assert small_objective(config_of(*settings)).frozen_frames is None
