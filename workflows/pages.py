"""How pages are made of templates: every text is escaped, and nothing that is missing passes."""

from __future__ import annotations

import jinja2


def page_templates() -> jinja2.Environment:
    """The templates of this package for HTML."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("workflows", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
