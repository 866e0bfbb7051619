"""Where the settings of a run come from, and what to say of those that are only guessed.

Knows the defaults of the families, what a job sets, and the record that `memedit tune` leaves in a
settings file. Does not know how settings are searched.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memedit.config import EditSettings, digest_of
from memedit.defaults import Defaults
from memedit.errors import InputError
from memedit.search import searchable
from workflows.settings import WorkJob
from workflows.wording import plural

_GUESSED = {"layers": ("layers",), "λ": ("solve", "lam")}
"""What differs most from model to model: its name, and where a job sets it."""
_AS_MANY = 3
"""λ suits up to so many times as many, or as few, facts as it was tuned with."""


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
    settings_digest: str
    """See `digest_of_tuned`."""
    corpus: str
    """As `located`."""
    stats: str | None
    """Second moments that were used in place of counting them on the corpus."""
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
        return f"tuned: {self._how}"

    @property
    def told_changed(self) -> str:
        """The same where what was tuned was changed later."""
        return f"tuned, then changed: {self._how}"

    @property
    def _how(self) -> str:
        return f"{self.trials} trials with {self.facts_at_once} facts at once, {self.when}"

    def command(self, settings_file: str) -> str:
        """How to edit with the settings on the text that they were found with."""
        words = ["memedit", "edit", "--config", settings_file, "--facts", "FACTS", "--out", "OUT"]
        words += ["--corpus", self.corpus] if self.corpus != "self" else []
        words += ["--stats", self.stats] if self.stats else []
        return shlex.join(words)


def digest_of_tuned(settings: EditSettings) -> str:
    """Identity of what a search decides, or λ hangs on: layers, sweeps, optimiser and the like."""
    targets = asdict(settings.targets)
    del targets["tokens_per_batch"]  # what suits the device
    numbers = {"lam": settings.solve.lam, **targets}
    if settings.method == "memedit":
        numbers["weight"] = settings.protect.weight
    if settings.solve.sweeps > 1:
        numbers["sweeps"] = settings.solve.sweeps
    numbers = {name: None if n is None else float(n) for name, n in numbers.items()}
    return digest_of(settings.method, settings.layers, numbers)


def located(place: str) -> str:
    """The path, wherever it is read from; what is no path here, as an id, as it is."""
    path = Path(place).expanduser()
    return str(path.resolve()) if place != "self" and path.exists() else place


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
    if record is None or _of_another(record, identity):
        return defaults.told
    return record.told_changed if _changed(record, job, defaults) else record.told


def doubt_of(
    job: WorkJob, defaults: Defaults, identity: Identity, name: str, n_facts: int
) -> str | None:
    """What a person should know before settings are trusted; None where nothing is guessed."""
    record = record_of(job)
    if record is not None:
        if other := _of_another(record, identity):
            return (
                f"{name}: the settings were tuned for {record.model}, another model "
                f"({record.model_digest[:12]}…; this is {other[:12]}…); {_ADVICE}"
            )
        if differs := _differences(record, job, defaults, n_facts):
            return f"{name}: {'; '.join(differs)}; {_ADVICE}"
    if defaults.known:
        return None
    left = [
        what for what, path in _GUESSED.items() if hasattr(job, path[0]) and not _sets(job, path)
    ]
    if not left:
        return None
    guessed = "λ is guessed" if left == ["λ"] else f"{' and '.join(left)} are guessed"
    return f"{name}: {defaults.source}; {guessed}; {_ADVICE}"


def _differences(record: TunedRecord, job: WorkJob, defaults: Defaults, n_facts: int) -> list[str]:
    """In what a run differs from what its settings were tuned on."""
    found = []
    if _changed(record, job, defaults):
        found.append("the settings were changed after they were tuned")
    tuned_with = record.facts_at_once
    suits = tuned_with / _AS_MANY <= n_facts <= tuned_with * _AS_MANY
    if not suits and "lam" in searchable(defaults.settings.method):
        found.append(f"λ was tuned with {plural(tuned_with, 'fact')} at once, not with {n_facts:,}")
    text = record.stats or record.corpus
    if not getattr(job, "stats", None) and located(job.corpus) != text:
        found.append(f"tuned with the statistics of {text}, not with those of {job.corpus}")
    return found


def _changed(record: TunedRecord, job: WorkJob, defaults: Defaults) -> bool:
    return digest_of_tuned(job.settings(defaults.settings)) != record.settings_digest


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
