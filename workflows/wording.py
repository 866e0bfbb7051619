"""How a wrong name is answered: with the nearest right one, and with all that are allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(wrong: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'steps'? Allowed: lr, steps"`, to put after the complaint."""
    names = sorted(allowed)
    near = difflib.get_close_matches(wrong, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Allowed: {', '.join(names)}"
