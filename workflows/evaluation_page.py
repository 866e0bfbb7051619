"""The page of an evaluation: whether a model says its facts, and what it has lost against its base.

Turns what `memedit evaluate` has found into what `templates/evaluation.html.j2` shows, with the
macros of an edit's report; does not know how it was found.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from memedit.writing import whole_file
from workflows.findings import failures
from workflows.judged_rows import judged_rows, judged_templates, timings_rows
from workflows.judgements import FACTS_TABLE_NAME
from workflows.wording import plural

if TYPE_CHECKING:
    from workflows.evaluate import Evaluated


def write_evaluation(found: Evaluated, path: Path) -> None:
    """Write the page of an evaluation, whole or not at all."""
    text = render_evaluation(found)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def render_evaluation(found: Evaluated) -> str:
    """The page as text."""
    before = () if found.before is None else found.before.facts
    failed = failures(before, found.after.facts)
    return (
        judged_templates()
        .get_template("evaluation.html.j2")
        .render(
            judged_rows(found.before, found.after, failed, changes=found.changes),
            found=found,
            verdict=found.verdict,
            facts=plural(found.facts.accepted, "fact"),
            facts_table=FACTS_TABLE_NAME,
            timings=timings_rows(found.timings_s),
        )
    )
