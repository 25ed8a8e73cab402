"""The part of weights, gradients and optimiser state that this rank holds, at every ZeRO stage.

Only this module touches attributes that DeepSpeed does not document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tmass_dist.distributed import broadcast_from, rank, world_size
from tmass_dist.errors import UserError
from tmass_dist.training.optim import GuardedOptimizer

_STAGES_1_AND_2 = (
    "averaged_gradients",
    "single_partition_of_fp32_groups",
    "update_lp_params",
    "overlap_comm",
    "reduction_stream",
    "_hp_optimizer_states_linked",
    "_lazy_init_hp_params_optimizer_state",
)
USED_ATTRIBUTES = {
    0: (),
    1: _STAGES_1_AND_2,
    2: _STAGES_1_AND_2,
    3: ("averaged_gradients", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "_get_norm_groups"),
}
"""By ZeRO stage, the attributes of DeepSpeed's optimiser that this module and the engine use."""
USED_PARAMETER_ATTRIBUTES = {0: (), 1: ("_hp_mapping",), 2: ("_hp_mapping",), 3: ("ds_numel", "ds_shape", "ds_tensor")}
"""By ZeRO stage, the attributes that DeepSpeed gives each parameter and that this module uses."""


class Piece(NamedTuple):
    """A contiguous part of one tensor of the state."""

    key: str
    """``weight``, ``exp_avg``, ``exp_avg_sq`` or ``ema``."""
    name: str
    """Name of the parameter."""
    start: int
    """Position of its first number in the flattened tensor."""
    values: Tensor
    """A view of the state, 1-D."""


class Read(Protocol):
    """Reads ``stop - start`` numbers of a flattened tensor of a checkpoint."""

    def __call__(self, key: str, name: str, start: int, stop: int) -> Tensor: ...


class Shards:
    """The state that this rank holds.

    Args:
        engine: DeepSpeed's engine.
        named: the trained parameters by name.
        optimizer: the optimiser that DeepSpeed calls.
        stage: of ZeRO, 0 to 3.

    Raises:
        UserError: the installed DeepSpeed lacks an attribute that is needed.
    """

    def __init__(self, engine: Any, named: dict[str, nn.Parameter], optimizer: GuardedOptimizer, stage: int) -> None:
        self.named, self.optimizer, self.stage = named, optimizer, stage
        self.zero = engine.optimizer
        _require(self.zero, USED_ATTRIBUTES[stage], stage)
        self.optimizer.prepare(self.flat())
        self.optimizer.counts_updates = False
        if stage in (1, 2):
            # The optimiser's state was just created; without this DeepSpeed links it only after the first step.
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        if stage == 3:
            # We clip. DeepSpeed would compute the norm a second time, and wait for it on the CPU.
            self.zero._get_norm_groups = lambda: [torch.ones(())]
            _skip_comparison_of_orders()
        for parameter in named.values():
            _require(parameter, USED_PARAMETER_ATTRIBUTES[stage], stage)

    def flat(self) -> list[Tensor]:
        """The tensors that the optimiser updates on this rank."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups if self.stage else list(self.named.values())

    def gradients(self, group_names: list[str]) -> dict[str, list[Tensor]]:
        """The gradients on this rank by parameter group, between the backward pass and the step.

        At stage 0 every rank has all of them, summed over the ranks; at other stages a part.
        """
        gradients: dict[str, list[Tensor]] = {name: [] for name in group_names}
        if self.stage == 0:
            for name, group in zip(group_names, self.optimizer.param_groups):
                gradients[name] = [p.grad for p in group["params"] if p.grad is not None]
            return gradients
        for number, parts in self.zero.averaged_gradients.items():
            group = self.zero.sub_group_to_group_id[number] if self.stage == 3 else number
            gradients[group_names[group]] += list(parts or [])
        return gradients

    def pieces(self, keys: tuple[str, ...]) -> Iterator[Piece]:
        """The pieces of the state that this rank saves and loads; those of all ranks together are the whole state."""
        for key in keys:
            for number, (name, parameter) in enumerate(self.named.items()):
                piece = self._piece(key, name, parameter, number)
                if piece is not None and piece.values.numel():
                    yield piece

    def _piece(self, key: str, name: str, parameter: Any, number: int) -> Piece | None:
        if self.stage == 0:  # every rank holds everything; they take the tensors in turn
            return Piece(key, name, 0, self._whole(key, parameter)) if number % world_size() == rank() else None
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            local: Any = safe_get_local_fp32_param if key == "weight" else safe_get_local_optimizer_state
            values = (local(parameter) if key == "weight" else local(parameter, key)).flatten()
            start = rank() * values.numel()  # shards are padded to one length
            return Piece(key, name, start, values[: max(0, parameter.ds_numel - start)])
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        values = mapping.get_hp_fragment(None if key == "weight" else key)
        return Piece(key, name, mapping.lp_fragment_address.start, values)

    def _whole(self, key: str, parameter: nn.Parameter) -> Tensor:
        return (parameter.data if key == "weight" else self.optimizer.state[parameter][key]).view(-1)

    @torch.no_grad()
    def load(self, keys: tuple[str, ...], read: Read) -> None:
        """Load the state; each rank reads its own pieces. Every rank calls it."""
        for piece in self.pieces(keys):
            piece.values.copy_(read(piece.key, piece.name, piece.start, piece.start + piece.values.numel()))
        if self.stage == 0:
            for key in keys:
                for number, parameter in enumerate(self.named.values()):
                    broadcast_from(number % world_size(), self._whole(key, parameter))
        elif self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            for parameter in self.named.values():
                parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))  # pyright: ignore
        else:
            self.restore_weights()

    def restore_weights(self) -> None:
        """Set the weights of stages 1 and 2 to those of the shards; every rank calls it."""
        self.zero.update_lp_params()

    @contextmanager
    def whole(self, parameter: nn.Parameter) -> Iterator[None]:
        """Gather a parameter that stage 3 has sharded; every rank calls it."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole parameter."""
        parameter = self.named[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    @contextmanager
    def waiting_on_the_device(self) -> Iterator[None]:
        """Around a backward pass: overlapped reductions are waited for by the GPU's stream and not by the CPU.

        At the end of a backward pass with ``overlap_comm`` DeepSpeed 0.19 blocks the CPU until the GPU is idle, so that
        it may read what the reduction stream wrote. Ordering the streams is enough for that.
        """
        if not (torch.cuda.is_available() and self.stage in (1, 2) and self.zero.overlap_comm):
            yield
            return
        stream = self.zero.reduction_stream
        from deepspeed.accelerator import get_accelerator

        accelerator: Any = get_accelerator()
        accelerator.synchronize = lambda *_: torch.cuda.current_stream().wait_stream(stream)
        try:
            yield
        finally:
            del accelerator.synchronize  # the method of the class is visible again


def _skip_comparison_of_orders() -> None:
    """Have ZeRO-3 no longer compare the order of modules between ranks, which waits for the GPU.

    It does so whenever it records that order: in the first two steps, and with micro-batches in every step. All ranks
    run the same program, and a rank that waits for another is ended by the watchdog.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator

    _require(partitioned_param_coordinator, ("assert_ints_same_as_other_ranks",), 3)
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None


def _require(owner: Any, names: tuple[str, ...], stage: int) -> None:
    """Raise a UserError that names the version of DeepSpeed and the attributes that ``owner`` lacks."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        import deepspeed

        raise UserError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)} at ZeRO stage {stage}; "
            "install a version that pyproject.toml allows"
        )
