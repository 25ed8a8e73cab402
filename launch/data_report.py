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
