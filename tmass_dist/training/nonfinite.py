"""What happens when a loss or a gradient is infinite or NaN."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tmass_dist import distributed
from tmass_dist.cli import write_json
from tmass_dist.config import Config
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    import logging

    from tmass_dist.data.loader import Batch


def report_nonfinite(
    run_dir: Path, step: int, batch: Batch, loss: float, names: list[str], config: Config, log: logging.Logger
) -> None:
    """Write the ranks, pairs and parameters concerned to ``nonfinite/step-N.json``; every rank calls it.

    Args:
        run_dir: of the run.
        step: counted from 1.
        batch: this rank's.
        loss: of the whole batch.
        names: the parameters whose gradient on this rank was not finite when the step was repeated.
        config: ``engine.nonfinite`` decides whether the run stops or skips the step.
        log: for the warning.

    Raises:
        UserError: with ``engine.nonfinite=stop``.
    """
    pairs = [f"{video} caption {slot}" for video, slot in zip(batch.video_ids, batch.caption_slots)]
    own_entry = {"rank": distributed.rank(), "loss": str(loss), "pairs": pairs, "parameters": names}
    entries = distributed.all_gather_objects(own_entry)
    # If no rank is concerned the second time, a calculation went wrong once; all are listed.
    entries = [entry for entry in entries if entry["parameters"]] or entries
    path = run_dir / "nonfinite" / f"step-{step:08d}.json"
    if distributed.is_main():
        path.parent.mkdir(exist_ok=True)
        write_json(path, entries)
    ranks = ", ".join(str(entry["rank"]) for entry in entries)
    line = (
        f"step {step}: the loss or a gradient of rank {ranks} is not a number; no rank updated; the pairs are in {path}"
    )
    if config.engine.nonfinite == "stop":
        raise UserError(f"{line}; lower optim.lr, look at the pairs, or set engine.nonfinite=skip")
    log.warning("%s; skipped", line)
