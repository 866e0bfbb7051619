"""From defaults, a YAML job file, flags and `--set` to one checked job.

Later sources win: defaults < job file < flags < `--set`. Every value keeps the name of its source,
so that a complaint says where to look. Knows YAML and the types of the fields; does not know what
a job does.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from memedit.errors import InputError
from workflows.fields import ABOVE, AT_LEAST, AT_MOST, SECTIONS, parse_layers
from workflows.gates import parse_gate
from workflows.ingestion.settings import (
    CompactJob,
    FactsAddJob,
    FactsChangeJob,
    FactsListJob,
    FactsRejectsJob,
    FactsWhyJob,
    IngestJob,
)
from workflows.settings import (
    DoctorJob,
    EditJob,
    EvaluateJob,
    GenerateJob,
    Job,
    PlanJob,
    PublishJob,
    StatsJob,
)
from workflows.study_settings import CompareJob, TraceJob
from workflows.submit_settings import LogsJob, StatusJob, StopJob
from workflows.tuning_settings import TuneJob
from workflows.version_settings import (
    ApplyJob,
    DiffJob,
    GcJob,
    HistoryJob,
    PinJob,
    RollbackJob,
    ShowJob,
    VerifyJob,
)
from workflows.wording import did_you_mean, without_keys

JobT = TypeVar("JobT", bound=Job)

JOBS: dict[str, type[Job]] = {
    "edit": EditJob,
    "stats": StatsJob,
    "evaluate": EvaluateJob,
    "compare": CompareJob,
    "tune": TuneJob,
    "trace": TraceJob,
    "generate": GenerateJob,
    "plan": PlanJob,
    "verify": VerifyJob,
    "apply": ApplyJob,
    "history": HistoryJob,
    "show": ShowJob,
    "diff": DiffJob,
    "rollback": RollbackJob,
    "pin": PinJob,
    "gc": GcJob,
    "status": StatusJob,
    "logs": LogsJob,
    "stop": StopJob,
    "doctor": DoctorJob,
    "ingest": IngestJob,
    "compact": CompactJob,
    "facts list": FactsListJob,
    "facts add": FactsAddJob,
    "facts retract": FactsChangeJob,
    "facts restore": FactsChangeJob,
    "facts why": FactsWhyJob,
    "facts rejects": FactsRejectsJob,
}
"""The command of each job."""

_PLACES = {("out",), ("registry",)}

RESERVED = ("smollm2", "self", "auto")
"""Names that are never taken for a file next to the job file."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """One value as a source gave it; `path` has one or two names (field, or section and field)."""

    path: tuple[str, ...]
    value: object
    source: str
    folder: Path | None = None
    """Relative locations are relative to this folder; None is the working directory."""

    def wrong(self, message: str) -> InputError:
        """An error that says where this value comes from."""
        return InputError(message, source=self.source, field=".".join(self.path))


def load_job(
    kind: type[JobT],
    *,
    config: Path | None = None,
    flags: Mapping[str, object] | None = None,
    assignments: Sequence[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> JobT:
    """Merge the sources into a job of `kind`.

    Args:
        kind: The job's dataclass.
        config: A YAML job file. Fields that only other commands have are passed over, so one file
            serves `plan`, `stats` and `edit`.
        flags: Field name -> value; None means that the flag was not given.
        assignments: `section.field=value` or `field=value`; the value is read as YAML.
        defaults: Field name -> value, in place of the job's own default.

    Raises:
        InputError: with the source and the path of the field that is wrong.
    """
    given: dict[tuple[str, ...], Given] = {}
    for item in _all_given(kind, config, flags or {}, assignments):
        given[item.path] = item
        # A flag that says where to publish takes back what the job file says.
        publishes = issubclass(kind, PublishJob) and item.path in _PLACES
        for other in _PLACES - {item.path} if publishes else ():
            if other in given and given[other].folder is not None and item.folder is None:
                del given[other]
    values: dict[str, Any] = dict(defaults or {})
    for item in given.values():
        checked = _check(kind, item)
        if len(item.path) == 1:
            values[item.path[0]] = checked
        else:
            values.setdefault(item.path[0], {})[item.path[1]] = checked
    for field in dataclasses.fields(kind):
        if field.metadata["required"] and not values.get(field.name):
            how = (
                field.metadata["metavar"]
                if field.metadata["positional"]
                else f"--{_dashed(field.name)}"
            )
            raise InputError(
                f"missing; give {how}, or `{field.name}` in the job file", field=field.name
            )
    job = kind(**values)
    job.check()
    return job


_FREE = ("architecture", "source", "hooks", "lineage", "tuned")
"""Mappings whose fields are checked by whoever reads them."""
_MAPPINGS = (*SECTIONS, *_FREE)
_PLACES_IN = {"source": ("path", "catalog", "templates"), "lineage": ("file",)}
"""Their fields that name a place, where they are texts."""
_ALSO = {"gates": "gate"}
"""Other names of fields."""


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _all_given(
    kind: type[Job],
    config: Path | None,
    flags: Mapping[str, object],
    assignments: Sequence[str],
) -> Iterator[Given]:
    if config is not None:
        yield from _from_file(kind, config)
    for name, value in flags.items():
        if value is not None and value != ():
            metadata = {f.name: f.metadata for f in dataclasses.fields(kind)}[name]
            source = metadata["metavar"] if metadata["positional"] else f"--{_dashed(name)}"
            yield Given(path=(name,), value=value, source=source)
    for text in assignments:
        yield from _from_assignment(kind, text)


def _from_file(kind: type[Job], config: Path) -> Iterator[Given]:
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the job file: {error}", source=str(config)) from error
    content = _yaml(text, source=str(config))
    if content is None:
        return
    if not isinstance(content, dict):
        raise InputError("a job file is a mapping of fields to values", source=str(config))
    mine = {f.name for f in dataclasses.fields(kind)}
    everyones = {f.name for job in JOBS.values() for f in dataclasses.fields(job)}
    folder = config.resolve().parent
    values = {_ALSO.get(name, name): value for name, value in content.items()}
    if kind is IngestJob:  # `edit` groups what `memedit edit` can be told
        nested = values.pop("edit", None) or {}
        if not isinstance(nested, dict):
            raise InputError(
                "this is a section: a mapping of fields", source=str(config), field="edit"
            )
        values = {_ALSO.get(name, name): value for name, value in nested.items()} | values
    for name, value in values.items():
        if name not in everyones:
            raise InputError(
                f"no such field{did_you_mean(str(name), mine)}", source=str(config), field=str(name)
            )
        if name in mine:
            yield from _leaves(name, value, source=str(config), folder=folder)


def _from_assignment(kind: type[Job], text: str) -> Iterator[Given]:
    source = f"--set {text}"
    name, equals, value = text.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or len(path) > 2 or not all(path):
        raise InputError("write section.field=value, or field=value", source=source)
    mine = {f.name for f in dataclasses.fields(kind)}
    if path[0] not in mine:
        raise InputError(f"no such field{did_you_mean(path[0], mine)}", source=source)
    parsed = _yaml(value, source=source)
    if len(path) == 2:
        if path[0] not in _MAPPINGS:
            raise InputError(f"{path[0]} is a field, not a section", source=source)
        yield Given(path=path, value=parsed, source=source)
    else:
        yield from _leaves(path[0], parsed, source=source, folder=None)


def _leaves(name: str, value: object, *, source: str, folder: Path | None) -> Iterator[Given]:
    if name not in _MAPPINGS:
        yield Given(path=(name,), value=value, source=source, folder=folder)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield Given(path=(name, str(key)), value=inner, source=source, folder=folder)
    elif value is not None:
        raise InputError("this is a section: a mapping of fields", source=source, field=name)


def _yaml(text: str, *, source: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {' '.join(str(error).split())}", source=source) from error


def _check(kind: type[Job], item: Given) -> Any:
    """The value in the type of its field."""
    owner: type = kind
    if len(item.path) == 2:
        if item.path[0] == "architecture":
            return _coerce(str, item)
        if item.path[0] in _FREE:
            return _free(item)
        owner = SECTIONS[item.path[0]]
    name = item.path[-1]
    fields = {f.name: f for f in dataclasses.fields(owner)}
    if name not in fields:
        raise item.wrong(f"no such field{did_you_mean(name, fields)}")
    metadata = fields[name].metadata
    if metadata.get("location") and without_keys(str(item.value)) != str(item.value):
        raise InputError(
            "a location with keys in it; keys come from the environment or a profile",
            source=without_keys(item.source),
            field=".".join(item.path),
        )
    value = _coerce(typing.get_type_hints(owner)[name], item)
    _check_range(value, item, metadata.get("at_least"), metadata.get("at_most"))
    if metadata.get("location") == "path" and value is not None:
        return _placed(value, item)
    if metadata.get("location") or isinstance(value, Path):
        return _located(value, item)
    if name == "run_id" and value is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", value):
        raise item.wrong(f"must be letters, digits, '-' and '_', but it is {value!r}")
    if name == "gate":
        for text in value:
            try:
                parse_gate(text)
            except InputError as error:
                raise item.wrong(error.message) from None
    return value


def _free(item: Given) -> Any:
    """A value that is checked elsewhere; where it names a place, relative to the job file."""
    places = _PLACES_IN.get(item.path[0], ())
    if item.path[1] not in places or not isinstance(item.value, str):
        return item.value
    if without_keys(item.value) != item.value:
        raise InputError(
            "a location with keys in it; keys come from the environment or a profile",
            source=without_keys(item.source),
            field=".".join(item.path),
        )
    beside = item.path[1] != "catalog" or "/" in item.value or "." in item.value
    return _placed(item.value, item) if beside else item.value


def _coerce(hint: Any, item: Given) -> Any:
    """`value` as `hint` says, by pydantic's lax rules (a YAML `1e-3` is a text, for instance)."""
    from pydantic import TypeAdapter, ValidationError

    value = item.value
    if item.path == ("layers",) and value is not None:
        try:
            value = parse_layers(value)
        except InputError as error:
            raise item.wrong(error.message) from None
    alternatives = [hint, *typing.get_args(hint)]
    if tuple in {typing.get_origin(h) for h in alternatives} and isinstance(value, str):
        value = (value,)  # one where a list may stand
    if isinstance(value, bool) and bool not in alternatives:
        value = str(value).lower()  # pydantic would take true for 1
    for choice in alternatives:
        if typing.get_origin(choice) is typing.Literal and value not in typing.get_args(choice):
            allowed = [str(a) for a in typing.get_args(choice)]
            raise item.wrong(f"not allowed: {value!r}{did_you_mean(str(value), allowed)}")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise item.wrong(f"{error.errors()[0]['msg']}, but it is {item.value!r}") from None


def _check_range(value: object, item: Given, at_least: float | None, at_most: float | None) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise item.wrong(f"must be a finite number, but it is {value}")
    path = ".".join(item.path)
    least = at_least if at_least is not None else AT_LEAST.get(path)
    if least is not None and value < least:
        raise item.wrong(f"must be at least {least:g}, but it is {value}")
    most = at_most if at_most is not None else AT_MOST.get(path)
    if most is not None and value > most:
        raise item.wrong(f"must be at most {most}, but it is {value}")
    if path in ABOVE and value <= ABOVE[path]:
        raise item.wrong(f"must be above {ABOVE[path]:g}, but it is {value}")


def _placed(value: str, item: Given) -> str:
    """A path, which in the job file is relative to the file, or a place in object storage."""
    if value.startswith("s3://"):
        return value
    if not value.strip():
        raise item.wrong("is empty; give a path or s3://bucket/prefix")
    if ":/" in value:
        raise item.wrong(f"must be a path or s3://bucket/prefix, but it is {value}")
    path = Path(value).expanduser()
    return str(item.folder / path if item.folder is not None else path)


def _located(value: Any, item: Given) -> Any:
    """A location in the job file is relative to the file; a name or an id stays as it is."""
    if isinstance(value, Path):
        if not str(item.value).strip():
            raise item.wrong("is empty; give a path")
        if ":/" in str(item.value):
            raise item.wrong(f"must be a local path, but it is {item.value}")
        path = value.expanduser()
        return item.folder / path if item.folder is not None else path
    if not isinstance(value, str) or not value or value in RESERVED or "://" in value:
        return value
    path = Path(value).expanduser()
    if item.folder is not None and not path.is_absolute():
        beside = item.folder / path
        if beside.exists() or value.startswith(("./", "../")):
            return str(beside)
    return str(path) if value.startswith("~") else value
