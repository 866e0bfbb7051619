"""Quality gates: `score>=80` refuses to publish below it.

Knows the syntax and the comparison; does not know how a metric is measured (`memedit.evaluate`).
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
_SYNTAX = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+.\w]+)\s*")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition on the metrics of the edited model."""

    metric: str
    op: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric}{self.op}{self.value:g}"

    def check(self, metrics: Mapping[str, float | None]) -> str | None:
        """Why the gate is not met, or None. A metric that was not measured does not meet it."""
        found = metrics.get(self.metric)
        if found is None or not math.isfinite(found):
            return f"gate {self}: {self.metric} was not measured"
        if _COMPARE[self.op](found, self.value):
            return None
        return f"gate {self} is not met: {self.metric} is {found:.4g}"


def parse_gate(text: str) -> Gate:
    """`"score>=80"` as a `Gate`.

    Raises:
        InputError: the syntax, the metric or the number is wrong.
    """
    match = _SYNTAX.fullmatch(text)
    if match is None:
        raise InputError(f"not a gate: {text!r}; write METRIC>=NUMBER, such as score>=80")
    metric, op, number = match.groups()
    if metric not in METRIC_KEYS:
        raise InputError(f"no metric {metric!r}{did_you_mean(metric, METRIC_KEYS)}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"not a number in the gate {text!r}: {number}")
    return Gate(metric=metric, op=op, value=value)
