"""One edit, published whole and as a delta, for the tests of `memedit apply`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from memedit.manifest import MANIFEST_NAME
from tests.tiny import save_tiny
from tests.workflows.runs import (
    PLAIN,
    Ran,
    contents,
    memedit,
    quick,
    setting,
    without_plots,
    write_rows,
)

QUICK = setting("targets.steps=4", "evaluation.heldout_tokens=0", "evaluation.drift_prompts=20")


@dataclass(frozen=True, kw_only=True)
class Made:
    """One edit, published both ways."""

    base: Path
    facts: Path
    cache: Path
    full: Path
    delta: Path
    results: dict[str, Any]

    def edit(self, out: object, *more: object, model: object = None) -> Ran:
        flags = quick(str(model or self.base), self.cache)
        return memedit("edit", *flags, *PLAIN, *QUICK, "--facts", self.facts, "--out", out, *more)

    def apply(self, out: object, *more: object, delta: object = None) -> Ran:
        return memedit(
            "apply", delta or self.delta, "--out", out, "--cache", self.cache, "--json", *more
        )


def make(folder: Path, family: str, rows: Iterable[Mapping[str, Any]]) -> Made:
    torch.set_num_threads(1)
    made = Made(
        base=save_tiny(folder / "base", family),
        facts=write_rows(folder / "facts.jsonl", rows),
        cache=folder / "cache",
        full=folder / "full",
        delta=folder / "delta",
        results={},
    )
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        for kind in ("full", "delta"):
            ran = made.edit(folder / kind, "--format", kind)
            assert ran.code == 0, ran.stderr
            made.results[kind] = ran.result
    return made


def published(folder: Path) -> dict[str, bytes]:
    """All but what names places, times and formats."""
    own = (MANIFEST_NAME, "report.html")
    return {name: content for name, content in contents(folder).items() if name not in own}
