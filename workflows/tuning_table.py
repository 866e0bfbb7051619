"""Everything that a search has tried, as a Parquet table: one row a trial.

Knows the result of `memedit tune` as plain values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memedit.outcome import METRIC_KEYS
from memedit.writing import whole_file

TRIALS_NAME = "trials.parquet"

_SCHEMA = pa.schema(
    [
        ("half", pa.string()),
        ("trial", pa.int64()),
        ("moved", pa.string()),
        ("settings", pa.string()),
        ("chosen", pa.bool_()),
        ("layers", pa.list_(pa.int64())),
        ("lam", pa.float64()),
        ("weight", pa.float64()),
        ("lr", pa.float64()),
        ("steps", pa.int64()),
        ("clamp", pa.float64()),
        *((name, pa.float64()) for name in METRIC_KEYS),
        *((f"{name}_{end}", pa.float64()) for name in METRIC_KEYS for end in ("low", "high")),
        ("seconds", pa.float64()),
        ("z_found", pa.int64()),
        ("z_reused", pa.int64()),
        ("failed", pa.string()),
    ]
)


def write_trials(result: Mapping[str, Any], path: Path) -> None:
    """Write the trials on the first half, then what was judged on the second (`half` says which).

    `settings` says whose settings a row has: those that were tried, those of the start, or those
    that were chosen; where the start was chosen, it was judged once and has both rows.
    A column of `_low` and `_high` is a 95% interval; settings that the method lacks are null.
    """
    with whole_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(_rows(result)), schema=_SCHEMA), partial)


def _rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    judged = [
        ("tuning", "tried", trial["trial"] == result["trial"], trial) for trial in result["trials"]
    ]
    judged += [
        ("heldout", whose, whose == "chosen", trial) for whose, trial in result["heldout"].items()
    ]
    for half, whose, chosen, trial in judged:
        row = {name: trial[name] for name in ("trial", "moved", "seconds", "failed")}
        row |= {name: trial[name] for name in ("z_found", "z_reused")}
        row |= trial["settings"] | (trial["metrics"] or {})
        for name, (low, high) in trial["intervals"].items():
            row |= {f"{name}_low": low, f"{name}_high": high}
        yield {"half": half, "settings": whose, "chosen": chosen, **row}
