"""HTML pages from jinja2 template files; every page extends ``templates/base.html`` and so shares one style."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).resolve().parent / "templates"
PLAYABLE = (".mp4", ".m4v", ".webm", ".mov", ".ogv")
"""Endings of files that browsers may play; pages fall back to the frames where one cannot."""


def render_page(template: str, *, folder: Path | None = None, **values: Any) -> str:
    """One self-contained HTML page.

    Args:
        template: file name of the template.
        folder: directory of a caller's own templates, searched first; they may extend ``base.html`` too.
        values: the template's variables. Every value is escaped; one that the template names and the caller does not
            give is an error (``jinja2.UndefinedError``).
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folders = [TEMPLATES] if folder is None else [folder, TEMPLATES]
    environment = Environment(
        autoescape=True, loader=FileSystemLoader(folders), undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values)


def inline_script(*names: str) -> tuple[Any, str]:
    """The text of templates ``names`` for a ``<script>`` element, and the source expression that a policy allows it by.

    With a Content-Security-Policy that has this expression, no other script in the page runs.
    """
    from markupsafe import Markup

    text = "\n" + "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)
    assert "</script" not in text and "<!--" not in text
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"'sha256-{digest}'"
