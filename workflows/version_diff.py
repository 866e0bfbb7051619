"""What differs between two versions: facts, updates, metrics, settings, base.

Everything comes from the manifests and the tables of facts; no weight is read. Knows neither
registries nor terminals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from memedit.errors import InputError
from memedit.files import File, Files
from memedit.layouts import read_row
from memedit.manifest import Manifest, TensorRecord
from memedit.outcome import METRIC_KEYS
from memedit.requests import EditRequest, Provenance, comparable


def read_version_facts(files: Files, manifest: Manifest) -> tuple[EditRequest, ...]:
    """The facts of a version, from the table that its manifest names.

    Raises:
        InputError: There is no such table in the version, or it is damaged.
    """
    name = manifest.facts.file
    if name not in manifest.files:  # whose names were checked to stay in the folder
        raise InputError(
            f"its table of facts, {name!r}, is none of its files", source=files.location
        )
    file = File(files, name)
    requests = []
    for number, line in enumerate(bytes(files.read(name)).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}", source=file, row=number) from error
        requests.append(read_row(row, provenance=Provenance(source=str(file), row=number)))
    return tuple(requests)


def diff_facts(old: tuple[EditRequest, ...], new: tuple[EditRequest, ...]) -> dict[str, Any]:
    """Facts added, removed, and changed: the same subject and prompt with another new object.

    Texts are compared as `memedit.requests.resolve` compares them. Sorted by subject.
    """
    before, after = ({_question(r): r for r in requests} for requests in (old, new))
    both = [(before[key], after[key]) for key in before.keys() & after.keys()]
    changed = [
        (was, now) for was, now in both if comparable(was.target_new) != comparable(now.target_new)
    ]
    return {
        "added": [_row(after[key]) for key in sorted(after.keys() - before.keys())],
        "removed": [_row(before[key]) for key in sorted(before.keys() - after.keys())],
        "changed": [
            {
                "id": now.case_id,
                "subject": now.subject,
                "prompt": now.prompt,
                "old": was.target_new,
                "new": now.target_new,
            }
            for was, now in sorted(changed, key=lambda pair: _question(pair[1]))
        ],
        "same": len(both) - len(changed),
    }


def _question(request: EditRequest) -> tuple[str, str]:
    return comparable(request.subject), comparable(request.prompt)


def _row(request: EditRequest) -> dict[str, str]:
    return {
        "id": request.case_id,
        "subject": request.subject,
        "prompt": request.prompt,
        "target_new": request.target_new,
    }


def diff_updates(old: Manifest, new: Manifest) -> list[dict[str, Any]]:
    """How far each edited weight was moved, in both versions; None where it was not edited."""
    names = [*old.tensors, *(name for name in new.tensors if name not in old.tensors)]
    return [
        {"weight": name, "old": _norms(old.tensors.get(name)), "new": _norms(new.tensors.get(name))}
        for name in names
    ]


def _norms(record: TensorRecord | None) -> dict[str, float | None] | None:
    if record is None:
        return None
    relative = record.delta_norm / record.weight_norm if record.weight_norm else None
    return {"delta_norm": record.delta_norm, "relative": relative}


def norms(manifest: Manifest) -> list[dict[str, Any]]:
    """How far each edited weight was moved."""
    return [{"weight": n, **(_norms(record) or {})} for n, record in manifest.tensors.items()]


def diff_metrics(old: Manifest, new: Manifest) -> list[dict[str, Any]]:
    """Every metric that any of the two has, before and after the edit of each."""
    rows = []
    for key in METRIC_KEYS:
        row = {
            name: {when: manifest.metrics.get(when, {}).get(key) for when in ("before", "after")}
            for name, manifest in (("old", old), ("new", new))
        }
        if any(value is not None for measured in row.values() for value in measured.values()):
            rows.append({"metric": key, **row})
    return rows


def diff_settings(old: Manifest, new: Manifest) -> list[dict[str, Any]]:
    """Settings, statistics and code that differ, by their path; a side without one lacks the key.

    Lists are compared as a whole.
    """
    before, after = dict(_leaves(_made_with(old))), dict(_leaves(_made_with(new)))
    rows = []
    for path in sorted(before.keys() | after.keys()):
        row = {name: at[path] for name, at in (("old", before), ("new", after)) if path in at}
        if len(row) < 2 or row["old"] != row["new"]:
            rows.append({"setting": path, **row})
    return rows


def _made_with(manifest: Manifest) -> dict[str, Any]:
    return {
        **{name: value for name, value in manifest.settings.items() if name != "ingest"},
        "method": manifest.method,
        "format": manifest.format,
        "layers": list(manifest.layers),
        "statistics": manifest.moments,
        "code": manifest.versions,
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def diff_model(old: Manifest, new: Manifest) -> dict[str, Any] | None:
    """Name and digest of both bases; None where their contents are the same."""
    if old.model.digest == new.model.digest:
        return None
    return {"old": vars(old.model), "new": vars(new.model)}
