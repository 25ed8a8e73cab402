"""Reading arrays that other programs may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from tmass_dist.errors import UserError


def map_array(path: Path, mode: Literal["r", "c"] = "r") -> np.ndarray:
    """An array of a ``.npy`` file, memory-mapped; ``c`` maps it copy-on-write. Nothing is unpickled.

    Raises:
        UserError: the file holds no array of numbers, or less than its header says.
        OSError: it cannot be read.
    """
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
    except OSError:
        raise
    except Exception as error:  # the parser of the header raises errors of many kinds
        raise UserError(f"{path} is not a matrix of numbers (.npy): {error}") from error
    raise UserError(f"{path} is not a matrix of numbers (.npy): it is an archive")
