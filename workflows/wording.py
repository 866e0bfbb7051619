"""How a wrong name is answered, and what is never repeated to whoever gave it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

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
