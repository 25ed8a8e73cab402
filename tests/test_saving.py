"""What a save writes and what a resume reads, on two ranks: manifest, parts, failures, other layouts."""

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.ranks import on_ranks
from tests.small_model import batch_of, config_of, own_rows, small_objective
from tmass_dist.data.remote import sha256_of
from tmass_dist.errors import MachineError, UserError
from tmass_dist.training import checkpoint


def _engine(*overrides: str) -> Any:
    from tmass_dist.training.engine import Engine

    config = config_of("optim.ema=0.9", *overrides)
    return Engine(small_objective(config), config)


def _train(engine: Any, steps: range) -> None:
    for step in steps:
        engine.backward(*own_rows(batch_of(step)))
        engine.step(1.0)


def _state(engine: Any) -> dict[str, torch.Tensor]:
    return {f"{key}:{name}": value.clone() for key, name, value in engine.state()}


def _saved_and_resumed(directory: str) -> None:
    folder, engine = Path(directory), _engine()
    assert checkpoint.resume(engine, folder) == 0  # there is none yet
    saver = checkpoint.Saver(engine, folder, keep=2)
    assert not saver.busy and not saver.pending
    saver.finish()  # nothing to wait for
    _train(engine, range(2))
    engine.optimizer.set_num_updates(1)  # as if one step had been skipped
    saved = _state(engine)
    saver.begin(2)
    assert saver.pending and (folder / "tmp-step-00000002").is_dir()
    _train(engine, range(2, 3))  # changes nothing of what is being saved
    saver.finish()
    assert not saver.pending and not saver.busy
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002"]
    whole = folder / "step-00000002"
    manifest = json.loads((whole / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("step", "world_size", "zero_stage", "num_updates")} == {
        "step": 2,
        "world_size": 2,
        "zero_stage": 1,
        "num_updates": 1,
    }
    parts = {f"part-{k:05d}.safetensors" for k in range(2)}
    assert manifest["parts"] == {name: sha256_of(whole / name) for name in parts}
    assert manifest["shapes"] == {name: list(p.shape) for name, p in engine.named.items()}
    weights = checkpoint.weights_of(whole)
    assert weights.keys() == engine.named.keys()
    for key in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        for name, value in checkpoint.weights_of(whole, key).items():
            assert torch.equal(value, saved[f"{key}:{name}"]) and value.shape == engine.named[name].shape
    assert checkpoint.resume(engine, folder) == 2 and engine.optimizer.num_updates == 1
    assert all(torch.equal(value, saved[name]) for name, value in _state(engine).items())
    dist.barrier()

    for step in (5, 7, 12):  # a save ends the one before, and the two newest are kept
        saver.begin(step)
    assert checkpoint.saved_steps(folder) == [7, 5]
    saver.finish()
    assert checkpoint.saved_steps(folder) == [12, 7]
    dist.barrier()
    if dist.get_rank() == 0:
        for name in ("step-1", "step-00000099x", "tmp-step-00000098", "step-x", "xstep-00000099"):
            (folder / name).mkdir()
    dist.barrier()
    assert checkpoint.saved_steps(folder) == [12, 7] and checkpoint.resume(engine, folder) == 12
    dist.barrier()


def test_a_save_holds_the_state_of_its_step_and_a_resume_restores_it(tmp_path: Path) -> None:
    on_ranks(2, _saved_and_resumed, str(tmp_path / "c"), tmp_path=tmp_path)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _failures(directory: str) -> None:
    folder, engine = Path(directory), _engine()
    saver, rank = checkpoint.Saver(engine, folder), dist.get_rank()
    log = logging.getLogger("test_saving")
    log.propagate = False
    log.addHandler(lines := _Lines())

    def save(step: int) -> None:
        saver.begin(step)
        saver.finish()

    def one_rank_cannot_write(step: int) -> str:
        part = folder / f"tmp-step-{step:08d}" / "part-00001.safetensors"
        if rank == 1:
            original = saver._write

            def write(path: Path, copied: Any) -> None:
                part.mkdir()  # where the file should come
                original(path, copied)

            saver._write = write  # type: ignore[method-assign]
        with pytest.raises(MachineError) as failed:
            save(step)
        if rank == 1:
            saver._write = original  # type: ignore[method-assign]
        dist.barrier()
        assert not (folder / f"tmp-step-{step:08d}").exists() and not (folder / f"step-{step:08d}").exists()
        dist.barrier()
        return str(failed.value)

    assert f"rank 1 cannot save step 1 in {folder}: " in (line := one_rank_cannot_write(1))
    assert line.endswith("; there is no checkpoint")
    save(3)
    assert one_rank_cannot_write(4).endswith("; the last complete checkpoint is of step 3")
    save(6)  # the rank that failed can save again
    dist.barrier()

    def change(name: str, content: bytes) -> None:
        dist.barrier()
        if rank == 0:
            (folder / name).write_bytes(content)
        dist.barrier()

    part = folder / "step-00000006" / "part-00001.safetensors"
    change("step-00000006/part-00001.safetensors", part.read_bytes()[:-4] + b"\0\0\0\0")
    assert checkpoint.resume(engine, folder, log) == 3
    assert lines.lines == [f"{part} is damaged; using the checkpoint before it"]
    manifest = (folder / "step-00000003" / "manifest.json").read_bytes()
    change("step-00000003/manifest.json", manifest.replace(b'"num_updates": 0', b'"num_updates": 1'))
    with pytest.raises(UserError, match="is complete; remove"):
        checkpoint.resume(engine, folder, log)
    assert "step-00000003 is incomplete (the checksum of manifest.json differs)" in lines.lines[-1]
    change("step-00000003/manifest.json", b"{}")
    del lines.lines[1:3]
    with pytest.raises(UserError, match=f"no checkpoint in {folder} is complete; remove the directory to start from"):
        checkpoint.resume(engine, folder, log)
    assert lines.lines[2].startswith(
        f"{folder / 'step-00000003'} is incomplete (manifest.json does not list the parts)"
    )
    dist.barrier()


def test_failures_of_a_rank_are_named_on_all_and_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    on_ranks(2, _failures, str(tmp_path / "c"), tmp_path=tmp_path)


def _other_layouts(directory: str) -> None:
    folder, engine = Path(directory), _engine()
    _train(engine, range(2))
    saved, rank = _state(engine), dist.get_rank()
    saver = checkpoint.Saver(engine, folder)
    saver.begin(4)
    saver.finish()
    source = folder / "step-00000004"
    manifest = json.loads((source / "manifest.json").read_text())
    pieces = {k: load_file(source / name) for k, name in enumerate(sorted(manifest["parts"]))}

    def write(step: int, parts: list[dict[str, torch.Tensor]], changes: dict[str, Any]) -> Path:
        target = folder / f"step-{step:08d}"
        dist.barrier()
        if rank == 0:
            target.mkdir()
            names = [f"part-{k:05d}.safetensors" for k in range(len(parts))]
            for name, tensors in zip(names, parts):
                save_file(tensors, target / name)
            about = manifest | {"step": step, "world_size": len(parts)} | changes
            about["parts"] = {name: sha256_of(target / name) for name in names}
            about = {key: value for key, value in about.items() if value is not None and key != "checksum"}
            about["checksum"] = checkpoint.manifest_checksum(about)
            (target / "manifest.json").write_text(json.dumps(about))
        dist.barrier()
        return target

    # Pieces cut elsewhere, as other numbers of ranks leave them.
    cut: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for piece in (p for part in pieces.values() for p in part.items()):
        key, name, start = piece[0].split(":")
        for number, values in enumerate(piece[1].tensor_split([1, max(1, len(piece[1]) // 3)])):
            if len(values):
                cut[number][f"{key}:{name}:{start}"] = values.clone()
                start = str(int(start) + len(values))
    write(5, cut, {})
    # Version 0.1: each tensor whole and in its shape, without shapes and number of updates in the manifest.
    write(6, [{name: value.contiguous() for name, value in saved.items()}], {"shapes": None, "num_updates": None})
    for step in (6, 5):
        _train(engine, range(7, 8))
        assert checkpoint.resume(engine, folder) == step
        assert engine.optimizer.num_updates == (6 if step == 6 else manifest["num_updates"])
        assert all(torch.equal(value, saved[name]) for name, value in _state(engine).items())
        with checkpoint.CheckpointReader(folder / f"step-{step:08d}") as reader:
            name, value = max(saved.items(), key=lambda item: item[1].numel())
            key, parameter = name.split(":")
            flat, middle = value.flatten(), value.numel() // 3
            for start, stop in ((0, 2), (middle - 1, middle + 2), (1, flat.numel()), (flat.numel() - 1, flat.numel())):
                before = reader.num_read
                assert torch.equal(reader.read(key, parameter, start, stop), flat[start:stop])
                assert reader.num_read - before == stop - start
            assert reader.shape(key, parameter) == tuple(value.shape) and reader.shape(key, "none") is None
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder / f"step-{step:08d}")
        dist.barrier()

    lacking = [{label: values for label, values in part.items() if not label.endswith(":0")} for part in cut]
    incomplete = write(8, lacking, {})
    with (
        checkpoint.CheckpointReader(incomplete) as reader,
        pytest.raises(MachineError, match=r"holds \d+ of \d+ numbers"),
    ):
        reader.read(*name.split(":"), 0, flat.numel())
    other = write(9, cut, {"shapes": {name: [*shape, 1] for name, shape in manifest["shapes"].items()}})
    with pytest.raises(UserError, match=f"{other} is of another model or optimiser: it has no weight:"):
        checkpoint.resume(engine, folder)
    dist.barrier()


def test_checkpoints_of_other_ranks_and_of_version_0_1_are_read(tmp_path: Path) -> None:
    on_ranks(2, _other_layouts, str(tmp_path / "c"), tmp_path=tmp_path)


def _resumed_from_a_stale_server(directory: str) -> list[Any]:
    """Steps resumed from: with the newest checkpoint unreadable, with none readable (the error), with all readable."""
    folder, engine = Path(directory), _engine()
    saver = checkpoint.Saver(engine, folder, keep=2)
    for step in (1, 2):
        _train(engine, range(step - 1, step))
        saver.begin(step)
        saver.finish()
    found: list[Any] = []
    for unreadable in ("step-00000002", "step-", "nothing"):

        def stale(path: Path, unreadable: str = unreadable) -> str:
            if unreadable in str(path):
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return sha256_of(path)

        checkpoint.sha256_of = stale
        try:
            found.append(checkpoint.resume(engine, folder))
        except MachineError as error:
            found.append(str(error))
    return found


def test_a_file_server_that_does_not_answer_is_no_user_error(tmp_path: Path) -> None:
    """Nobody is told to remove checkpoints that are there: the job is queued again."""
    for before, message, after in on_ranks(2, _resumed_from_a_stale_server, str(tmp_path / "c"), tmp_path=tmp_path):
        assert (before, after) == (1, 2)
        assert "step-00000001 cannot be read (" in message and "Stale file handle" in message
