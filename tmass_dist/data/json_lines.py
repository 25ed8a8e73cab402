"""Files with a JSON object on each line, read in spite of an incomplete last line or a byte-order mark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tmass_dist.errors import UserError


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of each line that is not empty.

    An incomplete last line, without its line break, is ignored: the program that wrote it was killed.

    Raises:
        UserError: a line is not a JSON object, or not UTF-8; it names the file and the line.
    """
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # str.splitlines also splits at U+2028
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode())
            if not isinstance(entry, dict):
                raise ValueError(f"it is {type(entry).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            raise UserError(f"{path} line {number} is not a JSON object: {error}") from error
        yield number, entry
