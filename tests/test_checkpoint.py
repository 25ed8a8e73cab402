"""Checkpoints: resumed equals never stopped, at any number of ranks and ZeRO stage; damaged ones are skipped."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import on_ranks
from tests.small_model import batch_of, config_of, own_rows, small_objective, without_unused_noise
from tmass_dist.config import Config


def _resumed(config: Config, directory: str, until: int, save_at: int | None) -> dict[str, Tensor]:
    """Train on from what lies in ``directory`` to step ``until``; every state afterwards."""
    from tmass_dist.training import checkpoint
    from tmass_dist.training.engine import Engine

    model = small_objective(config)
    engine = Engine(model, config)
    step = checkpoint.resume(engine, Path(directory))
    saver = checkpoint.Saver(engine, Path(directory))
    while step < until:
        engine.backward(*without_unused_noise(config, own_rows(batch_of(step))))
        engine.step(1 - step / 20)
        step += 1
        if step == save_at:
            saver.begin(step)  # written while the next steps run
    saver.finish()
    return {f"{key}:{name}": value.clone() for key, name, value in engine.state()}


def _resumed_many(configs: list[Config], directory: str) -> list[dict[str, Tensor]]:
    return [_resumed(config, directory, 8, None) for config in configs]


Worlds = dict[int, list[int]]
"""By number of ranks: the ZeRO stages under which a checkpoint is resumed."""


@pytest.mark.parametrize(
    ("stage", "saved_by", "worlds"),
    [
        pytest.param(3, 2, {2: [3], 1: [0], 3: [1]}, id="2 ranks"),
        pytest.param(3, 3, {3: [3], 1: [1, 0], 2: [3, 2], 4: [0, 1]}, id="ZeRO-3", marks=pytest.mark.slow),
        pytest.param(0, 3, {3: [0], 1: [1, 3], 2: [0, 2], 4: [3, 1]}, id="ZeRO-0", marks=pytest.mark.slow),
    ],
)
def test_resume_on_any_world_size_and_stage(stage: int, saved_by: int, worlds: Worlds, tmp_path: Path) -> None:
    """Saved at step 5; as many ranks resume bit for bit, others up to rounding; with the moving average."""

    def config(stage: int) -> Config:
        return config_of(f"engine.zero_stage={stage}", "optim.ema=0.9", "optim.frozen=[towers.clip.visual.conv1]")

    unbroken = on_ranks(saved_by, _resumed, config(stage), str(tmp_path / "c"), 8, 5, tmp_path=_fresh(tmp_path))[0]
    assert any(name.startswith("ema:") for name in unbroken)
    assert not any("visual.conv1" in name for name in unbroken)
    for world, stages in worlds.items():
        runs = on_ranks(
            world, _resumed_many, [config(s) for s in stages], str(tmp_path / "c"), tmp_path=_fresh(tmp_path)
        )[0]
        for other, run in zip(stages, runs):
            assert run.keys() == unbroken.keys()
            for name, value in run.items():
                if world == saved_by:
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


def _torn(directory: str) -> list[int]:
    from tmass_dist.training import checkpoint
    from tmass_dist.training.engine import Engine

    config = config_of()
    engine = Engine(small_objective(config), config)
    saver = checkpoint.Saver(engine, Path(directory), keep=2)
    for step in (1, 2, 3):
        engine.backward(*own_rows(batch_of(step)))
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
        assert "is complete; remove" in str(error)
        return [*kept, after]
    return []


def test_a_torn_checkpoint_is_passed_over_and_only_the_newest_stay(tmp_path: Path) -> None:
    assert on_ranks(2, _torn, str(tmp_path / "c"), tmp_path=tmp_path) == [[3, 2, 2]] * 2
