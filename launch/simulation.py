"""One training step of one rank, simulated: its memory, exchanges and FLOPs, without memory, GPUs or other ranks.

``python -m launch.simulation CONFIG RANKS`` prints them as JSON. Tensors have shapes and no contents (torch's
``FakeTensorMode``), the process group answers at once (``fake``), and :class:`StepMeter` counts what each operation
does.
"""

# Shapes: B pairs of this rank, F frames, H W pixels, C colours, L tokens, K samples, D embedding width.

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from launch.forecast import PERSISTENT_NUMBERS, StepCost
from tmass_dist.config import Config, load_config
from tmass_dist.models.pair_products import TILE_NUMBERS
from tmass_dist.training.groups import parameter_groups
from tmass_dist.training.objective import Objective, build_objective


class StepMeter(TorchDispatchMode):
    """Counts live bytes, floating-point operations and exchanged numbers of all operations that run inside it.

    Works with real tensors and process groups too. torch's ``MemTracker`` and ``FlopCounterMode`` are not used: they
    put hooks on each module, which keep the activations alive that activation checkpointing computes again (the demo's
    peak was 1.5 times the measured one), and the simulation takes several times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        """Bytes of the tensors that exist, and the most so far; a storage counts once."""
        self.peak_without_gradients = 0
        """The same without the gradients of the weights that :meth:`track_gradients` was told of."""
        self.flops = 0
        self.exchanged: Counter[str] = Counter()
        """Numbers by kind of collective: those of the whole gathered, summed or scattered tensor."""
        self.section_peak = self._section_start = 0
        self._gradients = 0
        self._sizes: dict[int, int] = {}
        self._gradient_addresses: set[int] = set()

    def track_gradients(self, model: nn.Module) -> None:
        """Tell the gradients of the model's weights from other tensors, and count its weights and buffers."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._add(tensor)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def restart(self) -> None:
        """Forget the peaks so far."""
        self.peak, self.peak_without_gradients = self.live, self.live - self._gradients

    def begin_section(self) -> None:
        """From here on, ``section_peak`` is the most bytes above those of now, gradients of weights left out."""
        self._section_start, self.section_peak = self.live - self._gradients, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").strip("_").removesuffix("_base")
            self.exchanged[name] += max((sum(t.numel() for t in _tensors(argument)) for argument in args), default=0)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for tensor in _tensors(result):
            self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = size = storage.nbytes()
        self.live += size
        without = self.live - self._gradients
        self.peak = max(self.peak, self.live)
        self.peak_without_gradients = max(self.peak_without_gradients, without)
        self.section_peak = max(self.section_peak, without - self._section_start)
        weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        size = self._sizes.pop(address)
        self.live -= size
        if address in self._gradient_addresses:
            self._gradient_addresses.remove(address)
            self._gradients -= size

    def _add_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        address = parameter.grad.untyped_storage()._cdata
        if address in self._sizes and address not in self._gradient_addresses:
            self._gradient_addresses.add(address)
            self._gradients += self._sizes[address]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def step_cost(config: Config, num_ranks: int, *, num_tokens: int | None = None) -> StepCost:
    """One step of rank 0 of ``num_ranks``; needs a process without a process group, and leaves one behind.

    Args:
        config: of the run; ``data.batch_size`` divides by ``num_ranks``.
        num_ranks: ranks of the run.
        num_tokens: of each caption; by default as many as the text tower takes.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    num_pairs = config.data.batch_size // num_ranks
    # In bfloat16 torch chooses another kernel of attention when activations are computed again than at first, and
    # refuses the result. The plain one takes more memory than a GPU's, so the plan is on the safe side.
    plain_attention = bool(config.engine.bf16) and config.engine.checkpoint_activations
    attention = sdpa_kernel(SDPBackend.MATH) if plain_attention else nullcontext()
    with FakeTensorMode(), as_on_a_gpu(), attention, StepMeter() as meter:
        model = _build(config)
        meter.track_gradients(model)
        inputs = step_inputs_of(model, config, num_pairs, num_tokens)
        meter.restart()
        flops, head_peak = _step(meter, model, config, *inputs)
    return StepCost(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_in_towers=sum(
            p.numel() for p in model.towers.parameters() if p.requires_grad and p is not model.towers.logit_scale
        ),
        num_groups=len(parameter_groups(model, config.optim)),
        persistent=sum(4 * p.numel() for p in model.parameters() if p.numel() <= PERSISTENT_NUMBERS),
        image_size=model.towers.image_size,
        weights=sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        peak=meter.peak,
        peak_without_gradients=meter.peak_without_gradients,
        head_peak=head_peak,
        flops=flops,
        exchanged=dict(meter.exchanged),
    )


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Sizes of the head's intermediate results as on a GPU: a CPU works on smaller tiles, and makes masks in parts."""
    masks = "tmass_dist.models.pair_products.keyed_mask"
    whole_mask = mock.patch(masks, lambda keys, like, *_, **__: torch.empty_like(like))
    with whole_mask, mock.patch.dict(TILE_NUMBERS, cpu=TILE_NUMBERS["cuda"]):
        yield


def _build(config: Config) -> Objective:
    """The model without its weights; ``Module.to`` is not possible for tensors without contents."""
    untrained = replace(config, model=replace(config.model, pretrained=None))
    with mock.patch.object(nn.Module, "_apply", lambda module, *_, **__: module):
        model = build_objective(untrained)
    model.frozen_frames = None  # tensors without contents cannot be compared
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
    if model.head.draws_samples and config.stochastic.training == "sampled":
        noise_BKD = torch.zeros(num_pairs, config.stochastic.samples, width)
    keys_B = torch.zeros(num_pairs, dtype=torch.int64)
    return pixels_BFHWC, torch.zeros(num_pairs, length, dtype=torch.int64), noise_BKD, keys_B


def _step(
    meter: StepMeter,
    model: Objective,
    config: Config,
    pixels_BFHWC: Tensor,
    tokens_BL: Tensor,
    noise_BKD: Tensor | None,
    keys_B: Tensor,
) -> tuple[int, int]:
    """Forward and backward in the order of ``Engine.backward``, its twin with DeepSpeed around the model.

    All micro-batches cost the same, so that two of them are simulated.

    Returns:
        FLOPs of all micro-batches; peak bytes of the head and the loss.
    """
    num_pairs = len(pixels_BFHWC)
    micro = config.engine.micro_batch or num_pairs
    if micro >= num_pairs:
        head_peaks: list[int] = []
        text_BD, frames_BFD = model("encode", pixels_BFHWC, tokens_BL)
        # The first gradient of an embedding ends the backward pass of the head.
        end: Callable[[Tensor], None] = lambda _: head_peaks.append(meter.section_peak)  # noqa: E731
        torch.autograd.graph.register_multi_grad_hook([text_BD, frames_BFD], end, mode="any")
        meter.begin_section()
        model("losses", text_BD, frames_BFD, noise_BKD, keys_B).total.backward()
        return meter.flops, head_peaks[0]
    num_micro = -(-num_pairs // micro)
    micros = list(zip(pixels_BFHWC.split(micro), tokens_BL.split(micro)))[:2]
    with torch.no_grad():
        encoded = [model("encode", *part) for part in micros[:1]] * num_micro
    first = meter.flops
    text_BD, frames_BFD = (torch.cat(part)[:num_pairs].requires_grad_() for part in zip(*encoded))
    meter.begin_section()
    model("losses", text_BD, frames_BFD, noise_BKD, keys_B).total.backward()
    head_peak, head = meter.section_peak, meter.flops - first
    assert text_BD.grad is not None and frames_BFD.grad is not None
    gradients = zip(text_BD.grad.split(micro), frames_BFD.grad.split(micro))
    for part, (text_grad_bD, frames_grad_bFD) in zip(micros, gradients):
        text_bD, frames_bFD = model("encode", *part)
        ((text_bD * text_grad_bD).sum() + (frames_bFD * frames_grad_bFD).sum()).backward()
    simulated = sum(len(part[0]) for part in micros)
    per_pair = first / micro + (meter.flops - first - head) / simulated
    return head + round(per_pair * num_pairs), head_peak


if __name__ == "__main__":
    page, ranks, *tokens = sys.argv[1:]
    cost = step_cost(load_config(page), int(ranks), num_tokens=int(tokens[0]) if tokens else None)
    print(json.dumps(vars(cost)))
