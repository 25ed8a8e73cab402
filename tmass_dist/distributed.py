"""The only module that calls torch.distributed: ranks and collectives. A single process takes the same code path."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tmass_dist.errors import MachineError, NoGpuError, UserError
from tmass_dist.network import addresses_towards, interface_of, is_loopback
from tmass_dist.phase_timer import PHASE_TIMER

# DeepSpeed and this module call these functions; torch 2.13 has new names for them, which older versions lack.
warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_environment() -> bool:
    """Whether this process is one of several ranks: torchrun's variables are all set or all unset.

    Raises:
        UserError: some are set and others missing; it names both.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if set(_VARIABLES) - set(missing) - {"LOCAL_RANK"} and missing:  # LOCAL_RANK alone decides nothing
        present = [name for name in _VARIABLES if name in os.environ]
        raise UserError(
            f"the distributed environment is partly set: {', '.join(present)} set but {', '.join(missing)} missing; "
            "set all of them (torchrun does) or none"
        )
    if missing:
        return False
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={world} do not fit: 0 <= RANK < WORLD_SIZE")
    return True


def environment_rank() -> tuple[int, int]:
    """Rank and number of ranks: of the process group if it exists, else of the environment; (0, 1) for one process."""
    if dist.is_initialized():
        return rank(), world_size()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if check_environment() else (0, 1)


def is_first_of_node() -> bool:
    """Whether this is the rank of its node that looks at files for the others."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def own_device() -> torch.device:
    """This rank's GPU, or the CPU if there is none. Turns TF32 off: :mod:`tmass_dist.precision` turns it on.

    Raises:
        NoGpuError: the job was given GPUs (``TMASS_GPUS_PER_NODE``) and this rank sees none of its own.
    """
    # Container images and older torch versions have other defaults.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    present, promised = torch.cuda.device_count(), int(os.environ.get("TMASS_GPUS_PER_NODE", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if promised and (present == 0 or 1 < present <= local_rank):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise NoGpuError(
            f"node {socket.gethostname()}: the job has {promised} GPUs a node, and this rank (local rank {local_rank}) "
            f"sees {present} (CUDA_VISIBLE_DEVICES {visible or 'empty'}; torch {torch.__version__})"
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def initialise(timeout_s: float = 600.0) -> torch.device:
    """Join the process group that the environment describes, if any, and return this rank's device."""
    several, device = check_environment(), own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # NCCL's own limit ends a process with a long trace, so it comes after that of the watchdog.
        limit = datetime.timedelta(seconds=timeout_s + (60 if backend == "nccl" else 0))
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        _choose_interface(store, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        _host_group()
    return device


def _choose_interface(store: Any, rank: int, world_size: int) -> None:
    """Have gloo use the interface that reaches ``MASTER_ADDR``, unless ``GLOO_SOCKET_IFNAME`` is set.

    By default gloo uses the address that the host's name resolves to, which is 127.0.1.1 on many hosts.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        own, master = addresses_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except OSError:
        return  # gloo then decides, and reports what it could not resolve
    store.set(f"address/{rank}", master)
    if is_loopback(own):
        # This is the master's host. The others know by which of its addresses they reach it.
        masters = (store.get(f"address/{other}").decode() for other in range(world_size))
        own = next((address for address in masters if not is_loopback(address)), own)
    interface = interface_of(own)
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def join_alone() -> None:
    """Make a process group of one, for libraries that require one; it opens no port and sets no variable."""
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )


def open_store(timeout_s: float = 30.0) -> Any:
    """A key-value store on rank 0, apart from the process group's; every rank calls it."""
    host, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), datetime.timedelta(seconds=timeout_s)
    server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if is_main() else None
    port = all_gather_objects(server.port if server else 0)[0]
    return server or dist.TCPStore(host, port, is_master=False, timeout=timeout)


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


_num_entered = 0


@contextmanager
def _collective() -> Iterator[None]:
    global _num_entered
    _num_entered += 1
    with PHASE_TIMER.during("communication"):
        yield


def collectives_entered() -> int:
    """Number of collectives entered by this rank; the rank with the lowest number is the one the others wait for."""
    return _num_entered


def node_ranks() -> list[int]:
    """The ranks that run on this machine; a collective."""
    hosts = all_gather_objects(socket.gethostname())
    return [number for number, host in enumerate(hosts) if host == hosts[rank()]]


def barrier() -> None:
    """Wait for all ranks. It runs between the CPUs: no GPU waits, and NCCL sees no long pause."""
    if world_size() > 1:
        with _collective():
            dist.barrier(group=_host_group())


def is_main() -> bool:
    """Whether this is rank 0; use it only to decide who writes a file or a log."""
    return rank() == 0


class _GatherRows(torch.autograd.Function):
    """All-gather in the forward pass; the backward pass sums every rank's gradient of the own rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        gathered = local.new_empty(world_size() * len(local), *local.shape[1:])
        with _collective():
            dist.all_gather_into_tensor(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        summed = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        with _collective():
            dist.reduce_scatter_tensor(summed, gradient)
        return summed


def all_gather_rows(local: Tensor) -> Tensor:
    """Stack every rank's rows in rank order, with gradients flowing back to the rank they came from.

    The backward pass sums over ranks. When each rank then computes the same global loss, the mean that DDP
    or ZeRO takes over ranks is exactly the gradient of that loss.

    Args:
        local: ``(rows, ...)``, the same shape on every rank.

    Returns:
        ``(world_size * rows, ...)``; ``local`` itself when there is a single process.
    """
    return local if world_size() == 1 else _GatherRows.apply(local)  # pyright: ignore[reportReturnType]


def all_gather_objects(local: Any) -> list[Any]:
    """Every rank's object, in rank order. It uses pickle, so the objects must come from our own ranks."""
    if world_size() == 1:
        return [local]
    parts: list[Any] = [None] * world_size()
    with _collective():
        dist.all_gather_object(parts, local, group=_host_group())
    return parts


def all_reduce_sum(values: Tensor) -> None:
    """Sum ``values`` over the ranks, in place and without a gradient."""
    if world_size() > 1:
        with _collective():
            dist.all_reduce(values)


def all_reduce_elementwise_max(values: Tensor) -> None:
    """Replace each of ``values`` by its maximum over the ranks, in place and without a gradient."""
    if world_size() > 1:
        with _collective():
            dist.all_reduce(values, op=dist.ReduceOp.MAX)


class _AllReduceSum(torch.autograd.Function):
    """All-reduce in the forward pass; no exchange in the backward pass."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        summed = local.clone()
        all_reduce_sum(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * world_size()


def differentiable_sum(local: Tensor) -> Tensor:
    """The sum of every rank's tensor, with the gradient convention of :func:`all_gather_rows`.

    Every rank must compute the same loss from the result. Its gradient is then the same on every rank, and the sum over
    ranks that :func:`all_gather_rows` takes is a product with their number.
    """
    return local if world_size() == 1 else _AllReduceSum.apply(local)  # pyright: ignore[reportReturnType]


def broadcast_from(source: int, values: Tensor) -> None:
    """Copy rank ``source``'s ``values`` to all ranks, in place."""
    if world_size() > 1:
        with _collective():
            dist.broadcast(values, src=source)


_host_groups: list[Any] = []


def _host_group() -> Any:
    """The group of all ranks that communicates between CPUs; None stands for the default group."""
    if not _host_groups:
        _host_groups.append(None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"))
    return _host_groups[0]


def all_reduce_max(values: list[float]) -> list[float]:
    """The maximum of each number over the ranks, by which all agree to stop or that something failed.

    It runs between the CPUs, so that it waits for no GPU.
    """
    return start_all_reduce_max(values)()


def start_all_reduce_max(values: list[float]) -> Callable[[], list[float]]:
    """Start :func:`all_reduce_max`; call the result to wait for it. Every rank calls both in the same order."""
    if world_size() == 1:
        return lambda: values
    tensor = torch.tensor(values, dtype=torch.float64)
    with _collective():
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_host_group(), async_op=True)
    assert work is not None

    def wait() -> list[float]:
        with PHASE_TIMER.during("communication"):
            work.wait()
        return tensor.tolist()

    return wait


class StopRequest:
    """Whether this process was told to stop: by SIGTERM, SIGUSR2 (a time limit, a preemption) or SIGINT (Ctrl-C).

    A signal sets ``requested``; the ranks agree on it between steps, save and return. A second Ctrl-C ends the process
    at once. A thread receives the signals, because Python's own handlers wait while the main thread is in a collective.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False
        """Whether it was Ctrl-C."""
        self._exit_code: int | None = None
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        self._sender = sender  # kept open: the file descriptor is in use
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._receive, args=(receiver,), name="signals", daemon=True).start()

    def exit_at_once(self, code: int) -> None:
        """From now on a signal ends the process with this exit code: there is nothing left to save."""
        self._exit_code = code
        if self.requested:
            os._exit(code)

    def _receive(self, receiver: socket.socket) -> None:
        while numbers := receiver.recv(64):
            for number in numbers:
                self._handle(number)

    def _handle(self, number: int) -> None:
        if number not in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            return
        if self._exit_code is not None:
            os._exit(self._exit_code)
        if number == signal.SIGINT:
            if self.interrupted:
                print("\ninterrupted again: leaving without saving", file=sys.stderr, flush=True)
                os._exit(130)
            self.interrupted = True
            print("\ninterrupted: saving; press Ctrl-C again to leave without saving", file=sys.stderr, flush=True)
        self.requested = True


def share_failure(error: Exception | None) -> None:
    """Raise on every rank if any rank failed, so that no rank waits for one that is gone.

    Raises:
        UserError: the first failure is a user error.
        MachineError: it is any other error.
    """
    own = None if error is None else (isinstance(error, UserError), str(error))
    failures = [failure for failure in all_gather_objects(own) if failure]
    if failures:
        is_user_error, message = failures[0]
        raise (UserError if is_user_error else MachineError)(message) from error
