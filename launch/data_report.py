"""The data of a run that is not submitted yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmass_dist.config import Config
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    from tmass_dist.data.index import Index


def read_training_split(run: Config) -> tuple[Index | None, str]:
    """The training split, or None and the reason; the other splits are read too."""
    from tmass_dist.data.index import load_index
    from tmass_dist.training.checks import load_splits

    try:
        training, _ = load_splits(run)
        load_index(run.data.test, run.data.cache)
    except (UserError, OSError) as error:
        return None, " ".join(str(error).split())
    return training, ""


def steps_per_epoch(run: Config, training: Index, num_ranks: int) -> int:
    """Steps of an epoch, in the order that the run has or will choose.

    Raises:
        UserError: the data are too small for a batch, or the order's settings do not fit.
    """
    from tmass_dist.data.mixed_order import make_order
    from tmass_dist.data.order import choose_order
    from tmass_dist.training.checks import saved_config

    saved = saved_config(run)
    data = choose_order(run.data, num_ranks, saved.data if saved else None)
    return make_order(training, data, run.seed).steps_per_epoch
