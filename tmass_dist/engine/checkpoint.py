"""Checkpoints that are whole or absent: written aside, then renamed; ``latest.json`` only names a complete one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tmass_dist.distributed import barrier, is_main, share_failure, world_size


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def save(engine: Any, directory: Path, step: int) -> None:
    """Save the state after ``step`` steps; every rank calls it. The one before is kept until this one is whole."""
    tag = f"step-{step:08d}"
    aside = f"tmp-{tag}"
    if is_main():
        shutil.rmtree(directory / aside, ignore_errors=True)
    barrier()
    failure = None
    try:
        engine.save_checkpoint(str(directory), tag=aside, client_state={"step": step}, save_latest=False)
    except OSError as error:
        failure = error
    share_failure(failure)
    barrier()
    if is_main():
        shutil.rmtree(directory / tag, ignore_errors=True)
        os.replace(directory / aside, directory / tag)
        write_json(directory / "latest.json", {"tag": tag, "step": step, "world_size": world_size()})
        for old in directory.glob("step-*"):
            if old.name != tag:
                shutil.rmtree(old, ignore_errors=True)
    barrier()


def resume(engine: Any, directory: Path) -> int:
    """Load the latest complete checkpoint; returns the number of steps done, 0 when there is none.

    Raises:
        ValueError: it was saved by another number of ranks, or DeepSpeed finds it incomplete.
    """
    pointer = directory / "latest.json"
    if not pointer.is_file():
        return 0
    latest = json.loads(pointer.read_text(encoding="utf-8"))
    if latest["world_size"] != world_size():
        raise ValueError(
            f"{directory} was saved by {latest['world_size']} ranks and this run has {world_size()}; "
            "start it again with as many ranks"
        )
    path, client = engine.load_checkpoint(str(directory), tag=latest["tag"])
    share_failure(None if path else ValueError(f"the checkpoint {directory / latest['tag']} is incomplete"))
    return int(client["step"])
