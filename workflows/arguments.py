"""From a job back to the arguments that give it.

What `workflows.jobfile` reads from several sources is written as one command line, so that a job
can be sent to where its job file is not. Knows no shell: whoever needs one quotes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workflows.jobfile import JOBS
from workflows.settings import Job


def command_of(job: Job) -> str:
    """The command that a job is for."""
    return next(command for command, kind in JOBS.items() if kind is type(job))


def arguments_of(job: Job) -> list[str]:
    """The command and its arguments; whatever is as it is by default is left out.

    `load_job` makes the same job of them.
    """
    flags, assignments, texts = [], [], []
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if isinstance(value, Mapping):
            for name, inner in value.items():
                text = json.dumps(_plain(inner), ensure_ascii=False)
                assignments.append(f"--set={field.name}.{name}={text}")
        elif value is None or value == field.default:
            continue
        elif field.metadata["positional"]:
            texts += [str(text) for text in (value if isinstance(value, tuple) else (value,))]
        else:
            flags += _flags(f"--{field.name.replace('_', '-')}", value)
    # After `--` a text that begins with a dash is no flag.
    return [command_of(job), *flags, *assignments, *(["--", *texts] if texts else [])]


def _flags(name: str, value: object) -> list[str]:
    if value is True:
        return [name]
    if not isinstance(value, tuple):
        return [f"{name}={value}"]
    if all(isinstance(each, int) for each in value):  # layers
        return [f"{name}={','.join(map(str, value))}"]
    return [f"{name}={each}" for each in value]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
