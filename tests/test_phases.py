"""The phases of a step: each holds the delay that was put into it."""

from pathlib import Path

from tests.test_faults import start

DELAYS = """
import time
import torch
from tmass_dist import distributed
from tmass_dist.models.backbone import Towers
from tmass_dist.training.optim import AuthorsAdamW

class Delay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, forward_s, backward_s):
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_s)
        return gradient, None, None

def delayed(function, forward_s, backward_s):
    def run(*arguments, **options):
        return Delay.apply(function(*arguments, **options), forward_s, backward_s)
    return run

def before(function, seconds):
    def run(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)
    return run

Towers.encode_frames = delayed(Towers.encode_frames, 0.1, 2.5)
Towers.encode_text = delayed(Towers.encode_text, 0.1, 2.3)
AuthorsAdamW._update = before(AuthorsAdamW._update, 0.2)
distributed.dist.all_gather_into_tensor = before(distributed.dist.all_gather_into_tensor, 0.3)
HEAD
"""

HEAD = """
from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.stochastic import TextMass
TextMass.radius = delayed(TextMass.radius, 0.2, 0.4)
"""


def test_each_phase_holds_its_own_delay(data: list[str], tmp_path: Path) -> None:
    """The image tower's backward pass (2.5 s) was once part of the head, whose own delays are 0.2 and 0.4 s."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = [*data, "max_steps=1", "eval_every=1", "data.num_workers=1", "engine.timeout_s=100"]
    ranks = start(overrides, tmp_path / "run", fault=DELAYS.replace("HEAD", HEAD))
    for rank in (0, 1):
        assert ranks.ends(rank, 240) == 0, ranks.words(rank)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    phases = ("encode", "head", "communication", "optimizer")
    seconds = {name: events.Scalars(f"speed/{name}_s")[-1].value for name in phases}
    print(seconds)
    for name, delay in (("encode", 5.0), ("head", 0.6), ("communication", 0.3), ("optimizer", 0.2)):
        assert seconds[name] >= delay - 0.01, seconds
    assert seconds["head"] < 0.6 + 2.3, seconds  # the smaller delay of the towers' backward passes
