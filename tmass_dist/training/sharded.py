"""ZeRO-3 without a whole model on each rank: parameters without memory, sharded one after the other.

Rank 0 builds the model with its weights. The others build it with parameters on torch's ``meta`` device, which have a
shape and no memory. :func:`shard` then gives memory to one parameter at a time, fills it from rank 0, and keeps a part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules that are built in this context have parameters on ``meta``. Their buffers keep memory and values.

    ``Module.to`` does nothing meanwhile: it cannot move parameters without values, and open_clip calls it.
    """
    register, apply = nn.Module.register_parameter, nn.Module._apply

    def register_without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), param.requires_grad)

    def leave(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        return self

    nn.Module.register_parameter, nn.Module._apply = register_without_memory, leave
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module._apply = register, apply


def shape_of(model: M) -> M:
    """A copy of ``model`` on ``meta``; the copy of its parameters never exists."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): _on_meta(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach().to("meta")
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give memory to the parameters and buffers on ``meta``; their values are undefined."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in known:
                    known[id(tensor)] = _empty_like(tensor, device)
                tensors[name] = known[id(tensor)]


def _empty_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    value = torch.empty_like(tensor, device=device, requires_grad=False)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def shard(model: nn.Module, device: torch.device, deepspeed: Any, options: dict[str, Any]) -> None:
    """Shard the parameters of ``model`` over all ranks, with rank 0's values; every rank calls it.

    Args:
        model: with weights on rank 0; elsewhere its parameters may lie on ``meta``.
        device: of this rank.
        deepspeed: the package.
        options: of DeepSpeed's engine.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    deepspeed.zero.Init(module=_OneByOne(model, device), config_dict_or_path=options)


class _OneByOne(nn.Module):
    """A model whose parameters get memory when DeepSpeed comes to them; it frees each before it takes the next."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._model, self._device = [model], device  # in a list: it is not a part of this module

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self._model[0].parameters(recurse):
            if parameter.is_meta:  # the object stays the same: the optimiser's groups hold it
                torch.utils.swap_tensors(parameter, _empty_like(parameter, self._device))
            yield parameter
