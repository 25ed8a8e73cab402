"""``--plan`` against real steps on CPUs: peak of live tensor bytes, state of ZeRO, numbers exchanged; JSON lines.

``python benchmarks/plan_accuracy.py [CASE ...]``. The reference is torch's profiler around DeepSpeed's engine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.forecast import gradient_exchanges, held_between_steps, planned_peak, simulate  # noqa: E402
from tmass_dist.config import Config, load_config  # noqa: E402

VITB32 = ["model.architecture=ViT-B-32-quickgelu"]
_MEANS = {
    "": [],
    "-micro": ["engine.micro_batch={half}"],
    "-checkpointing": ["engine.checkpoint_activations=true"],
    "-both": ["engine.micro_batch={half}", "engine.checkpoint_activations=true"],
}
CASES: dict[str, tuple[str, int, list[str]]] = {
    "demo": ("demo.yaml", 1, []),
    "demo-2-ranks": ("demo.yaml", 2, []),
    "demo-4-ranks": ("demo.yaml", 4, []),
    "demo-micro": ("demo.yaml", 1, ["engine.micro_batch=8"]),
    **{
        f"demo-2-ranks-micro-stage-{stage}": ("demo.yaml", 2, ["engine.micro_batch=4", f"engine.zero_stage={stage}"])
        for stage in (1, 2, 3)
    },
    "demo-checkpointing": ("demo.yaml", 1, ["engine.checkpoint_activations=true"]),
    **{
        f"demo{'-4-ranks' if ranks == 4 else ''}-stage-{stage}": ("demo.yaml", ranks, [f"engine.zero_stage={stage}"])
        for ranks in (2, 4)
        for stage in (0, 2, 3)
    },
    **{
        f"vitb32-{pairs}{name}": (
            "msrvtt.yaml",
            1,
            [*VITB32, f"data.batch_size={pairs}", *(setting.format(half=pairs // 2) for setting in settings)],
        )
        for pairs in (2, 4, 8)
        for name, settings in _MEANS.items()
    },
    **{
        f"vitb32-stage-{stage}": ("msrvtt.yaml", 2, [*VITB32, "data.batch_size=4", f"engine.zero_stage={stage}"])
        for stage in (0, 1, 2, 3)
    },
}
TOKENS = 16
PAUSE_S = 0.005


def config_of(case: str) -> tuple[Config, int]:
    """The config and the number of ranks of a case; bfloat16 off, as a CPU would emulate it."""
    page, ranks, overrides = CASES[case]
    fixed = ["model.pretrained=null", "engine.bf16=false"]
    return load_config(page, [*overrides, *fixed]), ranks


def real_step(config: Config, rank: int, num_ranks: int, port: int) -> dict[str, Any]:
    """Two steps of a real rank on a CPU: live bytes between them, their peak in the second, and what it exchanged."""
    names = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    import torch
    from torch.profiler import ProfilerActivity, profile

    from launch.simulation import StepMeter, step_inputs_of
    from tmass_dist import distributed
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    torch.set_num_threads(1)
    distributed.initialise(120)
    inputs = None
    _let_gloo_release_tensors()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = build_objective(config)
        engine = Engine(model, config)
        model.train()
        marks = []
        meter = StepMeter()
        for step in range(2):
            marks.append(time.time_ns())
            inputs = step_inputs_of(model, config, config.data.batch_size // num_ranks, TOKENS)
            with meter if step else nullcontext():
                engine.backward(*inputs)
                engine.step(1.0)
            del inputs
    live = peak = state = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # pyright: ignore
        if event.name() == "[memory]":
            live += event.nbytes()  # pyright: ignore
            if event.start_ns() < marks[1]:
                state = live
            else:
                peak = max(peak, live)
    distributed.finish()
    return {"peak": peak, "state": state, "exchanged": dict(meter.exchanged)}


def _let_gloo_release_tensors() -> None:
    """Pause after each collective, until gloo's thread has dropped the tensors, so that this thread frees them.

    The profiler records frees of this thread only: a tensor that gloo's thread drops last would count for ever.
    """
    from torch.distributed import Work

    wait = Work.wait

    def wait_and_pause(work: Any, *arguments: Any) -> Any:
        result = wait(work, *arguments)
        time.sleep(PAUSE_S)
        return result

    Work.wait = wait_and_pause


def measure(config: Config, num_ranks: int) -> dict[str, Any]:
    """:func:`real_step` of rank 0."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(num_ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        first, *others = (pool.submit(real_step, config, rank, num_ranks, port) for rank in range(num_ranks))
        for other in others:
            other.result()
        return first.result()


def compare(case: str) -> list[dict[str, Any]]:
    """Lines ``name, value, unit, n, reference, ratio``: planned, and measured as the reference."""
    config, num_ranks = config_of(case)
    stage = config.engine.zero_stage
    cost, real = simulate(config, num_ranks, num_tokens=TOKENS), measure(config, num_ranks)
    values = {
        "peak": (planned_peak(cost, stage, num_ranks, ema=False), real["peak"], "bytes"),
        "state": (held_between_steps(cost, stage, num_ranks, ema=False), real["state"], "bytes"),
    }
    planned = Counter(cost.exchanged) + Counter()
    if num_ranks > 1:
        for name, numbers in gradient_exchanges(cost, config, num_ranks).items():
            planned[name.rpartition(", ")[2]] += numbers
    counted = Counter(real["exchanged"])
    if num_ranks > 1:
        for kind in planned | counted:
            values[f"exchanged-{kind}"] = (planned[kind], counted[kind], "numbers")
    return [
        {
            "name": f"{case}-{name}",
            "value": value,
            "unit": unit,
            "n": num_ranks,
            "reference": reference,
            "ratio": round(value / reference, 3) if reference else None,
        }
        for name, (value, reference, unit) in values.items()
    ]


def main() -> None:
    for case in sys.argv[1:] or CASES:
        for line in compare(case):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
