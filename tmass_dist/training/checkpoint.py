"""Checkpoints that any number of ranks and any ZeRO stage can resume from.

Each rank writes the pieces of the state that it holds (float32) and a checksum into a temporary folder, which is
renamed to ``step-...`` when every rank's part is complete. Only folders of that name are read. To resume, each rank
reads the pieces that it needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.cli import write_json
from tmass_dist.data.remote import sha256_of
from tmass_dist.distributed import all_gather_objects, barrier, is_main, rank, share_failure, world_size
from tmass_dist.errors import MachineError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from tmass_dist.training.engine import Engine

_NAME = re.compile(r"step-(\d{8})")
MANIFEST = "manifest.json"
_WRONG_CONTENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, RecursionError)
"""Errors that say what a checkpoint holds, and not that a file server does not answer."""


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
        self._failure: Exception | None = None
        self._step = self._num_updates = 0
        self._copies: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        """Copy the state after ``step`` steps and start to write it; training may continue at once."""
        self.finish()
        temporary = self.directory / f"tmp-step-{step:08d}"
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        copied = self._copy_state()
        self._step, self._failure, self._num_updates = step, None, self.engine.optimizer.num_updates
        self._thread = threading.Thread(target=self._write, args=(temporary / _part(rank()), copied), name="save")
        self._thread.start()

    def _copy_state(self) -> Any:
        """Copy this rank's pieces into CPU memory, because training changes them; an event of the GPU, or None."""
        import torch

        on_gpu = torch.cuda.is_available()
        for piece in self.engine.shards.pieces(self.engine.state_keys):
            label = f"{piece.key}:{piece.name}:{piece.start}"
            if label not in self._copies:
                # Page-locked memory is copied to in the background. It is allocated once for all checkpoints.
                self._copies[label] = torch.empty(piece.values.shape, dtype=piece.values.dtype, pin_memory=on_gpu)
            self._copies[label].copy_(piece.values.detach(), non_blocking=True)
        if not on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _write(self, path: Path, copied: Any) -> None:
        from safetensors.torch import save_file

        try:
            if copied is not None:
                copied.synchronize()
            save_file(self._copies, path)
            path.with_suffix(".sha256").write_text(sha256_of(path), encoding="utf-8")
        except Exception as error:  # a disk's, or safetensors' own; finish() raises it in the main thread
            self._failure = error

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a save has begun that is not finished."""
        return self._thread is not None

    def finish(self) -> None:
        """Wait for every rank's part and rename the folder.

        Raises:
            MachineError: a rank could not write; the last complete checkpoint is named.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        temporary, final = self.directory / f"tmp-step-{self._step:08d}", self.directory / f"step-{self._step:08d}"
        failure: Exception | None = None
        if self._failure is not None:
            before = saved_steps(self.directory)
            last = f"the last complete checkpoint is of step {before[0]}" if before else "there is no checkpoint"
            failure = MachineError(
                f"rank {rank()} cannot save step {self._step} in {self.directory}: {self._failure}; {last}"
            )
            failure.__cause__ = self._failure
        try:
            share_failure(failure)
        except MachineError:
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if is_main():
            self._complete(temporary, final)
        barrier()

    def _complete(self, temporary: Path, final: Path) -> None:
        names = [_part(number) for number in range(world_size())]
        manifest = {
            "step": self._step,
            "world_size": world_size(),
            "zero_stage": self.engine.stage,
            "num_updates": self._num_updates,
            "shapes": {name: self.engine.shards.shape(name) for name in self.engine.named},
            "parts": {name: (temporary / name).with_suffix(".sha256").read_text(encoding="utf-8") for name in names},
        }
        write_json(temporary / MANIFEST, manifest | {"checksum": manifest_checksum(manifest)})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in saved_steps(self.directory)[self.keep :]:
            shutil.rmtree(self.directory / f"step-{old:08d}", ignore_errors=True)


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Checksum of a manifest's entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: its content is not what was written.
        OSError: it cannot be read.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("parts"), dict):
        raise ValueError(f"{MANIFEST} does not list the parts")
    checksum = manifest.pop("checksum", None)
    if (checksum is not None or "shapes" in manifest) and checksum != manifest_checksum(manifest):
        raise ValueError(f"the checksum of {MANIFEST} differs")  # version 0.1 had neither shapes nor checksum
    if f"step-{manifest.get('step'):08d}" != folder.name:
        raise ValueError(f"{MANIFEST} is of step {manifest.get('step')}")
    if sorted(manifest["parts"]) != [_part(number) for number in range(manifest.get("world_size", 0))]:
        raise ValueError(f"{MANIFEST} does not list one part for each of {manifest.get('world_size')} ranks")
    if not manifest["parts"]:
        raise ValueError(f"{MANIFEST} lists no part")
    shapes = manifest.get("shapes", {})
    if not isinstance(shapes, dict) or not all(isinstance(shape, list) for shape in shapes.values()):
        raise ValueError(f"{MANIFEST} does not list the shapes of the parameters")
    if not isinstance(manifest.get("num_updates", 0), int):
        raise ValueError(f"{MANIFEST} does not say how many updates were done")
    return manifest


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None; each rank verifies its share of the files.

    Raises:
        OSError: a file that exists cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        parts = _read_manifest(folder)["parts"]
        for name in sorted(parts)[rank() :: world_size()]:
            if sha256_of(folder / name) != parts[name]:
                return f"{folder / name} is damaged"
            with safe_open(folder / name, "pt"):
                pass
    except (*_WRONG_CONTENT, SafetensorError) as error:
        return f"{folder} is incomplete ({error})"
    return None


def _check(folder: Path) -> tuple[str | None, bool]:
    """What is wrong with a checkpoint, and whether it may pass: a file server may answer again."""
    try:
        return _damage(folder), False
    except OSError as error:
        return f"{folder} cannot be read ({error})", True


def resume(engine: Engine, directory: Path, log: logging.Logger | None = None) -> int:
    """Load the newest complete checkpoint; returns the number of steps done, 0 if there is no checkpoint.

    Raises:
        UserError: there are checkpoints but none is complete, or it is of another model.
        MachineError: none is complete, and one of them could not be read.
    """
    log = log or logging.getLogger("tmass_dist")
    # One rank lists the folders: others could see different ones while old ones are removed.
    steps = all_gather_objects(saved_steps(directory) if is_main() else [])[0]
    unreadable = ""
    for step in steps:
        folder = directory / f"step-{step:08d}"
        found = [(line, may_pass) for line, may_pass in all_gather_objects(_check(folder)) if line]
        if not found:
            _load(engine, folder)
            # Version 0.1 did not save it. It differs from the steps if some were skipped.
            engine.optimizer.set_num_updates(_read_manifest(folder).get("num_updates", step))
            return step
        log.warning("%s; using the checkpoint before it", found[0][0])
        unreadable = next((line for line, may_pass in found if may_pass), unreadable)
    if unreadable:
        raise MachineError(f"no checkpoint in {directory} can be used: {unreadable}")
    if steps:
        raise UserError(f"no checkpoint in {directory} is complete; remove the directory to start from the beginning")
    return 0


def _load(engine: Engine, folder: Path) -> None:
    with CheckpointReader(folder) as reader:
        expected = ((key, name, engine.shards.shape(name)) for key in engine.state_keys for name in engine.named)
        missing = (
            f"{key}:{name} of shape {shape}" for key, name, shape in expected if reader.shape(key, name) != shape
        )
        first = next(missing, None)
        failure = UserError(f"{folder} is of another model or optimiser: it has no {first}") if first else None
        share_failure(failure)
        engine.shards.load(engine.state_keys, reader.read)


class CheckpointReader:
    """Reads parts of the tensors of a checkpoint; a context manager that holds its files open.

    Checkpoints of version 0.1 hold each tensor whole in one file; they are read, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_read = 0
        """Numbers read so far."""
        self._stack = ExitStack()
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}

    def __enter__(self) -> CheckpointReader:
        from safetensors import safe_open

        manifest = _read_manifest(self.folder)
        shapes = {name: tuple(shape) for name, shape in manifest.get("shapes", {}).items()}
        for part in sorted(manifest["parts"]):
            file = self._stack.enter_context(safe_open(self.folder / part, "pt"))
            for label in file.keys():  # noqa: SIM118  (not a dict)
                key, name, *start = label.split(":")
                shape = tuple(file.get_slice(label).get_shape())
                piece = (int(start[0]) if start else 0, math.prod(shape), file, label)
                self._pieces.setdefault((key, name), []).append(piece)
                self._shapes[key, name] = shapes.get(name, shape) if start else shape
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shape(self, key: str, name: str) -> tuple[int, ...] | None:
        """Shape of a whole tensor; None if the checkpoint does not have it."""
        return self._shapes.get((key, name))

    def read(self, key: str, name: str, start: int, stop: int) -> Tensor:
        """Numbers ``start`` to ``stop`` of a flattened tensor.

        Raises:
            MachineError: the files do not hold all of them.
        """
        import torch

        values, num_found = torch.empty(stop - start), 0
        for piece_start, numel, file, label in self._pieces.get((key, name), []):
            first, last = max(start, piece_start), min(stop, piece_start + numel)
            if first >= last:
                continue
            part = file.get_slice(label)
            inside = slice(first - piece_start, last - piece_start)
            is_flat = len(part.get_shape()) == 1
            values[first - start : last - start] = part[inside] if is_flat else part[:].flatten()[inside]
            num_found += last - first
        self.num_read += num_found
        if num_found != stop - start:
            raise MachineError(f"{self.folder} holds {num_found} of {stop - start} numbers of {key}:{name}")
        return values

    def names(self, key: str) -> list[str]:
        """Names of the tensors of one kind."""
        return [name for kind, name in self._shapes if kind == key]


def weights_of(folder: Path, key: str = "weight") -> dict[str, Tensor]:
    """All tensors of one kind (``weight``, ``exp_avg``, ``exp_avg_sq``, ``ema``) in a checkpoint, by name."""
    tensors: dict[str, Tensor] = {}
    with CheckpointReader(folder) as reader:
        for name in reader.names(key):
            shape = reader.shape(key, name)
            assert shape is not None
            tensors[name] = reader.read(key, name, 0, math.prod(shape)).reshape(shape)
    return tensors
