"""Reading annotation files: text, JSON, JSON lines and CSV, with errors that name the file and the line.

A byte-order mark is accepted in every file; with one, UTF-16 is accepted too.
"""

from __future__ import annotations

import codecs
import csv
import json
from pathlib import Path
from typing import Any

from tmass_dist.errors import UserError


def find_file(directory: Path, *names: str) -> Path:
    """The first of ``names`` that exists in ``directory``; ``directory`` itself if it is a file.

    Raises:
        UserError: none exists.
    """
    if directory.is_file():
        return directory
    for name in names:
        if (directory / name).is_file():
            return directory / name
    there = "it does not exist"
    if directory.is_dir():
        there = "it holds " + (", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing")
    raise UserError(f"no {' or '.join(names)} in {directory}: {there}")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark; byte-order marks are removed.

    Raises:
        UserError: it is in another encoding.
    """
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line} is not in UTF-8; save the file in that encoding") from error
    return text.replace("\ufeff", "")  # also in the middle of files that were put together


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Number (from 1) and text of each line that is not blank, without white space around it."""
    # str.splitlines also splits at characters such as U+2028, which captions may hold.
    lines = (line.strip() for line in read_text(path).split("\n"))
    return [(number, line) for number, line in enumerate(lines, start=1) if line]


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON: {error}") from error


def read_json_objects(path: Path, required: set[str]) -> list[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a file with JSON lines.

    Raises:
        UserError: a line is no JSON object, or lacks a key of ``required``.
    """
    objects = []
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{path} line {number} is not a JSON object")
        if missing := required - value.keys():
            raise UserError(f"{path} line {number} lacks {', '.join(sorted(missing))}")
        objects.append((number, value))
    if not objects:
        raise UserError(f"{path} has no lines")
    return objects


def read_table(path: Path, *columns: str) -> list[tuple[int, dict[str, str]]]:
    """Line number (of the last line) and cells of each row of a CSV file with a header.

    Raises:
        UserError: a column is missing, there are no rows, a row has more or fewer cells than the header (as with a
            comma in a caption without quotes), or a quote is not closed.
    """
    lines = read_text(path).split("\n")
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            first, start = start, reader.line_num + 1
            if not any(cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if missing := set(columns) - set(header):
                    raise UserError(f"{path} lacks the column {', '.join(sorted(missing))}; it has {header}")
                continue
            _check_row(path, first, cells, header)
            rows.append((reader.line_num, dict(zip(header, (cell.strip("\n") for cell in cells)))))
    except csv.Error as error:
        raise UserError(
            f"{path} line {start}: {error}; a quote opened at the start of a cell must be closed at its end"
        ) from error
    if not rows:
        raise UserError(f"{path} has a header and no rows" if header else f"{path} is empty")
    return rows


def _check_row(path: Path, line: int, cells: list[str], header: list[str]) -> None:
    for cell in cells:
        # A cell may have several lines; one of them that looks like a whole row was swallowed by an open quote.
        swallowed = [inner for inner in cell.split("\n")[1:] if inner.count(",") >= max(1, len(header) - 1)]
        if swallowed:
            raise UserError(f"{path} line {line}: a quote is not closed; the cell goes on with {swallowed[0][:60]!r}")
    if len(cells) != len(header):
        raise UserError(
            f"{path} line {line} has {len(cells)} cells and its header has {len(header)}; "
            "put a caption with a comma between double quotes"
        )
