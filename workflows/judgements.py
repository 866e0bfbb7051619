"""The judgements of single facts: as a table in Parquet, and gathered by relation.

A relation is the data set's relation id where it has one, and the facts' template otherwise. Knows
judgements; does not know how they are made (`memedit.evaluate`) or how a page shows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memedit.evaluate import evaluation_of
from memedit.outcome import FactResult
from memedit.writing import whole_file
from workflows.wording import plural

FACTS_TABLE_NAME = "facts.parquet"

Labels = Mapping[str, str | int]


def write_judgements(path: Path, groups: Iterable[tuple[Labels, Sequence[FactResult]]]) -> None:
    """Write judgements as Parquet, one fact a row, whole or not at all.

    Args:
        path: The file.
        groups: What several judgements of the same facts are told apart by (the same names in each
            group, such as the method), which become columns; and the judgements.
    """
    groups = iter(groups)
    first = next(groups, ({}, ()))
    schema = _schema(first[0])
    with whole_file(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for labels, facts in chain([first], groups):
            for start in range(0, len(facts), _FACTS_AT_ONCE):
                some = facts[start : start + _FACTS_AT_ONCE]
                columns = {name: [value] * len(some) for name, value in labels.items()} | {
                    name: [getattr(fact, name) for fact in some] for name in _FIELDS
                }
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))


_FACTS_AT_ONCE = 2000
"""How many are held as columns, so that memory does not grow with the facts."""
_FIELDS = FactResult.__annotations__
_KINDS = {
    "str": pa.string(),
    "bool": pa.bool_(),
    "float": pa.float64(),
    "tuple[bool, ...]": pa.list_(pa.bool_()),
    "tuple[float, ...]": pa.list_(pa.float64()),
    "tuple[str, ...]": pa.list_(pa.string()),
}


def _schema(labels: Labels) -> pa.Schema:
    fields = [(name, pa.array([value]).type) for name, value in labels.items()]
    for name, kind in _FIELDS.items():
        fields.append((name, _KINDS[kind.removesuffix(" | None")]))
    return pa.schema(fields)


@dataclass(frozen=True, kw_only=True)
class RelationMetrics:
    """How the facts of one relation fare, or those of several together."""

    relation: str
    """Empty where there are several."""
    relations: int = 1
    facts: int
    metrics: Mapping[str, float]
    """Those that were measured, by `memedit.outcome.METRIC_KEYS`."""
    intervals: Mapping[str, tuple[float, float]]

    @property
    def name(self) -> str:
        """For a person."""
        return self.relation or plural(self.relations, "other relation")

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "relation": self.relation,
            "relations": self.relations,
            "facts": self.facts,
            "metrics": dict(self.metrics),
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
        }


def relation_metrics(
    facts: Sequence[FactResult], *, most: int | None = None
) -> list[RelationMetrics]:
    """The metrics of each relation with their intervals, those with the most facts first.

    Args:
        facts: The judgements.
        most: Where there are more relations, the rest is taken together as one at the end.
    """
    found: dict[str, list[FactResult]] = {}
    for fact in facts:
        found.setdefault(fact.relation, []).append(fact)
    groups = sorted(found.items(), key=lambda group: (-len(group[1]), group[0]))
    if most is None or len(groups) <= most:
        return [_metrics_of(name, 1, group) for name, group in groups]
    others = [fact for _, group in groups[most:] for fact in group]
    rows = [_metrics_of(name, 1, group) for name, group in groups[:most]]
    return [*rows, _metrics_of("", len(groups) - most, others)]


def _metrics_of(relation: str, relations: int, facts: Sequence[FactResult]) -> RelationMetrics:
    found = evaluation_of(facts, {})
    return RelationMetrics(
        relation=relation,
        relations=relations,
        facts=len(facts),
        metrics={name: value for name, value in found.metrics.items() if value is not None},
        intervals=found.intervals,
    )
