"""Quality gates: `score>=80` refuses to publish below it.

A gate may speak of a group of facts (`all.efficacy>=95`) and compare with another model
(`perplexity<=base*1.1`, `score>=previous-2`). Knows the syntax and the comparison; does not know
how a metric is measured (`memedit.evaluate`).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memedit.errors import InputError
from memedit.outcome import METRIC_KEYS
from workflows.wording import did_you_mean

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CHANGE: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}
GROUPS = ("", "new", "all")
"""Which facts a metric is of: all that were judged, those that are new, those drawn from all."""
MODELS = ("base", "previous")
"""With what a gate may compare: the base model, and the version before."""
_SYNTAX = re.compile(
    r"\s*(?:(\w+)\.)?(\w+)\s*(>=|<=|>|<)\s*"
    r"(?:([A-Za-z]\w*)\s*(?:([-+*])\s*([.\w]+))?|([-+.\w]+))\s*"
)
_NOT_A_MODEL = ("inf", "infinity", "nan")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition on the metrics of the edited model.

    The bound is `value`, or with `model` the metric of that model, changed by `value` as `change`
    says.
    """

    metric: str
    op: str
    value: float
    group: str = ""
    model: str | None = None
    change: str = "+"

    def __str__(self) -> str:
        bound = f"{self.value:g}"
        if self.model is not None:
            bound = self.model + (f"{self.change}{self.value:g}" if self._changes else "")
        return f"{self.name}{self.op}{bound}"

    @property
    def name(self) -> str:
        """The metric with its group."""
        return f"{self.group}.{self.metric}" if self.group else self.metric

    @property
    def _changes(self) -> bool:
        return (self.change, self.value) != ("+", 0.0)

    def bound(self, models: Mapping[str, Mapping[str, float | None]] | None = None) -> float | None:
        """What the metric is compared with; None where the model to compare with has no such value.

        Args:
            models: See `check`.
        """
        if self.model is None:
            return self.value
        other = (models or {}).get(self.model, {}).get(self.name)
        if other is None or not math.isfinite(other):
            return None
        return _CHANGE[self.change](other, self.value)

    def check(
        self,
        metrics: Mapping[str, float | None],
        models: Mapping[str, Mapping[str, float | None]] | None = None,
    ) -> str | None:
        """Why the gate is not met, or None. A metric that was not measured does not meet it.

        Args:
            metrics: Of the edited model, by `name`.
            models: The same of the models to compare with; one that is not there, as the version
                before the first, is not compared with.
        """
        found = metrics.get(self.name)
        if found is None or not math.isfinite(found):
            return f"gate {self}: {self.name} was not measured"
        if self.model is not None and self.model not in (models or {}):
            return None
        bound = self.bound(models)
        if bound is None:
            return f"gate {self}: {self.name} of {self.model} was not measured"
        if _COMPARE[self.op](found, bound):
            return None
        than = "" if self.model is None else f", and must be {self.op}{bound:.4g}"
        return f"gate {self} is not met: {self.name} is {found:.4g}{than}"


def parse_gate(text: str) -> Gate:
    """`"score>=80"` as a `Gate`.

    Raises:
        InputError: the syntax, the metric or the number is wrong.
    """
    match = _SYNTAX.fullmatch(text)
    if match is None:
        raise InputError(f"not a gate: {text!r}; write METRIC>=NUMBER, such as score>=80")
    group, metric, op, model, change, amount, number = match.groups()
    if metric not in METRIC_KEYS:
        raise InputError(f"no metric {metric!r}{did_you_mean(metric, METRIC_KEYS)}")
    if group is not None and group not in GROUPS:
        raise InputError(f"no group of facts {group!r}{did_you_mean(group, GROUPS[1:])}")
    if model is not None and model.lower() in _NOT_A_MODEL:
        model, number = None, model
    if model is not None and model not in MODELS:
        known = did_you_mean(model, MODELS)
        raise InputError(f"neither a number nor a model in the gate {text!r}: {model!r}{known}")
    if model is not None:
        number = amount or "0"
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"not a number in the gate {text!r}: {number}")
    return Gate(
        metric=metric, op=op, value=value, group=group or "", model=model, change=change or "+"
    )
