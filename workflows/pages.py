"""How pages are made of templates: every text is escaped, and nothing that is missing passes."""

from __future__ import annotations

import jinja2

from workflows.wording import layers_text

SHOWN_CHARACTERS = 160
"""Of a continuation, a prompt or a template."""


def page_templates() -> jinja2.Environment:
    """The templates of this package for HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("workflows", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cut": cut, "layers_text": layers_text}
    return environment


def cut(text: str) -> str:
    """A text on one line, without what is too much for a table."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1].rstrip() + "…"
