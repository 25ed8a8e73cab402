"""Pictures: contact sheets of frames with text, and plots as PNG."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import numpy as np

MARGIN, CELL, TEXT_WIDTH = 4, 96, 260
"""Pixels: between frames, side of a frame, width of the text column."""


def sheet(rows: list[tuple[list[str], list[np.ndarray]]]) -> Any:
    """A PIL image with a row for each of ``rows``: lines of text (wrapped), then RGB frames, uint8 ``(H, W, 3)``."""
    from PIL import Image, ImageDraw, ImageFont

    pitch = CELL + MARGIN
    columns = max((len(frames) for _, frames in rows), default=0)
    picture = Image.new("RGB", (TEXT_WIDTH + columns * pitch + MARGIN, len(rows) * pitch + MARGIN), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for row, (texts, frames) in enumerate(rows):
        lines = [part for line in texts for part in textwrap.wrap(line, 42)]
        pen.multiline_text((MARGIN, MARGIN + row * pitch), "\n".join(lines[:6]), fill="black", font=font)
        for column, frame in enumerate(frames):
            small = Image.fromarray(frame).resize((CELL, CELL))
            picture.paste(small, (TEXT_WIDTH + column * pitch, MARGIN + row * pitch))
    return picture


def figure(panels: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure without a window, and its axes side by side."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5 if panels == 1 else 9, 2.8), layout="constrained")
    return drawn, list(np.atleast_1d(drawn.subplots(1, panels)))


def png(drawn: Any) -> bytes:
    """A figure as the content of a PNG file."""
    out = io.BytesIO()
    drawn.savefig(out, format="png", dpi=110)
    return out.getvalue()
