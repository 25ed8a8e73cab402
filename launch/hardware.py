"""What a plan assumes about a GPU and its links."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from tmass_dist.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the links between GPUs."""

    name: str
    memory_gb: float
    """GiB, as the vendor states it."""
    peak_tflops: float
    """Dense bfloat16 peak, or float32 for one without bfloat16."""
    float32_tflops: float | None = None
    """Peak of float32 without TF32; None is taken as ``peak_tflops``."""
    has_bf16: bool = True
    mfu: float = 0.4
    """Part of the peak that the towers reach; 40 % is the goal of docs/performance.md."""
    node_gb_s: float = 200.0
    """GB/s of one GPU to the others of its node."""
    network_gb_s: float = 20.0
    """GB/s of one GPU to those of other nodes."""


_KNOWN = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 141, 989, 67),
        Gpu("h100", 80, 989, 67),
        Gpu("a100", 80, 312, 19.5),
        Gpu("a100-40", 40, 312, 19.5),
        Gpu("b200", 180, 2250, 80),
        Gpu("l40s", 48, 362, 92, node_gb_s=25),
        Gpu("l4", 24, 121, 30, node_gb_s=12),
        Gpu("a10", 24, 125, 31, node_gb_s=12),
        Gpu("4090", 24, 165, 83, node_gb_s=12),
        Gpu("v100", 32, 15.7, has_bf16=False, node_gb_s=100, network_gb_s=10),
    )
}
"""From the vendors' data sheets. The bandwidths are cautious: half of NVLink, half of 400 Gbit/s for each GPU."""


def find_gpu(
    name: str | None, memory_gb: float | None = None, peak_tflops: float | None = None, mfu: float | None = None
) -> Gpu:
    """A known GPU, with the values that are given in place of the known ones.

    Args:
        name: as ``--gpu`` or ``sinfo`` names it, for example ``h100`` or ``nvidia_a100-sxm4-40gb``. A memory in it, as
            these 40 GB, is the GPU's. A slice of a GPU (MIG) is not known.
        memory_gb, peak_tflops, mfu: of the options with these names.

    Raises:
        UserError: neither the GPU is known nor its memory and peak are given, or a value is out of range.
    """
    for option, value in (("--gpu-memory-gb", memory_gb), ("--peak-tflops", peak_tflops), ("--mfu", mfu)):
        if value is not None and not 0 < value < (1.01 if option == "--mfu" else 1e6):
            raise UserError(
                f"{option} is {value}; it must be positive" + (" and at most 1" if option == "--mfu" else "")
            )
    known = _known(name or "")
    if known is None and (memory_gb is None or peak_tflops is None):
        raise UserError(
            f"{f'--gpu {name} is not known' if name else 'which GPU? give --gpu'}; known: {', '.join(_KNOWN)}. "
            "For another one give --gpu-memory-gb and --peak-tflops"
        )
    base = known or Gpu(name or "GPU", 0, 0)
    return Gpu(
        name=base.name,
        memory_gb=memory_gb or base.memory_gb,
        peak_tflops=peak_tflops or base.peak_tflops,
        float32_tflops=None if peak_tflops else base.float32_tflops,
        has_bf16=base.has_bf16,
        mfu=mfu or base.mfu,
        node_gb_s=base.node_gb_s,
        network_gb_s=base.network_gb_s,
    )


def _known(name: str) -> Gpu | None:
    words = name.lower()
    if re.search(r"\dg\.\d+gb", words):  # as 1g.10gb
        return None
    # An L40 is no L4, an A1000 no A100, and a GH200 no H200.
    matches = sorted((known for known in _KNOWN if re.search(rf"(?<!g){known}(?!\d)", words)), key=len)
    if not matches:
        return None
    memory = re.search(r"(\d+)gb", words)
    return replace(_KNOWN[matches[-1]], **({"memory_gb": float(memory[1])} if memory else {}))
