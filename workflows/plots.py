"""Plots as SVG text that takes its font and colours from the page around it.

matplotlib draws with marker colours; those become CSS variables, so that one drawing serves light,
dark and print. Uses no pyplot, so it leaves no global state. Knows numbers, not outcomes' meaning.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memedit.outcome import LayerUpdate, TargetTrace

INK, MUTED, ACCENT, WARM, RULE, PAPER = (f"#00010{i}" for i in range(6))
SERIES = tuple(f"#00011{i}" for i in range(5))
"""Colours for things of one kind; a page that uses them has `--series-0` and so on."""
_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    ACCENT: "var(--accent)",
    WARM: "var(--warm)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    **{marker: f"var(--series-{i})" for i, marker in enumerate(SERIES)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "memedit",
    "font.size": 11.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.labelsize": 11,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11.5,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_FAINT_LINES = 60
"""How many single facts the loss plot shows; more only make it heavy."""


def metrics_plot(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """Before (ring) and after (dot) of each (label, before, after), in percent; one line each."""
    rows = [r for r in rows if r[2] is not None]
    if not rows:
        return ""

    def draw(axes: Axes) -> None:
        for y, (_, before, after) in enumerate(rows):
            assert after is not None
            if before is not None:
                axes.plot([before, after], [y, y], color=MUTED, lw=1.6, alpha=0.55, zorder=1)
                axes.scatter([before], [y], s=38, facecolor=PAPER, edgecolor=MUTED, lw=1.5)
            axes.scatter([after], [y], s=46, color=ACCENT, zorder=3)
            # The figure stands beyond the dot, on the side where the line does not run.
            left = before is not None and after < before
            axes.annotate(
                f"{after:.0f}",
                (after, y),
                (-8 if left else 8, 0),
                textcoords="offset points",
                va="center",
                ha="right" if left else "left",
            )
        axes.set_yticks(range(len(rows)), [r[0] for r in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-4, 110)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)

    return themed_svg(
        "metrics", draw, height=0.55 + 0.42 * len(rows), what="Metrics before and after"
    )


def loss_plot(traces: Sequence[TargetTrace], threshold: float | None) -> str:
    """The z loss by step: median, the middle 80% of the facts, and some single facts faintly.

    A fact that stopped early keeps its last loss, so that the band is always over all facts.
    """
    curves = [[v if math.isfinite(v) else math.nan for v in t.losses] for t in traces if t.losses]
    if not curves:
        return ""
    steps = max(map(len, curves))
    full = [c + [c[-1]] * (steps - len(c)) for c in curves]
    columns = [sorted(v for v in column if v == v and v > 0) for column in zip(*full, strict=True)]
    shown = [i for i, column in enumerate(columns) if column]
    if not shown:
        return ""

    def at(share: float) -> list[float]:
        return [columns[i][round(share * (len(columns[i]) - 1))] for i in shown]

    def draw(axes: Axes) -> None:
        stride = max(1, math.ceil(len(curves) / _FAINT_LINES))
        for curve in curves[::stride]:
            axes.plot(range(len(curve)), curve, color=MUTED, lw=0.6, alpha=0.3)
        axes.fill_between(shown, at(0.1), at(0.9), color=ACCENT, alpha=0.18, lw=0)
        axes.plot(shown, at(0.5), color=ACCENT, lw=2.2)
        if threshold:
            axes.axhline(threshold, color=WARM, lw=1, ls=(0, (4, 3)))
            axes.annotate(
                f"stops under {threshold:g}",
                (0, threshold),
                (0, -4),
                textcoords="offset points",
                va="top",
                color=WARM,
                fontsize=10.5,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axes.minorticks_off()
        axes.set_xlabel("step")
        axes.set_xlim(-0.2, max(steps - 1, 1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
        axes.grid(axis="y")

    return themed_svg("loss", draw, height=2.7, what="z loss by step")


def norms_plot(updates: Sequence[LayerUpdate]) -> str:
    """‖ΔW‖ / ‖W‖ of each edited layer, in percent, as labelled columns."""
    found = [(u.layer, 100 * u.delta_norm / u.weight_norm) for u in updates if u.weight_norm > 0]
    found = [(layer, share) for layer, share in found if math.isfinite(share)]
    if not found:
        return ""

    def draw(axes: Axes) -> None:
        places = axes.bar(range(len(found)), [s for _, s in found], width=0.62, color=ACCENT)
        if len(found) <= 12:
            axes.bar_label(places, [f"{s:.3g}%" for _, s in found], padding=3, color=INK)
            axes.set_yticks([])
        else:
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}%")
            axes.grid(axis="y")
        axes.set_xticks(range(len(found)), [str(layer) for layer, _ in found])
        axes.set_xlim(-0.7, len(found) - 0.3)
        axes.set_xlabel("layer")
        axes.margins(y=0.14)
        axes.tick_params(axis="x", length=0)

    return themed_svg("norms", draw, height=2.7, what="Update norm by layer")


def themed_svg(name: str, draw: Callable[[Axes], None], *, height: float, what: str) -> str:
    """Draw on fresh axes and return an `<svg>` element that stands on its own in a page.

    Args:
        name: Begins every id in the drawing; the page has no other one of this name.
        draw: Uses the colours of this module and no others.
        height: In inches; the width is 5.2.
        what: The drawing in words, as text that needs no escaping.
    """
    with mpl.rc_context({**_STYLE, "svg.id": name}), warnings.catch_warnings():
        # The page's font draws the text, so what this one lacks is not missing.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(5.2, height), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    return _embeddable(text.getvalue(), name, what)


def _embeddable(svg: str, name: str, what: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Ids and the references to them are the drawing's own: several drawings share one page.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    # Font and joins come from the page; a <style> inside would reach out of the drawing.
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    svg = re.sub(r" font-family: [^;\"]+;?", "", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    for marker, variable in _COLOURS.items():
        svg = svg.replace(marker, variable)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]+")[^>]*>',
        rf'<svg \1 xmlns="http://www.w3.org/2000/svg" '
        rf'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{what}">',
        svg,
        count=1,
    )
    return re.sub(r"\n\s*", "\n", svg)
