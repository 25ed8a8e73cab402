"""An accelerator simulated on the CPU: real numbers, strict placement, and a record of every host wait.

torch calls the device ``accel``. A tensor there holds its numbers in CPU memory. Every operator computes them for real,
so that a training step has the same result as on the CPU, while torch sees a device of its own:

- an operator that meets tensors of both devices raises, as it does with CUDA;
- each operator at which the host would wait for a GPU is recorded with the function of tmass_dist that called it:
  ``item``, ``tolist`` and ``bool``, copies between the devices, results whose shape depends on numbers.

It is stricter than CUDA in one point: a CPU tensor may not index one of the accelerator, which CUDA allows at the price
of a hidden copy.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

NAME = "accel"
PACKAGE = Path(__file__).resolve().parents[1] / "tmass_dist"
aten = torch.ops.aten


class Wait(NamedTuple):
    """A point at which the host waits for the accelerator."""

    kind: str
    """``item`` (``bool`` and ``tolist`` too), ``to host``, ``to accel``, ``shape``, ``event`` or ``synchronize``."""
    function: str
    """Innermost function of tmass_dist on the stack, ``models/pooling.py:seen``; ``backward`` where there is none."""


_waits: Counter[Wait] = Counter()
exchanges: Counter[str] = Counter()
"""Collectives of tensors of the accelerator so far, by the name of torch's operator."""


class OnAccel(Tensor):
    """A tensor on the accelerator; ``host`` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnAccel:
        found = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(NAME, 0),
        )
        found.host = host
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnAccel({self.host!r})"

    @property
    def data(self) -> OnAccel:
        return OnAccel(self.host)

    @data.setter
    def data(self, other: OnAccel) -> None:
        Tensor.data.__set__(self, other)  # pyright: ignore[reportAttributeAccessIssue]
        self.host = other.host

    def tolist(self) -> Any:
        _wait("item")
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {NAME} tensor to numpy; use Tensor.cpu() first")


class _Mode(TorchDispatchMode):
    """Sees the operators that make tensors from none and those that move them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _caller() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


def _wait(kind: str) -> None:
    _waits[Wait(kind, _caller())] += 1


def _is_accel(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _check_devices(func: Any, arguments: list[Any]) -> None:
    """Raise where tensors of both devices meet; a number (0-dim CPU tensor) may join a pointwise operator."""
    hosts = [x for x in arguments if isinstance(x, Tensor) and not isinstance(x, OnAccel)]
    numbers_only = torch.Tag.pointwise in func.tags and all(x.dim() == 0 for x in hosts)
    if hosts and not numbers_only:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu! ({func} in {_caller()})"
        )


def _record_waits(func: Any, arguments: list[Any], to_accel: bool, from_accel: bool, non_blocking: bool) -> None:
    if func.overloadpacket in (aten._to_copy, aten.copy_) and to_accel != from_accel:
        # To the device a copy may be left to itself; the host needs the numbers of one that comes back.
        if not (to_accel and non_blocking):
            _wait("to accel" if to_accel else "to host")
    elif torch.Tag.data_dependent_output in func.tags:
        _wait("item")
    elif torch.Tag.dynamic_output_shape in func.tags or func.overloadpacket in (aten.index_put, aten.index_put_):
        indexing = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        masks = [x for x in arguments if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
        if masks or not indexing:
            _wait("shape")


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the numbers that its arguments hold; results go where the operator puts them."""
    flat, spec = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, OnAccel)]
    target = kwargs.get("device")
    if not ours and not _is_accel(target):
        return func(*args, **kwargs)
    packet = func.overloadpacket
    to_accel = bool(ours) if target is None else _is_accel(target)
    from_accel, non_blocking = bool(ours), bool(kwargs.get("non_blocking"))
    if packet is aten.copy_:
        to_accel, from_accel = (isinstance(x, OnAccel) for x in args[:2])
        non_blocking = bool(args[2]) if len(args) > 2 else non_blocking
    elif ours:
        _check_devices(func, flat)
    _record_waits(func, flat, to_accel, from_accel, non_blocking)
    if func.namespace == "c10d":
        exchanges[packet.__name__] += 1
    host_args, host_kwargs = tree_unflatten([x.host if isinstance(x, OnAccel) else x for x in flat], spec)
    if _is_accel(target):
        host_kwargs["device"] = torch.device("cpu")
    for name in ("non_blocking", "pin_memory"):
        host_kwargs.pop(name, None)
    found = func(*host_args, **host_kwargs)
    if torch.Tag.inplace_view in func.tags:  # ``squeeze_``: the shape that torch sees changes as well
        with no_dispatch():
            func(*args, **kwargs)
    known = {id(x.host): x for x in ours} | {id(x): x for x in flat if isinstance(x, Tensor)}

    def place(host: Tensor) -> Tensor:
        return known[id(host)] if id(host) in known else OnAccel(host) if to_accel else host

    return tree_map_only(Tensor, place, found)


class _Module:
    """``torch.accel``, as far as torch asks it."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_LOW_PRECISION = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "scaled_dot_product_attention")
_libraries: list[Any] = []


def register() -> None:
    """Tell torch of the device; before the first backward pass of the process, which fixes the devices it knows."""
    if _libraries:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((library, others))  # they must stay alive

    def empty(size: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
        return OnAccel(torch.empty(size, dtype=dtype, device="cpu"))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
        return OnAccel(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source: Tensor, out: OnAccel, non_blocking: bool = False) -> Tensor:
        _wait("to accel")  # torch.tensor(numbers, device=...) comes here
        out.host.copy_(source)
        return out

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lowered(operator: Any) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                kind = torch.get_autocast_dtype(NAME)
                return operator(
                    *(x.to(kind) if isinstance(x, OnAccel) and x.is_floating_point() else x for x in args), **kwargs
                )

        return kernel

    for name in _LOW_PRECISION:
        library.impl(name, lowered(getattr(aten, name)), "AutocastPrivateUse1")


@contextmanager
def _inference_mode_as_no_grad() -> Iterator[None]:
    """Inference mode hands whole composite operators to subclasses and refuses their views; only its speed is lost."""
    kind = torch.inference_mode
    before = kind.__enter__, kind.__exit__

    def enter(self: Any) -> None:
        self.no_grad = torch.no_grad()
        self.no_grad.__enter__()

    def leave(self: Any, *error: Any) -> None:
        self.no_grad.__exit__(*error)

    kind.__enter__, kind.__exit__ = enter, leave
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = before


@contextmanager
def accelerator() -> Iterator[tuple[torch.device, Counter[Wait]]]:
    """The device, which exists within the block alone, and its host waits so far."""
    register()
    _waits.clear()
    with _inference_mode_as_no_grad(), _Mode():
        yield torch.device(NAME, 0), _waits


class Event:
    """``torch.cuda.Event`` of the simulated accelerator: waiting for it is recorded."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        _wait("event")


def use_in_deepspeed() -> None:
    """Have DeepSpeed run on the simulated accelerator, with gloo between ranks; call it before ``Engine``.

    It changes this process for good: for processes of a test alone.
    """
    from tmass_dist.training import engine

    engine._deepspeed()
    engine.own_device = lambda: torch.device(NAME, 0)
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):
        def device_name(self, device_index: int | None = None) -> str:
            return NAME if device_index is None else f"{NAME}:{device_index}"

        def device(self, device_index: int | None = None) -> torch.device:
            return torch.device(NAME, 0)

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return f"{NAME}:0"

        def on_accelerator(self, tensor: Tensor) -> bool:
            return isinstance(tensor, OnAccel)

        def synchronize(self, device_index: int | None = None) -> None:
            _wait("synchronize")

    set_accelerator(Accelerator())
