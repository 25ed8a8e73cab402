"""What a job asks for: nodes, GPUs, CPUs, memory, time. The names are SLURM's."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tmass_dist.errors import UserError

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_MEMORY = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_MEBIBYTES = {"K": 2.0**-10, "": 1.0, "M": 1.0, "G": 2.0**10, "T": 2.0**20}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of one job."""

    cluster: Literal["slurm", "local"] = "slurm"
    nodes: int = 1
    min_nodes: int | None = None
    """Start with as few nodes as this where not all are free."""
    gpus: int = 0
    """GPUs of a node; each has a task of its own. 0 runs ``procs`` tasks on CPUs."""
    procs: int = 2
    """Tasks of a node without GPUs."""
    cpus: int = 1
    """CPUs of a task."""
    minutes: int = 24 * 60
    """Time limit."""
    requeues: int = 3
    """How often the job may start again after a time limit, a preemption, a lost node or a failure."""
    requeue_pause_s: int = 30
    """Pause before the first start after a failure; it grows fourfold with every start, up to 15 minutes."""
    save_before_s: int = 90
    """Seconds before the time limit at which the job is told to save."""
    task_mem: str | None = None
    """Memory of a task of an array; by default the part of ``--mem`` that one task of a node has."""
    flags: dict[str, str] = field(default_factory=dict)
    """Options that are passed on to sbatch: partition, account, qos, constraint, exclude, mem, dependency."""

    @property
    def tasks(self) -> int:
        """Tasks of a node."""
        return self.gpus or self.procs

    @property
    def ranks(self) -> int:
        """Tasks of all nodes."""
        return self.nodes * self.tasks

    def one_task(self, *, gpu: bool = False) -> Resources:
        """Resources of a task that works alone: a task of an array, or a report.

        Args:
            gpu: give it a GPU if the run has GPUs.
        """
        flags = dict(self.flags)
        if self.task_mem:
            flags["mem"] = self.task_mem
        elif "mem" in flags:
            flags["mem"] = f"{max(1, mebibytes_of(flags['mem']) // self.tasks)}M"
            if mebibytes_of(self.flags["mem"]) == 0:  # SLURM's 0 is the whole memory of a node
                del flags["mem"]
        return replace(self, nodes=1, min_nodes=None, gpus=min(self.gpus, 1) if gpu else 0, procs=1, flags=flags)


def minutes_of(text: str) -> int:
    """Minutes of a SLURM time: ``90``, ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` or ``D-HH:MM:SS``.

    Raises:
        UserError: another form, or less than a minute.
    """
    if not _TIME.fullmatch(text):
        raise UserError(f"--time {text} is not a time; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    total = int(days or 0) * 24 * 60 + hours * 60 + minutes + (seconds > 0)
    if total < 1:
        raise UserError(f"--time {text} is less than a minute")
    return total


def mebibytes_of(text: str) -> int:
    """Mebibytes of a SLURM memory size: ``4000``, ``500M``, ``64G``.

    Raises:
        UserError: another form.
    """
    size = _MEMORY.fullmatch(text)
    if not size:
        raise UserError(f"--mem {text} is not a size; write it as 64G or 4000M")
    return int(int(size[1]) * _MEBIBYTES[size[2].upper()])


def local_gpus() -> list[str]:
    """GPUs of this machine that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; does not import torch."""
    present = [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    return [name.strip() for name in visible.split(",") if name.strip()]
