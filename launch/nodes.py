"""What SLURM says about the nodes of a partition: GPUs, CPUs, memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass

from tmass_dist.errors import UserError

_GPU = re.compile(r"(?:^|,)gpu(?::([^:,()]*[^:,()\d][^:,()]*))?(?::(\d+))?(?=[,(]|$)")
"""``gpu:8``, ``gpu:a100:8(S:0-1)`` or ``gpu`` in a list of generic resources."""


@dataclass(frozen=True)
class Node:
    """One node, as ``sinfo`` shows it."""

    name: str
    cpus: int
    memory_mb: int
    gpus: int
    gpu_type: str
    """Type of its GPUs as the site names it, in lower case; empty where the site names none."""
    features: frozenset[str]


def nodes_of(partition: str | None, constraint: str | None = None) -> list[Node] | None:
    """The nodes that a job may get.

    Args:
        partition: one or several, separated by commas; None is the default partition.
        constraint: features joined by ``&`` or ``|``. Any other form of SLURM's is not evaluated here, and then all
            nodes of the partition are returned.

    Returns:
        None where this machine has no SLURM, or SLURM does not answer.

    Raises:
        UserError: no such partition, no default partition, or no node has the features.
    """
    if shutil.which("sinfo") is None:
        return None
    command = ["sinfo", "--noheader", "--all", "--Node", "--format=%N|%P|%c|%m|%G|%f"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return None
    return select_nodes(answer.stdout, partition, constraint)


def select_nodes(sinfo: str, partition: str | None, constraint: str | None) -> list[Node]:
    """Read ``sinfo``'s lines ``name|partition|cpus|memory|generic resources|features``, and choose.

    Raises:
        UserError: as :func:`nodes_of`.
    """
    rows = [line.strip().split("|") for line in sinfo.splitlines() if line.count("|") == 5]
    names = sorted({row[1].rstrip("*") for row in rows})
    wanted = partition.split(",") if partition else [row[1].rstrip("*") for row in rows if row[1].endswith("*")][:1]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UserError(f"SLURM has no partition {', '.join(unknown)}; it has {', '.join(names) or 'none'}")
    if not wanted:
        raise UserError(f"SLURM has no default partition; give --partition: {', '.join(names) or 'there is none'}")
    nodes = {row[0]: _node(row) for row in rows if row[1].rstrip("*") in wanted}
    chosen = [node for node in nodes.values() if _matches(node.features, constraint)]
    if not chosen:
        features = ", ".join(sorted(set().union(*(node.features for node in nodes.values())))) or "none"
        raise UserError(f"no node of partition {', '.join(wanted)} has --constraint {constraint}; features: {features}")
    return chosen


def describe_gpus(nodes: list[Node]) -> str:
    """``3 nodes with 2 GPUs, 1 with 8 (a100)``."""
    counts = Counter((node.gpus, node.gpu_type) for node in nodes)
    parts = []
    for (gpus, kind), number in sorted(counts.items()):
        noun = f"{number} node{'s' if number > 1 else ''}" if not parts else f"{number}"
        parts.append(f"{noun} with {gpus or 'no'} GPU{'' if gpus == 1 else 's'}{f' ({kind})' if kind else ''}")
    return ", ".join(parts)


def _node(row: list[str]) -> Node:
    name, _, cpus, memory, resources, features = row
    found = [(kind.lower(), int(count or 1)) for kind, count in _GPU.findall(re.sub(r"\([^)]*\)", "", resources))]
    return Node(
        name=name,
        cpus=int(cpus.rstrip("+")),
        memory_mb=int(memory.rstrip("+")),
        gpus=sum(count for _, count in found),
        gpu_type=", ".join(sorted({kind for kind, _ in found if kind})),
        features=frozenset(features.split(",")) - {"(null)", ""},
    )


def _matches(features: frozenset[str], constraint: str | None) -> bool:
    if not constraint or re.search(r"[^\w.&|-]", constraint):
        return True
    return any(set(alternative.split("&")) <= features for alternative in constraint.split("|"))
