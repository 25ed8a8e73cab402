"""The page of the reproduction, as ``index.html`` and ``index.md``: a section for each part of the paper."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.paper import analyses, figures, tables
from launch.paper.measure import TRIALS
from launch.paper.results import TITLES, Results, Section, count_seeds
from tmass_dist.cli import write_text
from tmass_dist.pages import render_page

if TYPE_CHECKING:
    from launch.paper.layout import Layout

SECTIONS: dict[str, Callable[[Results], Section]] = {
    "table 1": tables.table_1,
    "table 2": tables.table_2,
    "table 3": tables.table_3,
    "table 4": tables.table_4,
    "table 5": tables.table_5,
    "figure 1": figures.figure_1,
    "figure 2": figures.figure_2,
    "figure 3": figures.figure_3,
    "section 2": analyses.section_2,
    "section 3": analyses.section_3,
    "gain": analyses.gain,
}
"""What makes the section of each part of ``PARTS``."""


def write_page(layout: Layout, parts: list[str], missing_data: str | None) -> Path:
    """Write both files.

    Args:
        layout: where the runs are and the page goes.
        parts: keys of ``SECTIONS``, in the order of the page.
        missing_data: why this data set cannot be run here, or None.

    Returns:
        ``index.html``, which needs no other file; ``index.md`` has its pictures in ``pictures/``.
    """
    results = Results(layout, missing_data)
    sections = [SECTIONS[part](results) for part in parts]
    seeds = count_seeds(layout.runs("tmass"))
    head = (
        f"{TITLES[layout.data]}, {seeds} (of training, and of the towers where the benchmark pretrains its own). "
        "Mean ± standard deviation over seeds, R@K in percent. Checkpoints are chosen on the validation split. "
        f"Measured rows say data set, protocol and seeds; unless they say otherwise, they have M = {TRIALS} where "
        "samples are drawn, no post-processing, and float32 scores. The published checkpoints were chosen on the test "
        "set, and the published evaluation pools each video with its own caption (a leak), as published_code does here "
        "(docs/protocol.md)."
    )
    html = layout.base / "index.html"
    shown = [(section, [(caption, _data_url(png)) for caption, png in section.pictures]) for section in sections]
    page = render_page("reproduction.html", folder=Path(__file__).parent, head=head, sections=shown)
    for path, text in ((html, page), (html.with_suffix(".md"), _markdown(head, sections, html))):
        write_text(path, text)
    return html


def _markdown(head: str, sections: list[Section], html: Path) -> str:
    """The page's text; its pictures are written to ``pictures/`` beside it."""
    pictures = html.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    lines = ["# What was reproduced", "", head]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.note]
        if section.columns:
            lines += ["", f"| {' | '.join(section.columns)} |", f"|{'---|' * len(section.columns)}"]
            lines += [f"| {' | '.join(cell.replace('|', '¦') for cell in row.cells)} |" for row in section.rows]
        for number, (caption, png) in enumerate(section.pictures):
            name = f"{section.title.lower().replace(' ', '-').replace('?', '')}-{number}.png"
            (pictures / name).write_bytes(png)
            lines += ["", f"![{caption}](pictures/{name})", "", f"*{caption}*"]
    return "\n".join(lines) + "\n"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
