"""Where the settings of a run come from, and what to say of those that are only guessed.

Knows the defaults of the families, what a job sets, and the record that `memedit tune` leaves in a
settings file. Does not know how settings are searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from memedit.defaults import Defaults
from memedit.errors import InputError
from workflows.settings import WorkJob

_GUESSED = {"layers": ("layers",), "λ": ("solve", "lam")}
"""What differs most from model to model: its name, and where a job sets it."""


@dataclass(frozen=True, kw_only=True)
class TunedRecord:
    """How settings were found: the section `tuned` of a settings file."""

    model: str
    """As it was named."""
    model_digest: str
    facts: str
    facts_digest: str
    facts_at_once: int
    """So many were written at once; λ suits about as many."""
    corpus: str
    objective: str
    trials: int
    when: str
    run_id: str
    memedit: str
    """The version that searched."""

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> TunedRecord:
        """The record as a job file has it.

        Raises:
            InputError: It is not what `memedit tune` writes.
        """
        names = {field.name for field in fields(cls)}
        if wrong := names.symmetric_difference(values):
            raise InputError(
                f"not what `memedit tune` writes: {', '.join(sorted(wrong))}", field="tuned"
            )
        return cls(**values)

    @property
    def told(self) -> str:
        """One line of it."""
        return f"tuned: {self.trials} trials with {self.facts_at_once} facts at once, {self.when}"


def record_of(job: WorkJob) -> TunedRecord | None:
    """The record of the job's settings file, if it is one that `memedit tune` wrote.

    Raises:
        InputError: There is something else in its place.
    """
    values = getattr(job, "tuned", None)
    return TunedRecord.read(values) if values else None


Identity = Callable[[], str | None]
"""Gives a model's digest, for which all of it may be read; None where that is not to be done."""


def origin_of(job: WorkJob, defaults: Defaults, identity: Identity) -> str:
    """Where what the job does not set comes from, or what was tuned."""
    record = record_of(job)
    return defaults.told if record is None or _of_another(record, identity) else record.told


def doubt_of(job: WorkJob, defaults: Defaults, identity: Identity, name: str) -> str | None:
    """What a person should know before settings are trusted; None where nothing is guessed."""
    record = record_of(job)
    if record is not None and (other := _of_another(record, identity)):
        return (
            f"{name}: the settings were tuned for {record.model}, another model "
            f"({record.model_digest[:12]}…; this is {other[:12]}…); {_ADVICE}"
        )
    if defaults.known:
        return None
    left = [
        what for what, path in _GUESSED.items() if hasattr(job, path[0]) and not _sets(job, path)
    ]
    if not left:
        return None
    guessed = "λ is guessed" if left == ["λ"] else f"{' and '.join(left)} are guessed"
    return f"{name}: {defaults.source}; {guessed}; {_ADVICE}"


def _of_another(record: TunedRecord, identity: Identity) -> str | None:
    """The digest of the model at hand, if it is known not to be that of the record."""
    digest = identity()
    return None if digest == record.model_digest else digest


_ADVICE = "`memedit tune` finds settings that fit, or look at the report before you trust it"


def _sets(job: WorkJob, path: tuple[str, ...]) -> bool:
    value: Any = job
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return value is not None
