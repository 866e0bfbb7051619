"""The settings file that `memedit tune` writes: a job file for `memedit edit --config`.

It holds all that decides which numbers come out, also what was not searched, so that it gives the
same edit when defaults change; and, in the section `tuned`, how it was found. What is read of it
later is in `workflows.origin`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from memedit.config import EditSettings
from workflows.jobfile import RESERVED
from workflows.origin import TunedRecord, located
from workflows.settings import ModelJob

SETTINGS_NAME = "settings.yaml"


def settings_text(
    job: ModelJob,
    settings: EditSettings,
    record: TunedRecord,
    *,
    contexts: tuple[str, ...],
    verdict: str,
) -> str:
    """The settings file.

    Args:
        job: Names the model, and what it computes in.
        settings: What was chosen.
        record: How.
        contexts: Those that it was chosen with, the bare prompt first.
        verdict: What was measured on facts that the search never saw.
    """
    head = (
        f"Settings of `{settings.method}` for {record.model}, found by `memedit tune`.",
        verdict,
        f"λ suits about {record.facts_at_once} facts at once; another number may want another.",
        record.command(SETTINGS_NAME),
    )
    comments = "".join(f"# {' '.join(line.split())}\n" for line in head)
    body = yaml.safe_dump(
        _fields(job, settings, contexts, record), sort_keys=False, allow_unicode=True, width=100
    )
    return comments + body


def _fields(
    job: ModelJob, settings: EditSettings, contexts: tuple[str, ...], record: TunedRecord
) -> dict[str, Any]:
    values = asdict(settings)
    method, layers = values.pop("method"), list(values.pop("layers"))
    del values["finetune"]
    if settings.contexts.kind != "sampled":  # and do not change with the list
        values["contexts"] = {"kind": settings.contexts.kind, "templates": contexts[1:]}
    if method != "memedit":
        del values["protect"], values["repair"]
    values["targets"]["tokens_per_batch"] = None  # what suits the device
    sections = {name: _plain(fields) for name, fields in values.items()}
    return {
        "model": job.model if job.model in RESERVED else located(job.model),
        "dtype": job.dtype,
        **({"architecture": dict(job.architecture)} if job.architecture else {}),
        "method": method,
        "layers": layers,
        **{name: fields for name, fields in sections.items() if fields},
        "tuned": asdict(record),
    }


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As YAML has them; what is None is left to be found out."""
    found = {name: value for name, value in fields.items() if value is not None}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}
