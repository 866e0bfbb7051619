"""The page of causal tracing: the proposal, mean effects by layer, a heat map for each fact.

Knows the result of `memedit trace` as plain values and the traces that it is made of; does not know
how they were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from memedit.effects import CRITICAL
from memedit.tracing import KINDS
from memedit.writing import whole_file
from workflows.heat_maps import heat_map
from workflows.pages import page_templates
from workflows.plots import ACCENT, INK, MUTED, SERIES, WARM, themed_svg

if TYPE_CHECKING:
    from workflows.trace import Traced

KIND_LABELS = {"hidden": "Hidden states", "mlp": "MLP outputs", "attention": "Attention outputs"}
# (class, label, colour, the same as a CSS variable)
PLACES = (
    ("subject_first", "first subject token", SERIES[1], "--series-1"),
    ("subject_middle", "middle subject tokens", SERIES[2], "--series-2"),
    ("subject_last", "last subject token", ACCENT, "--accent"),
    ("next", "first token after the subject", SERIES[3], "--series-3"),
    ("further", "further tokens", MUTED, "--muted"),
    ("last", "last token", SERIES[4], "--series-4"),
)
SEVERED = (
    ("hidden", "whole model", ACCENT, "--accent"),
    ("mlp_severed", "MLPs severed", WARM, "--warm"),
    ("attention_severed", "attention severed", SERIES[2], "--series-2"),
)
_SHOWN = 6
"""Heat maps that are open; the others are a click away."""


def write_trace_page(
    result: Mapping[str, Any],
    traced: Sequence[Traced],
    path: Path,
) -> None:
    """Write the page, whole or not at all."""
    curves = result["curves"]
    maps = [_fact(each) for each in sorted(traced, key=lambda t: -t.trace.total)]
    text = (
        page_templates()
        .get_template("trace.html.j2")
        .render(
            result=result,
            kinds=[
                (KIND_LABELS[kind], Markup(kind_plot(curves, kind, result["proposal"])))
                for kind in KINDS
            ],
            severed=Markup(severed_plot(curves, result["proposal"])),
            places=[
                (label, variable, found[0]["facts"])
                for name, label, _, variable in PLACES
                if (found := [c for c in curves if c["position"] == name])
            ],
            severed_key=[(label, variable) for _, label, _, variable in SEVERED],
            shown=maps[:_SHOWN],
            more=maps[_SHOWN:],
        )
    )
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _fact(each: Traced) -> dict[str, Any]:
    trace, place = each.trace, each.place
    effects = {KIND_LABELS[kind]: trace.effects_LT[kind].tolist() for kind in KINDS}
    subject = range(place.subject_first, place.subject_last + 1)
    return {
        "prompt": each.request.text,
        "object": each.object.strip(),
        "clean": trace.clean,
        "corrupted": trace.corrupted,
        "map": heat_map(
            effects,
            each.tokens,
            subject,
            most=trace.total,
            what=f"Effects by layer and token: {each.request.text} {each.object.strip()}",
        ),
    }


def kind_plot(
    curves: Sequence[Mapping[str, Any]], kind: str, proposal: Mapping[str, Any] | None
) -> str:
    """The mean effect of one kind of state, one line for each class of positions."""
    found = {c["position"]: c for c in curves if c["kind"] == kind}
    lines = [(found[name], colour) for name, _, colour, _ in PLACES if name in found]
    return _plot(f"trace-{kind}", lines, proposal, f"Mean effect of {KIND_LABELS[kind]} by layer")


def severed_plot(curves: Sequence[Mapping[str, Any]], proposal: Mapping[str, Any] | None) -> str:
    """Hidden states of the subject's last token: with the whole model, and with parts severed."""
    found = {c["kind"]: c for c in curves if c["position"] == CRITICAL}
    lines = [(found[kind], colour) for kind, _, colour, _ in SEVERED]
    return _plot("trace-severed", lines, proposal, "Mean effect with parts severed by layer")


def _plot(
    name: str,
    lines: Sequence[tuple[Mapping[str, Any], str]],
    proposal: Mapping[str, Any] | None,
    what: str,
) -> str:
    def draw(axes: Axes) -> None:
        layers = range(len(lines[0][0]["mean"]))
        if proposal is not None:
            first, last = proposal["layers"][0], proposal["layers"][-1]
            axes.axvspan(first - 0.5, last + 0.5, color=MUTED, alpha=0.14, lw=0)
        for curve, colour in lines:
            low, high = ([100 * v for v in curve[bound]] for bound in ("low", "high"))
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
        for curve, colour in lines:
            axes.plot(
                layers,
                [100 * v for v in curve["mean"]],
                color=colour,
                lw=2.4 if curve["position"] == CRITICAL else 1.5,
            )
        axes.axhline(0, color=INK, lw=0.6)
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axes.set_xlabel("layer")
        axes.set_ylabel("points of probability")
        axes.grid(axis="y")

    return themed_svg(name, draw, height=2.9, what=what)
