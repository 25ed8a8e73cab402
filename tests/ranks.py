"""Runs a function on several gloo ranks: real processes that meet through a file, so no port is ever taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.forked import START_METHOD


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(function(*arguments), f"{folder}/result-{rank}.pt")
    dist.destroy_process_group()


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, tmp_path: Path) -> list[Any]:
    """``function(*arguments)`` on every rank; what each returned, in rank order. Both must be importable by name."""
    whole = (num_ranks, str(tmp_path), function, arguments)
    mp.start_processes(_rank, whole, nprocs=num_ranks, start_method=START_METHOD)
    return [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(num_ranks)]
