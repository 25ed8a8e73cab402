"""HTML pages from jinja2 template files; every page extends ``templates/base.html`` and so shares one style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).resolve().parent / "templates"


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
