"""The page of a search for settings: the verdict, the settings that moved, everything tried.

Knows the result of `memedit tune` as plain values; does not know how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from memedit.writing import whole_file
from workflows.metrics import METRIC, METRICS, interval_text
from workflows.pages import page_templates
from workflows.plots import ACCENT, INK, MUTED, PAPER, themed_svg
from workflows.progress import duration
from workflows.wording import SETTING_NAMES, setting_text

_HEADLINES = {
    "better": "Better settings were found.",
    "same": "No difference that these facts can show.",
    "worse": "What was found does not hold on other facts.",
}
_FIGURES = ("score", "efficacy_exact", "neighbourhood", "drift_kl", "perplexity")
_SHOWN = ("efficacy_exact", "paraphrase", "neighbourhood", "drift_kl", "perplexity")


def write_tuning(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of a search, whole or not at all."""
    objective = METRIC[result["objective"]]
    first, last = (result["heldout"][name] for name in ("start", "chosen"))
    unmoved = result["start"] == result["chosen"]
    judged = [m for m in METRICS if (last["metrics"] or {}).get(m.key) is not None]
    shown = [METRIC[key] for key in dict.fromkeys((objective.key, *_SHOWN))]
    text = (
        page_templates()
        .get_template("tuning.html.j2")
        .render(
            result=result,
            objective=objective,
            headline="Nothing better was found."
            if unmoved
            else _HEADLINES[result["verdict"]["tone"]],
            figures=[
                _judged(METRIC[key], first, last, result["base"]["heldout"])
                for key in dict.fromkeys((objective.key, *_FIGURES))
                if METRIC[key] in judged
            ],
            metrics=[_judged(m, first, last, result["base"]["heldout"]) for m in judged],
            settings=[
                {
                    "name": SETTING_NAMES[name],
                    "start": setting_text(value),
                    "chosen": setting_text(result["chosen"][name]),
                    "moved": value != result["chosen"][name],
                    "searched": name in result["searched"],
                }
                for name, value in result["start"].items()
            ],
            names=[SETTING_NAMES[name] for name in result["start"]],
            shown=[
                m
                for m in shown
                if any((t["metrics"] or {}).get(m.key) is not None for t in result["trials"])
            ],
            trials=[_trial(trial, result["trial"]) for trial in result["trials"]],
            plot=Markup(trials_plot(result["trials"], objective.key, result["trial"])),
            took=duration(sum(trial["seconds"] for trial in result["trials"])),
            reused=sum(trial["z_reused"] for trial in result["trials"]),
            found=sum(trial["z_found"] for trial in result["trials"]),
        )
    )
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _judged(
    metric: Any, first: Mapping[str, Any], last: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    old, new = ((side["metrics"] or {}).get(metric.key) for side in (first, last))
    change, tone = metric.change(old, new)
    return {
        "metric": metric,
        "base": metric.show(base.get(metric.key)),
        "start": metric.show(old),
        "start_interval": _interval(first, metric.key),
        "chosen": metric.show(new),
        "chosen_interval": _interval(last, metric.key),
        "change": change.replace("-", "\N{MINUS SIGN}"),
        "tone": tone,
    }


def _interval(side: Mapping[str, Any], key: str) -> str:
    return interval_text(side["intervals"].get(key)).replace("-", "\N{EN DASH}")


def _trial(trial: Mapping[str, Any], chosen: int) -> dict[str, Any]:
    found = trial["metrics"] or {}
    return {
        **trial,
        "settings": [setting_text(value) for value in trial["settings"].values()],
        "moved": SETTING_NAMES.get(trial["moved"], ""),
        "names": [SETTING_NAMES[name] for name in trial["settings"]],
        "metrics": {m.key: m.show(found.get(m.key)) for m in METRICS},
        "intervals": {m.key: _interval(trial, m.key) for m in METRICS},
        "took": duration(trial["seconds"]),
        "chosen": trial["trial"] == chosen,
    }


def trials_plot(trials: Sequence[Mapping[str, Any]], key: str, chosen: int) -> str:
    """The objective of each trial with its 95% interval, and the best so far as a line."""
    metric = METRIC[key]
    found = [
        (trial["trial"], trial["metrics"][key], trial["intervals"].get(key))
        for trial in trials
        if (trial["metrics"] or {}).get(key) is not None
    ]
    if not found:
        return ""
    best, steps = found[0][1], []
    for _, value, _ in found:
        best = max(best, value) if metric.higher_is_better else min(best, value)
        steps.append(best)

    def draw(axes: Axes) -> None:
        axes.step([n for n, _, _ in found], steps, where="post", color=ACCENT, lw=1.6)
        for number, value, interval in found:
            if interval is not None:
                axes.plot([number] * 2, interval, color=MUTED, lw=1.0, alpha=0.55)
            if number == chosen:
                axes.scatter([number], [value], s=52, color=ACCENT, zorder=3)
            else:
                axes.scatter(
                    [number], [value], s=30, facecolor=PAPER, edgecolor=MUTED, lw=1.4, zorder=2
                )
        axes.set_xlabel("trial", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")

    return themed_svg("trials", draw, height=3.0, what=f"{metric.label} by trial")
