"""docs/method.md maps equations to functions: each name in it has to be there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "method.md"
PACKAGES = ("memedit", "cluster", "workflows")
NAME = re.compile(r"`((?:(?:cluster|workflows)\.)?[a-z_]+(?:\.[A-Za-z_]\w*)+)`")


def names() -> list[str]:
    return sorted(set(NAME.findall(PAGE.read_text(encoding="utf-8"))) - {"glossary.md"})


def test_the_page_names_functions_of_every_step() -> None:
    modules = {name.split(".")[0] for name in names()}
    assert {"prompts", "moments", "targets", "keys", "solve", "stages", "patching"} <= modules


@pytest.mark.parametrize("name", names())
def test_what_the_page_names_exists(name: str) -> None:
    path = name if name.split(".")[0] in PACKAGES else f"memedit.{name}"
    package, module, first, *rest = path.split(".")
    found = importlib.import_module(f"{package}.{module}")
    assert hasattr(found, first), f"{name}: no {first} in {package}/{module}.py"
    owner = getattr(found, first)
    for part in rest:
        fields = getattr(owner, "__dataclass_fields__", {})
        assert hasattr(owner, part) or part in fields, f"{name}: no {part}"
        owner = getattr(owner, part, None)
