"""Checkpoints that any number of ranks and any ZeRO stage can resume from.

Each rank writes its share of the tensors (weights and optimiser state, float32) and a checksum into a temporary folder,
which is renamed to ``step-...`` when every share is complete. Only folders of that name are read.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.cli import write_json
from tmass_dist.data.remote import sha256_of
from tmass_dist.distributed import all_gather_objects, barrier, is_main, rank, share_failure, world_size
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from tmass_dist.training.engine import Engine

_NAME = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    matches = [_NAME.fullmatch(path.name) for path in directory.glob("step-*")]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


class Saver:
    """Writes checkpoints in the background of the following steps; every rank makes the same calls.

    Args:
        engine: the engine whose state is saved.
        directory: holds all checkpoints of the run.
        keep: number of complete checkpoints kept.
    """

    def __init__(self, engine: Engine, directory: Path, keep: int = 2) -> None:
        self.engine, self.directory, self.keep = engine, directory, keep
        self._thread: threading.Thread | None = None
        self._failure: OSError | None = None
        self._step = -1

    def begin(self, step: int) -> None:
        """Copy the state after ``step`` steps and start to write it; training may continue at once."""
        self.finish()
        temporary = self.directory / f"tmp-step-{step:08d}"
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        tensors: dict[str, Tensor] = {}
        for number, (key, name, value) in enumerate(self.engine.state()):
            if number % world_size() == rank():
                # A copy: training changes the original while this one is written.
                tensors[f"{key}:{name}"] = value.detach().to("cpu", copy=True).contiguous()
        self._step, self._failure = step, None
        self._thread = threading.Thread(target=self._write, args=(temporary / _part(rank()), tensors), name="save")
        self._thread.start()

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(tensors, path)
            path.with_suffix(".sha256").write_text(sha256_of(path), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            self._failure = error if isinstance(error, OSError) else OSError(str(error))

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a save has begun that is not finished."""
        return self._thread is not None

    def finish(self) -> None:
        """Wait for every rank's share and rename the folder.

        Raises:
            UserError: a rank could not write; the last complete checkpoint is named.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        temporary, final = self.directory / f"tmp-step-{self._step:08d}", self.directory / f"step-{self._step:08d}"
        failure: Exception | None = None
        if self._failure is not None:
            before = saved_steps(self.directory)
            remaining = (
                f"the last complete checkpoint is of step {before[0]}" if before else "there is no checkpoint yet"
            )
            failure = UserError(
                f"rank {rank()} cannot save step {self._step} in {self.directory}: {self._failure}; {remaining}"
            )
        try:
            share_failure(failure)
        except ValueError:
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if is_main():
            parts = {_part(n): (temporary / _part(n)).with_suffix(".sha256").read_text() for n in range(world_size())}
            manifest = {"step": self._step, "world_size": world_size(), "zero_stage": self.engine.stage, "parts": parts}
            write_json(temporary / MANIFEST, manifest)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in saved_steps(self.directory)[self.keep :]:
                shutil.rmtree(self.directory / f"step-{old:08d}", ignore_errors=True)
        barrier()


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint; each rank verifies its share of the files."""
    try:
        parts = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["parts"]
        for name in sorted(parts)[rank() :: world_size()]:
            if sha256_of(directory / name) != parts[name]:
                return f"{directory / name} is damaged"
    except (OSError, KeyError, ValueError) as error:
        return f"{directory} is incomplete ({error})"
    return None


def resume(engine: Engine, directory: Path, log: logging.Logger | None = None) -> int:
    """Load the newest complete checkpoint; returns the number of steps done, 0 if there is no checkpoint.

    Raises:
        UserError: there are checkpoints but none is complete, or it is of another model.
    """
    log = log or logging.getLogger("tmass_dist")
    # One rank lists the folders: others could see different ones while old ones are removed.
    steps = all_gather_objects(saved_steps(directory) if is_main() else [])[0]
    for step in steps:
        folder = directory / f"step-{step:08d}"
        damage = next((line for line in all_gather_objects(_damage(folder)) if line), None)
        if damage is None:
            _load(engine, folder)
            engine.set_step(step)
            return step
        log.warning("%s; using the checkpoint before it", damage)
    if steps:
        raise UserError(f"no checkpoint in {directory} is complete; remove the directory to start from the beginning")
    return 0


def _load(engine: Engine, folder: Path) -> None:
    from contextlib import ExitStack

    from safetensors import safe_open

    with ExitStack() as stack:
        file_of: dict[str, Any] = {}
        for path in sorted(folder.glob("part-*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            file_of |= dict.fromkeys(file.keys(), file)
        for key in engine.state_keys:
            for name, parameter in engine.named.items():
                label = f"{key}:{name}"
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                if label not in file_of or tuple(file_of[label].get_slice(label).get_shape()) != shape:
                    raise UserError(f"{folder} is of another model or optimiser: it has no {label} of shape {shape}")
                engine.set_state(key, name, file_of[label].get_tensor(label))


def weights_of(folder: Path, key: str = "weight") -> dict[str, Tensor]:
    """All tensors of one kind (``weight``, ``exp_avg``, ``exp_avg_sq``, ``ema``) in a checkpoint, by name."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        tensors |= {k.split(":", 1)[1]: v for k, v in load_file(path).items() if k.startswith(f"{key}:")}
    return tensors
