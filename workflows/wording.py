"""Numbers and settings in words, the answer to a wrong name, and what is never repeated."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_KEYS = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*:/+)[^\s/:@]*:[^\s@]*@")
"""User and secret in a location; a secret of AWS may hold slashes."""


def did_you_mean(wrong: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'steps'? Allowed: lr, steps"`, to put after the complaint."""
    names = sorted(allowed)
    near = difflib.get_close_matches(wrong, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Allowed: {', '.join(names)}"


def without_keys(text: str) -> str:
    """`text` with *** for the user and the secret that somebody put into a location."""
    return _KEYS.sub(r"\1***@", text)


def plural(count: int, noun: str) -> str:
    """`1 fact`, `1,200 facts`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


SETTING_NAMES = {
    "layers": "layers",
    "lam": "λ",
    "weight": "protect weight",
    "lr": "learning rate",
    "steps": "steps",
    "clamp": "clamp",
}
"""What a person calls a setting that is searched."""


def setting_text(value: Any) -> str:
    """A setting for reading; layers as `5-9` where they are a run."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return layers_text(value).partition(" ")[2]
    return f"{value:,g}" if abs(value) < 1e6 else f"{value:.3g}"


def layers_text(layers: Iterable[int]) -> str:
    """`layers 5-9` for a run of layers, `layers 3, 5, 8` otherwise."""
    found = list(layers)
    if len(found) == 1:
        return f"layer {found[0]}"
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"layers {found[0]}\N{EN DASH}{found[-1]}"
    return "layers " + ", ".join(map(str, found))
