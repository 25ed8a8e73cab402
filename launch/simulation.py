"""One training step of one rank, simulated: its memory, exchanges and FLOPs, without memory, GPUs or other ranks.

``python -m launch.simulation CONFIG RANKS`` prints them as JSON. Tensors have shapes and no contents (torch's
``FakeTensorMode``), the process group answers at once (``fake``), and torch's ``MemTracker`` adds up live storages.
"""

# Shapes: B pairs of this rank, F frames, H W pixels, C colours, L tokens, K samples, D embedding width.

from __future__ import annotations

import json
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tmass_dist.config import Config, load_config
from tmass_dist.training.objective import Objective, build_objective


@dataclass(frozen=True)
class StepCost:
    """Cost of one step on one rank; bytes, unless a name says otherwise. ZeRO's shards are not part of it."""

    num_parameters: int
    num_trainable: int
    image_size: int
    weights: int
    peak: int
    """Largest sum of live tensors, gradients included and optimiser excluded."""
    peak_without_gradients: int
    """The same without the gradients of the weights, which ZeRO 2 and 3 shard."""
    head_peak: int
    """Of the head and the loss alone, forward and backward, beside the embeddings."""
    flops: int
    """Forward and backward."""
    exchanged: dict[str, int]
    """Numbers by kind of collective, of the loss: those of the gathered, summed or scattered tensor."""


class PeakTracker(MemTracker):
    """torch's tracker without its statistics of each module, which take most of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak: dict[str, int] = {}
        self.peak_without_gradients = 0

    def track_gradients(self, model: nn.Module) -> None:
        """Tell the gradients of the model's weights from other tensors."""
        self._track_module_params_and_buffers(model, install_grad_hooks=True)

    def _ignore(self, *_: Any) -> None:
        pass

    _pre_fw_hook = _ignore  # pyright: ignore[reportAssignmentType]
    _post_fw_hook = _ignore  # pyright: ignore[reportAssignmentType]
    _pre_bw_hook = _ignore  # pyright: ignore[reportAssignmentType]
    _post_bw_hook = _ignore  # pyright: ignore[reportAssignmentType]

    def _update_peak_stats(self, peak_state: Any) -> None:
        for snapshot in self._curr_mem_snap.values():
            total = snapshot["Total"]
            without = total - next((size for kind, size in snapshot.items() if "GRAD" in str(kind)), 0)
            self.peak_without_gradients = max(self.peak_without_gradients, without)
            if total > self.peak.get("Total", -1):
                self.peak = {str(kind).rpartition(".")[2]: size for kind, size in deepcopy(snapshot).items()}


class ExchangeCounter(TorchDispatchMode):
    """Counts the numbers of every collective: those of the whole gathered, summed or scattered tensor.

    Works with real process groups too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").strip("_").removesuffix("_base")
            self.numbers[name] += max((sum(t.numel() for t in _tensors(argument)) for argument in args), default=0)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def simulate(config: Config, num_ranks: int, *, num_tokens: int | None = None) -> StepCost:
    """One step of rank 0 of ``num_ranks``; needs a process without a process group, and leaves one behind.

    Args:
        config: of the run; ``data.batch_size`` divides by ``num_ranks``.
        num_ranks: ranks of the run.
        num_tokens: of each caption; by default as many as the text tower takes.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    num_pairs = config.data.batch_size // num_ranks
    # Masks are made in parts on a CPU, and at once on a GPU.
    whole_mask = mock.patch("tmass_dist.models.pooling.keyed_mask", lambda keys, like, *_, **__: torch.empty_like(like))
    with FakeTensorMode(), whole_mask:
        model = _build(config)
        inputs = step_inputs_of(model, config, num_pairs, num_tokens)
        tracker, exchanges = PeakTracker(), ExchangeCounter()
        tracker.track_gradients(model)
        with exchanges, tracker:
            flops = _step(model, config, *inputs)
        head = PeakTracker()
        embeddings = [torch.empty(num_pairs, *shape) for shape in _embedding_shapes(model, config)]
        with head:
            leaves = [tensor.requires_grad_() for tensor in embeddings]
            model.losses(*leaves, *inputs[2:]).total.backward()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return StepCost(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        image_size=model.towers.image_size,
        weights=weights,
        peak=tracker.peak["Total"],
        peak_without_gradients=tracker.peak_without_gradients,
        head_peak=head.peak_without_gradients,
        flops=flops,
        exchanged=dict(exchanges.numbers),
    )


def _build(config: Config) -> Objective:
    """The model without its weights; ``Module.to`` is not possible for tensors without contents."""
    untrained = replace(config, model=replace(config.model, pretrained=None))
    with mock.patch.object(nn.Module, "_apply", lambda module, *_, **__: module):
        model = build_objective(untrained)
    if config.engine.checkpoint_activations:
        model.towers.clip.set_grad_checkpointing(True)
    return model.train()


def step_inputs_of(model: Objective, config: Config, num_pairs: int, num_tokens: int | None) -> tuple[Any, ...]:
    """Pixels, tokens, noise and dropout keys, of the shapes that ``step_inputs`` makes."""
    side, frames, width = model.towers.image_size, config.model.num_frames, model.towers.embed_dim
    length = num_tokens or int(getattr(model.towers.clip, "context_length", 77))
    pixel_type = torch.float32 if config.data.augment else torch.uint8
    pixels_BFHWC = torch.zeros(num_pairs, frames, side, side, 3, dtype=pixel_type)
    noise_BKD = None
    if model.head.mass is not None and config.stochastic.training == "sampled":
        noise_BKD = torch.zeros(num_pairs, config.stochastic.samples, width)
    keys_B = torch.zeros(num_pairs, dtype=torch.int64)
    return pixels_BFHWC, torch.zeros(num_pairs, length, dtype=torch.int64), noise_BKD, keys_B


def _embedding_shapes(model: Objective, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (model.towers.embed_dim,), (config.model.num_frames, model.towers.embed_dim)


def _step(
    model: Objective, config: Config, pixels_BFHWC: Tensor, tokens_BL: Tensor, noise_BKD: Tensor | None, keys_B: Tensor
) -> int:
    """Forward and backward in the order of ``Engine.backward``, its twin with DeepSpeed around the model.

    All micro-batches cost the same, so that two of them are simulated.

    Returns:
        FLOPs of all micro-batches.
    """
    num_pairs = len(pixels_BFHWC)
    micro = config.engine.micro_batch or num_pairs
    if micro >= num_pairs:
        with FlopCounterMode(display=False) as whole:
            model("whole", pixels_BFHWC, tokens_BL, noise_BKD, keys_B).total.backward()
        return whole.get_total_flops()
    num_micro = -(-num_pairs // micro)
    micros = list(zip(pixels_BFHWC.split(micro), tokens_BL.split(micro)))[:2]
    with FlopCounterMode(display=False) as first, torch.no_grad():
        encoded = [model("encode", *part) for part in micros[:1]] * num_micro
    text_BD, frames_BFD = (torch.cat(part)[:num_pairs].requires_grad_() for part in zip(*encoded))
    with FlopCounterMode(display=False) as head:
        losses = model("losses", text_BD, frames_BFD, noise_BKD, keys_B)
        losses.total.backward()
    assert text_BD.grad is not None and frames_BFD.grad is not None
    gradients = zip(text_BD.grad.split(micro), frames_BFD.grad.split(micro))
    with FlopCounterMode(display=False) as second:
        for part, (text_grad_bD, frames_grad_bFD) in zip(micros, gradients):
            text_bD, frames_bFD = model("encode", *part)
            ((text_bD * text_grad_bD).sum() + (frames_bFD * frames_grad_bFD).sum()).backward()
    simulated = sum(len(part[0]) for part in micros)
    per_pair = first.get_total_flops() / micro + second.get_total_flops() / simulated
    return head.get_total_flops() + round(per_pair * num_pairs)


if __name__ == "__main__":
    page, ranks, *tokens = sys.argv[1:]
    cost = simulate(load_config(page), int(ranks), num_tokens=int(tokens[0]) if tokens else None)
    print(json.dumps(asdict(cost)))
