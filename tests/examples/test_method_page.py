"""docs/method.md and metrics.md map equations to functions: each name in them has to be there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from memedit.config import EvaluationSettings
from memedit.outcome import METRIC_KEYS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("method.md", "metrics.md")
PACKAGES = ("memedit", "cluster", "workflows")
NAME = re.compile(r"`((?:(?:cluster|workflows)\.)?[a-z_]+(?:\.[A-Za-z_]\w*)+)`")


# Fields of rows and files, which look alike.
NOT_FUNCTIONS = {"requested_rewrite.relation_id"}
FILES = (".md", ".json", ".parquet", ".html")


def names(*pages: str) -> list[str]:
    texts = ((DOCS / page).read_text(encoding="utf-8") for page in pages or PAGES)
    found = {name for text in texts for name in NAME.findall(text)} - NOT_FUNCTIONS
    return sorted(name for name in found if not name.endswith(FILES))


def test_the_page_names_functions_of_every_step() -> None:
    modules = {name.split(".")[0] for name in names("method.md")}
    assert {"prompts", "moments", "targets", "keys", "solve", "stages", "patching"} <= modules


def test_the_page_of_metrics_has_all_of_them() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    for key in METRIC_KEYS:
        stem = f"…_{key.rpartition('_')[2]}"
        assert f"| `{key}` |" in text or f"| `{stem}` |" in text, key


@pytest.mark.parametrize("name", names())
def test_what_the_page_names_exists(name: str) -> None:
    first, _, setting = name.partition(".")
    if first == "evaluation":  # the section; `memedit.evaluate` is the module
        assert setting in EvaluationSettings.__dataclass_fields__, f"{name}: no such setting"
        return
    path = name if first in PACKAGES else f"memedit.{name}"
    package, module, first, *rest = path.split(".")
    found = importlib.import_module(f"{package}.{module}")
    assert hasattr(found, first), f"{name}: no {first} in {package}/{module}.py"
    owner = getattr(found, first)
    for part in rest:
        fields = getattr(owner, "__dataclass_fields__", {})
        assert hasattr(owner, part) or part in fields, f"{name}: no {part}"
        owner = getattr(owner, part, None)
