"""The one door to DeepSpeed: an engine that steps, saves and loads."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from tmass_dist.config import Config
from tmass_dist.distributed import initialise, world_size


def _deepspeed() -> Any:
    # On CPU ranks DeepSpeed would otherwise look for an accelerator, and compile a shared-memory
    # extension that training does not need (38 s at the first start).
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def start_engine(objective: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> Any:
    """Wrap the objective in ZeRO of ``engine.zero_stage``; alone, it is a world of one."""
    if "RANK" not in os.environ:
        # DeepSpeed has no life without a process group: give a single process one of its own.
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        initialise()
    deepspeed = _deepspeed()
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": config.data.batch_size // world_size(),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optim.max_grad_norm,
            "zero_optimization": {"stage": config.engine.zero_stage},
            "bf16": {"enabled": config.engine.bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    return engine
