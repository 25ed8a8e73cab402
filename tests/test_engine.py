"""The engine: any world size, ZeRO stage and micro-batch takes the steps of one plain process on the whole batch."""

# Shapes: N pairs of the world, F frames.

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import on_ranks
from tmass_dist.config import Config, ModelConfig, StochasticConfig, load_config
from tmass_dist.training.objective import _Pooling, global_losses

N, F, SIDE, WIDTH, STEPS = 12, 4, 16, 32, 10
VARIANTS = {
    "tmass": [],
    "xpool": ["model.radius=none"],
    "kl": ["model.radius=variational", "stochastic.kl_weight=0.1", "stochastic.support_weight=0"],
}


TOWERS = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": WIDTH, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 30, "width": WIDTH, "heads": 2, "layers": 1},
    "vocabulary": ["a"],
}


def config_of(*overrides: str) -> Config:
    """Random towers, four frames, dropout and clipping in play."""
    path = Path(tempfile.gettempdir()) / f"tmass-towers-{os.getpid()}.json"
    path.write_text(json.dumps(TOWERS))
    small = [
        f"model.architecture={path}",
        "model.pretrained=null",
        f"model.num_frames={F}",
        f"data.batch_size={N}",
        "model.dropout=0.3",
    ]
    return load_config(
        "demo.yaml", [*small, "optim.clip_lr=1e-3", "optim.lr=1e-3", "optim.max_grad_norm=0.5", *overrides]
    )


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A whole global batch: pixels, tokens, noise, dropout keys."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (N, F, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(2, 20, (N, 8), generator=generator)
    tokens[:, -1] = 29
    return pixels, tokens, torch.randn(N, WIDTH, generator=generator), [step * 1000 + row for row in range(N)]


def share_of(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """This rank's rows."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rows = slice(rank * N // world, (rank + 1) * N // world)
    return tuple(part[rows] for part in batch)


def seeded(model: torch.nn.Module) -> None:
    """Weights off their start, where many gradients are zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def plain_run(config: Config, steps: int = STEPS) -> dict[str, Any]:
    """One process, torch alone."""
    from tmass_dist.training.objective import build_objective, parameter_groups
    from tmass_dist.training.optim import AuthorsAdamW

    torch.manual_seed(0)
    model = build_objective(config).train()
    seeded(model)
    optimizer = AuthorsAdamW(parameter_groups(model, config.optim), lr=config.optim.lr)
    losses, gradients = [], {}
    for step in range(steps):
        found = model("whole", *_stochastic(config, batch_of(step)))
        found.total.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.total.item())
    return {"losses": losses, "gradients": gradients, "weights": {n: p.detach() for n, p in model.named_parameters()}}


def _stochastic(config: Config, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    pixels, tokens, noise, keys = batch
    return pixels, tokens, None if config.model.radius == "none" else noise, keys


def engine_run(config: Config, steps: int = STEPS) -> dict[str, Any]:
    """The same through DeepSpeed, on the ranks that there are."""
    from deepspeed.utils import safe_get_full_grad

    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    torch.manual_seed(0)
    model = build_objective(config).train()
    seeded(model)
    engine = Engine(model, config)
    losses, gradients, norms = [], {}, {}
    for step in range(steps):
        found = engine.backward(*_stochastic(config, share_of(batch_of(step))))
        assert engine.finite
        if step == 0:
            norms = engine.group_norms()
            gradients = {n: g.clone() for n, p in engine.named.items() if (g := safe_get_full_grad(p)) is not None}
        engine.step(1.0)
        losses.append(found.total.item())
    weights = {name: value.clone() for _, name, value in engine.state(("weight",))}
    return {"losses": losses, "gradients": gradients, "weights": weights, "norms": norms}


def _many(configs: list[Config]) -> list[dict[str, Any]]:
    return [engine_run(config) for config in configs]


Case = tuple[str, int, int | None]
CASES: list[Case] = [(variant, stage, micro) for variant in VARIANTS for stage in (0, 1, 2, 3) for micro in (None, 2)]
# Half of them, in which every two settings still meet.
PAIRWISE = [case for n, case in enumerate(CASES) if (n + n // 2 + n // 8) % 2 == 0]
MATRIX = [
    pytest.param(1, PAIRWISE, id="1-pairwise"),
    pytest.param(2, PAIRWISE, id="2-pairwise"),
    *(pytest.param(world, CASES, marks=pytest.mark.slow, id=f"{world}-all") for world in (1, 2, 3, 4)),
]


@pytest.mark.parametrize(("world", "cases"), MATRIX)
def test_every_world_stage_and_micro_batch_is_one_process(world: int, cases: list[Case], tmp_path: Path) -> None:
    expected = {variant: plain_run(config_of(*more)) for variant, more in VARIANTS.items()}
    configs = [
        replace(c := config_of(*VARIANTS[variant]), engine=replace(c.engine, zero_stage=stage, micro_batch=micro))
        for variant, stage, micro in cases
    ]
    found = on_ranks(world, _many, configs, tmp_path=tmp_path)
    for rank in found:
        for (variant, stage, micro), run in zip(cases, rank):
            where = f"{variant}, ZeRO-{stage}, micro-batch {micro}, {world} ranks"
            one = expected[variant]
            torch.testing.assert_close(run["losses"], one["losses"], rtol=1e-6, atol=0, msg=f"{where}: losses")
            assert run["weights"].keys() == run["gradients"].keys() == one["gradients"].keys(), where
            for kind in ("gradients", "weights"):
                whole = torch.stack([value.norm() for value in one[kind].values()]).norm()
                gaps = {name: ((v - one[kind][name]).norm() / whole).item() for name, v in run[kind].items()}
                worst = max(gaps, key=lambda name: gaps[name])
                assert gaps[worst] < 1e-6, f"{where}: {kind} of {worst} differ by {gaps[worst]:.1e}"
            total = torch.stack([g.norm() for g in one["gradients"].values()]).norm().item()
            assert run["norms"]["total"] == pytest.approx(total, rel=1e-5), where


def test_micro_batches_and_pooling_in_tiles_change_no_number() -> None:
    """The pooling in tiles, with its dropout drawn again for the backward pass."""
    from tmass_dist.training.objective import build_objective

    found = []
    # A video takes N * WIDTH * 8 bytes * 8 copies = 24.6 kB: 5 videos to a tile, the last one of 2.
    for memory_mb in (None, 0.125):
        config = config_of()
        torch.manual_seed(0)
        model = build_objective(config).train().double()
        seeded(model)
        _, _, noise, keys = batch_of(0)
        text = noise.flip(0).double().requires_grad_()
        frames = torch.randn(N, F, WIDTH, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
        losses = global_losses(
            model.head,
            text,
            frames,
            noise.double(),
            model.towers.logit_scale,
            StochasticConfig(),
            dropout_keys=keys,
            memory_mb=memory_mb,
        )
        losses.total.backward()
        found.append([losses.total, text.grad, frames.grad, *(p.grad for p in model.head.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _peak_of_pooling(memory_mb: float | None) -> float:
    """MB that autograd holds after the forward of 64 videos by 512 texts."""
    from tmass_dist.models.head import build_head

    head = build_head(ModelConfig(num_frames=F, dropout=0.3), WIDTH).train()
    held: set[tuple[int, int]] = set()

    def keep(tensor: Tensor) -> Tensor:
        held.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    text = torch.randn(512, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pooling = _Pooling(head, text, torch.randn(64, F, WIDTH, requires_grad=True), list(range(64)), memory_mb)
        kept = pooling.map(lambda pairs, _: pairs.mean_VD)
    assert kept.requires_grad
    return sum(size for _, size in held) / 2**20


def test_pooling_in_tiles_holds_less_than_its_budget() -> None:
    whole, tiled = _peak_of_pooling(None), _peak_of_pooling(4.0)
    assert tiled < 4.0 < whole, (whole, tiled)


def _numbers_sent() -> tuple[int, int]:
    """Numbers gathered in the forward and summed in the backward of one objective."""
    from tmass_dist.models.head import build_head

    sent = {"gathered": 0, "summed": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting_gather(parts: list[Tensor], local: Tensor, **more: Any) -> Any:
        sent["gathered"] += sum(part.numel() for part in parts)
        return gather(parts, local, **more)

    def counting_reduce(tensor: Tensor, **more: Any) -> Any:
        sent["summed"] += tensor.numel()
        return reduce(tensor, **more)

    dist.all_gather, dist.all_reduce = counting_gather, counting_reduce
    _, _, noise, keys = share_of(batch_of(0))
    head = build_head(ModelConfig(num_frames=F), WIDTH).train()
    text, frames = (
        torch.randn(len(keys), WIDTH, requires_grad=True),
        torch.randn(len(keys), F, WIDTH, requires_grad=True),
    )
    losses = global_losses(head, text, frames, noise, torch.ones(1), StochasticConfig(), dropout_keys=keys)
    losses.total.backward()
    return sent["gathered"], sent["summed"]


def test_communication_of_a_step_is_3nd_and_2n2(tmp_path: Path) -> None:
    for gathered, summed in on_ranks(2, _numbers_sent, tmp_path=tmp_path):
        assert gathered == summed == 3 * N * WIDTH + 2 * N * N


def _resumed(config: Config, directory: str, until: int, save_at: int | None) -> dict[str, Tensor]:
    """Train on from what lies in ``directory`` to step ``until``; every state afterwards."""
    from tmass_dist.training import checkpoint
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    torch.manual_seed(0)
    model = build_objective(config).train()
    seeded(model)
    engine = Engine(model, config)
    step = checkpoint.resume(engine, Path(directory))
    saver = checkpoint.Saver(engine, Path(directory))
    while step < until:
        engine.backward(*_stochastic(config, share_of(batch_of(step))))
        engine.step(1 - step / 20)
        step += 1
        if step == save_at:
            saver.begin(step)  # written while the next steps run
    saver.finish()
    return {f"{key}:{name}": value.clone() for key, name, value in engine.state()}


def _resumed_many(configs: list[Config], directory: str) -> list[dict[str, Tensor]]:
    return [_resumed(config, directory, 8, None) for config in configs]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_resume_on_any_world_size_and_stage(stage: int, tmp_path: Path) -> None:
    """Saved at step 5 by 3 ranks; the same cluster goes on bit for bit, others to rounding; with its running mean."""

    def config(stage: int) -> Config:
        return config_of(f"engine.zero_stage={stage}", "optim.ema=0.9", "optim.frozen=[towers.clip.visual.conv1]")

    unbroken = on_ranks(3, _resumed, config(stage), str(tmp_path / "c"), 8, 5, tmp_path=_fresh(tmp_path))[0]
    assert any(name.startswith("ema:") for name in unbroken)
    assert not any("visual.conv1" in name for name in unbroken)
    for world, stages in {3: [stage], 1: [1, 3 - stage], 2: [stage, 2], 4: [3 - stage, 1]}.items():
        runs = on_ranks(
            world, _resumed_many, [config(s) for s in stages], str(tmp_path / "c"), tmp_path=_fresh(tmp_path)
        )[0]
        for other, run in zip(stages, runs):
            assert run.keys() == unbroken.keys()
            for name, value in run.items():
                if world == 3:
                    assert torch.equal(value, unbroken[name]), name
                gap = (value - unbroken[name]).norm() / max(unbroken[name].norm(), 1e-4)
                assert gap < 2e-5, f"{world} ranks, ZeRO-{other}: {name} differs by {gap:.1e}"
            whole = [
                torch.cat([state[n].flatten() for n in state if n.startswith("weight:")]) for state in (run, unbroken)
            ]
            assert (whole[0] - whole[1]).norm() / whole[1].norm() < 1e-6


_folders = iter(range(1000))


def _fresh(tmp_path: Path) -> Path:
    folder = tmp_path / f"meet-{next(_folders)}"
    folder.mkdir()
    return folder


def _held(stage: int) -> bool:
    """A gradient that is not a number on the last rank only: with hold, nothing changes anywhere."""
    from tmass_dist import distributed
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    torch.manual_seed(0)
    config = config_of(f"engine.zero_stage={stage}")
    model = build_objective(config).train()
    last = distributed.rank() == distributed.world_size() - 1

    def poisoned(gradient: Tensor) -> Tensor:
        return gradient * (float("nan") if last and poisoned.on else 1.0)

    poisoned.on = False
    model.head.pooling.linear.bias.register_hook(poisoned)  # before the engine's own, which then sees it
    engine = Engine(model, config)
    states = []
    for step, poison in enumerate([False, True, False]):
        poisoned.on = poison
        engine.backward(*share_of(batch_of(step)))
        assert engine.finite == (not (poison and last))
        broken = distributed.max_over_ranks([float(not engine.finite)])[0] > 0
        assert broken == poison
        engine.step(1.0, hold=broken)
        states.append({f"{k}:{n}": v.clone() for k, n, v in engine.state()})
    unchanged = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moved = all(bool(v.isfinite().all()) for v in states[2].values()) and not torch.equal(
        states[2]["weight:head.pooling.linear.bias"], states[1]["weight:head.pooling.linear.bias"]
    )
    return unchanged and moved


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_of_one_rank_that_is_no_number_moves_no_rank(stage: int, tmp_path: Path) -> None:
    assert on_ranks(2, _held, stage, tmp_path=tmp_path) == [True, True]


def _torn(directory: str) -> list[int]:
    from tmass_dist.training import checkpoint
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    config = config_of()
    engine = Engine(build_objective(config), config)
    saver = checkpoint.Saver(engine, Path(directory), keep=2)
    for step in (1, 2, 3):
        engine.backward(*share_of(batch_of(step)))
        engine.step(1.0)
        saver.begin(step)
        saver.finish()
    kept = checkpoint.saved_steps(Path(directory))
    dist.barrier()
    if dist.get_rank() == 0:
        part = Path(directory) / "step-00000003" / "part-00001.safetensors"
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    dist.barrier()
    after = checkpoint.resume(engine, Path(directory))
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(directory) / "step-00000002" / "part-00000.safetensors").unlink()
    dist.barrier()
    try:
        checkpoint.resume(engine, Path(directory))
    except ValueError as error:
        assert "whole" in str(error)
        return [*kept, after]
    return []


def test_a_torn_checkpoint_is_passed_over_and_only_the_newest_stay(tmp_path: Path) -> None:
    assert on_ranks(2, _torn, str(tmp_path / "c"), tmp_path=tmp_path) == [[3, 2, 2]] * 2


def _losses_of(configs: list[Config]) -> list[list[float]]:
    from tmass_dist.training.engine import Engine
    from tmass_dist.training.objective import build_objective

    losses = []
    for config in configs:
        torch.manual_seed(0)
        model = build_objective(config).train()
        seeded(model)
        engine = Engine(model, config)
        run = []
        for step in range(5):
            found = engine.backward(*batch_of(step))
            assert found.total.dtype == torch.float32
            engine.step(1.0)
            run.append(found.total.item())
        assert all(value.dtype == torch.float32 for _, _, value in engine.state())
        losses.append(run)
    return losses


def test_bfloat16_is_near_and_recomputed_activations_are_equal(tmp_path: Path) -> None:
    options = [[], ["engine.checkpoint_activations=true"], ["engine.bf16=true"]]
    [[plain, recomputed, bf16]] = on_ranks(1, _losses_of, [config_of(*more) for more in options], tmp_path=tmp_path)
    assert recomputed == pytest.approx(plain, rel=1e-6)
    assert bf16 == pytest.approx(plain, rel=3e-2) and bf16[0] != plain[0]
