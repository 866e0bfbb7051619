"""A fact's effects as a heat map: layers across, tokens down, one panel for each kind of state.

Drawn as SVG of few paths, one for each strength of the page's own colour, so that a page can hold
a hundred of them and serves light, dark and print. Knows numbers and token texts; does not know
what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

_CELL, _ROW, _LABEL, _GAP, _HEAD, _FOOT = 5, 17, 122, 14, 20, 18
_STRENGTHS = 12
_LONGEST = 13


def heat_map(
    panels: Mapping[str, Sequence[Sequence[float]]],
    tokens: Sequence[str],
    subject: range,
    *,
    most: float,
    what: str,
) -> Markup:
    """Panels side by side as an `<svg>` element.

    Args:
        panels: By name, effects by layer and then position.
        tokens: The text of each position.
        subject: The positions that are set off from the others.
        most: The value that has the full colour; what is not above zero has none.
        what: The drawing in words.
    """
    layers = len(next(iter(panels.values())))
    cell = max(2, min(_CELL * 30 // layers, 14))
    panel = cell * layers
    width = _LABEL + len(panels) * (panel + _GAP)
    height = _HEAD + _ROW * len(tokens) + _FOOT
    parts = [
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'class="heat" aria-label="{escape(what)}">'
    ]
    for position, token in enumerate(tokens):
        y = _HEAD + _ROW * position + 12
        shown = token.strip() or "\N{OPEN BOX}"
        shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
        kind = "in" if position in subject else "out"
        text = f"{shown}*" if position in subject else shown
        parts.append(
            f'<text x="{_LABEL - 6}" y="{y}" text-anchor="end" class="{kind}">{escape(text)}</text>'
        )
    for number, (name, effects) in enumerate(panels.items()):
        left = _LABEL + number * (panel + _GAP)
        parts.append(f'<text x="{left}" y="13" class="in">{escape(name)}</text>')
        parts += [
            f'<path d="{path}" fill="var(--accent)" fill-opacity="{strength / _STRENGTHS:.2f}"/>'
            for strength, path in _paths(effects, left, cell, most)
        ]
        parts.append(
            f'<rect x="{left}" y="{_HEAD}" width="{panel}" height="{_ROW * len(tokens)}" '
            'fill="none" stroke="var(--rule)"/>'
        )
        bottom = height - 4
        parts.append(f'<text x="{left}" y="{bottom}" class="out">0</text>')
        parts.append(
            f'<text x="{left + panel}" y="{bottom}" text-anchor="end" class="out">{layers - 1}'
            "</text>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def _paths(
    effects: Sequence[Sequence[float]], left: int, cell: int, most: float
) -> list[tuple[int, str]]:
    """The squares of each strength, from 1 to the strongest, as one path."""
    found: dict[int, list[str]] = {}
    for layer, row in enumerate(effects):
        for position, effect in enumerate(row):
            strength = min(_STRENGTHS, math.ceil(_STRENGTHS * effect / most - 0.5))
            if strength > 0:
                x, y = left + layer * cell, _HEAD + position * _ROW
                found.setdefault(strength, []).append(f"M{x} {y}h{cell}v{_ROW}h-{cell}z")
    return [(strength, "".join(found[strength])) for strength in sorted(found)]
