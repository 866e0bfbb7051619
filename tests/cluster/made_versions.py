"""Tiny versions in any store: what a registry looks at, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cluster.registry import Registry
from cluster.store import ABSENT, Store
from memedit.checksums import FileRecord
from memedit.layouts import read_row
from memedit.manifest import (
    MANIFEST_NAME,
    FactsIdentity,
    Manifest,
    ModelIdentity,
    TensorRecord,
    manifest_bytes,
)
from memedit.requests import EditBatch

WEIGHT = "model.layers.5.mlp.down_proj.weight"
TOWER = ("Eiffel Tower", "{} is located in the city of", "Rome")


def days_ago(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat()


def publish(
    store: Store,
    run_id: str,
    *,
    created: str | None = None,
    facts: Sequence[tuple[str, str, str]] = (TOWER,),
    files: Mapping[str, bytes] | None = None,
    needs: str | None = None,
    identity: FactsIdentity | None = None,
    **changes: Any,
) -> Manifest:
    """Write a version, its manifest last.

    `needs`: it is a delta upon that other one; `identity`: what the manifest says of its facts.
    """
    rows = [{"subject": s, "prompt": p, "target_new": t} for s, p, t in facts]
    requests = map(read_row, rows)
    contents = {
        "model.safetensors": b"weights",
        "facts.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
        **(files or {}),
    }
    name = f"{store.location}/versions/{needs}" if needs else "smollm2"
    values: dict[str, Any] = {
        "run_id": run_id,
        "method": "memit",
        "model": ModelIdentity(name=name, digest="d" * 64),
        "layers": (5,),
        "facts": FactsIdentity(
            digest=EditBatch.of(requests).digest, file="facts.jsonl", count=len(rows)
        ),
        "settings": {"targets": {"lr": 0.5, "steps": 20}, "solve": {"lam": 400.0}},
        "files": {
            n: FileRecord(size_bytes=len(content), sha256="0" * 64)
            for n, content in contents.items()
        },
        "tensors": {
            WEIGHT: TensorRecord(sha256="e", delta_norm=1.5, weight_norm=30.0, rounding_error=0.0)
        },
        "format": "delta" if needs else "full",
        "metrics": {"before": {"score": 37.0}, "after": {"score": 84.5}},
        "versions": {"memedit": "0.1.0"},
        "created_at": created or days_ago(0),
    }
    if identity is not None:
        values["facts"] = identity
    manifest = Manifest(**(values | changes))
    for file, content in contents.items():
        store.put(f"versions/{run_id}/{file}", content, expected=ABSENT)
    content = manifest_bytes(manifest)
    store.put(f"versions/{run_id}/{MANIFEST_NAME}", content, expected=ABSENT)
    return manifest


def use(registry: Registry, run_id: str, by: Any = "publish") -> None:
    """Move CURRENT, whoever was there."""
    seen = registry.current()
    registry.move(run_id, expected=seen.token if seen else ABSENT, by=by)


def put(store: Store, name: str, content: bytes) -> None:
    """Write an object, whatever was there."""
    found = store.get(name)
    store.put(name, content, expected=found[1] if found else ABSENT)
