"""The one door to torch.distributed: who we are, and every collective. One process is the same code path."""

from __future__ import annotations

import datetime
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tmass_dist.errors import UserError
from tmass_dist.phase_timer import PHASE_TIMER

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_environment() -> bool:
    """Is this process one of several? torchrun's variables are wholly set or wholly unset.

    Raises:
        UserError: some are set and others missing; it names both.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if set(_VARIABLES) - set(missing) - {"LOCAL_RANK"} and missing:  # that one alone says nothing
        present = [name for name in _VARIABLES if name in os.environ]
        raise UserError(
            f"the distributed environment is partly set: {', '.join(present)} given but {', '.join(missing)} missing; "
            "set all of them (torchrun does) or none"
        )
    if missing:
        return False
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={world} do not fit: 0 <= RANK < WORLD_SIZE")
    return True


def own_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def initialise(timeout_s: float = 600.0) -> torch.device:
    """Join the process group the environment describes (none when alone) and return this rank's device."""
    several, device = check_environment(), own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    return device


def join_alone() -> None:
    """A process group of one, for libraries that have no life without; it touches no port and no variable."""
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )


def open_store(timeout_s: float = 30.0) -> Any:
    """A store of its own, held by rank 0, for words between ranks outside the collectives; every rank calls it."""
    host, wait = os.environ.get("MASTER_ADDR", "127.0.0.1"), datetime.timedelta(seconds=timeout_s)
    held = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait) if is_main() else None
    port = gather_objects(held.port if held else 0)[0]
    return held or dist.TCPStore(host, port, is_master=False, timeout=wait)


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _host_groups.clear()


def is_initialised() -> bool:
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


_begun = 0


@contextmanager
def _collective() -> Iterator[None]:
    global _begun
    _begun += 1
    with PHASE_TIMER.during("communication"):
        yield


def collectives_entered() -> int:
    """Exchanges that this rank has entered. Every rank makes the same ones: who has entered fewer keeps the others."""
    return _begun


def barrier() -> None:
    if world_size() > 1:
        with _collective():
            dist.barrier()


def is_main() -> bool:
    """Ask only to write a file or a log."""
    return rank() == 0


class _GatherRows(torch.autograd.Function):
    """All-gather forward; backward sums every rank's gradient of our rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.num_rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(world_size())]
        with _collective():
            dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce-scatter: sum everything, keep our rows. The same numbers.
        total = gradients[0].contiguous().clone()
        with _collective():
            dist.all_reduce(total)
        return total.narrow(0, rank() * ctx.num_rows, ctx.num_rows)


def gather_rows(local: Tensor) -> Tensor:
    """Stack every rank's rows in rank order, with gradients flowing back to the rank they came from.

    The backward pass sums over ranks. When each rank then computes the same global loss, the mean that DDP
    or ZeRO takes over ranks is exactly the gradient of that loss.

    Args:
        local: ``(rows, ...)``, the same shape on every rank.

    Returns:
        ``(world_size * rows, ...)``; ``local`` itself when there is a single process.
    """
    return local if world_size() == 1 else _GatherRows.apply(local)  # pyright: ignore[reportReturnType]


def gather_objects(local: Any) -> list[Any]:
    """Every rank's object, in rank order. Only for what our own ranks wrote: it pickles."""
    if world_size() == 1:
        return [local]
    parts: list[Any] = [None] * world_size()
    with _collective():
        dist.all_gather_object(parts, local)
    return parts


def sum_over_ranks(values: Tensor) -> None:
    """Add up every rank's ``values``, in place; no gradient."""
    if world_size() > 1:
        with _collective():
            dist.all_reduce(values)


_host_groups: list[Any] = []


def max_over_ranks(values: list[float]) -> list[float]:
    """Each number's largest over the ranks; how all agree to stop, or that something failed.

    It runs between the hosts' processors, so that asking at every step waits for no other rank's GPU.
    """
    if world_size() == 1:
        return values
    if not _host_groups:
        _host_groups.append(None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"))
    tensor = torch.tensor(values, dtype=torch.float64)
    with _collective():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_host_groups[0])
    return tensor.tolist()


class StopRequest:
    """SIGTERM or SIGUSR2 (a time limit, a preemption) only sets a flag; the ranks agree on it between two steps."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True


def share_failure(error: Exception | None) -> None:
    """Raise on every rank when any rank failed, so that none waits for a peer that is gone."""
    messages = [message for message in gather_objects(None if error is None else str(error)) if message]
    if messages:
        raise UserError(messages[0]) from error
