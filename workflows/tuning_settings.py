"""The job of a search for settings, as data; see `workflows.settings`."""

from __future__ import annotations

from dataclasses import dataclass

from memedit.config import ONE_LAYER
from memedit.errors import InputError
from memedit.outcome import METRIC_KEYS
from workflows.fields import option
from workflows.gates import Gate, parse_gate
from workflows.settings import FactsJob, StoringJob, check_gates_of_one_edit
from workflows.wording import did_you_mean


@dataclass(frozen=True, kw_only=True)
class TuneJob(FactsJob, StoringJob):
    """`memedit tune`: search the settings that fit a model."""

    trials: int = option(
        24, "Try at most so many settings.", group="Method", metavar="N", at_least=1
    )
    budget_s: float | None = option(
        None,
        "Begin no trial after so many seconds of search; the judgement of what was found comes on"
        " top.",
        group="Method",
        metavar="S",
        at_least=0,
    )
    objective: str = option(
        "score",
        "The metric to search for; between settings that do not differ in it, exact efficacy"
        " decides, then drift.",
        group="Method",
        metavar="METRIC",
    )
    search: str | None = option(
        None,
        "What to search, with commas: lam, layers, weight (of protected keys), lr, steps, clamp;"
        " the rest stays as the job sets it. [default: all that the method has]",
        group="Method",
        metavar="NAMES",
    )
    gate: tuple[str, ...] = option(
        (),
        "Choose only settings with which this holds, such as 'perplexity<=base*1.1'; repeatable.",
        group="Method",
        metavar="GATE",
    )
    out: str = option(
        None,
        "Folder or s3:// prefix for the settings file, the table of trials and the page; new or"
        " empty.",
        group="Output",
        metavar="PLACE",
        required=True,
        location="path",
    )

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates, parsed."""
        return tuple(parse_gate(text) for text in self.gate)

    @property
    def searched(self) -> tuple[str, ...]:
        """What is searched; none where that is left to the method."""
        names = dict.fromkeys(name.strip() for name in (self.search or "").split(","))
        return tuple(name for name in names if name)

    def check(self) -> None:
        """See `Job`: there is such a method and such a metric, and what a gate speaks of."""
        if self.method in ONE_LAYER:
            raise InputError(
                f"{self.method} has nothing that is searched; it is there to be compared with",
                field="method",
            )
        if self.objective not in METRIC_KEYS:
            known = did_you_mean(self.objective, METRIC_KEYS)
            raise InputError(f"no metric {self.objective!r}{known}", field="objective")
        check_gates_of_one_edit(self.gates)
