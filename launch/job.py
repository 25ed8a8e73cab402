"""What each task of a job runs. submitit pickles it by reference, so it lives in an importable module."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tmass_dist.config import Config


@dataclass
class TrainJob:
    """Train, then evaluate the best checkpoint on the test split.

    Args:
        config: the run.
        port: where the ranks meet on the first node.
        cpu_threads: threads of a rank on CPU.
    """

    config: Config
    port: int
    cpu_threads: int = 1

    def __call__(self) -> None:
        import submitit

        env = submitit.JobEnvironment()
        if os.environ.get("SLURM_RESTART_COUNT"):
            # An earlier attempt may have left a result that is no longer true.
            env.paths.result_pickle.unlink(missing_ok=True)
        os.environ.update(
            RANK=str(env.global_rank),
            WORLD_SIZE=str(env.num_tasks),
            LOCAL_RANK=str(env.local_rank),
            MASTER_ADDR=env.hostnames[0] if env.num_nodes > 1 else "127.0.0.1",
            MASTER_PORT=str(self.port),
            OMP_NUM_THREADS=str(self.cpu_threads),
        )
        import torch

        from tmass_dist.distributed import finish
        from tmass_dist.evaluate import evaluate
        from tmass_dist.train import train

        torch.set_num_threads(self.cpu_threads)
        train(self.config)
        evaluate(self.config)
        finish()
