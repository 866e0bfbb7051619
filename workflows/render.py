"""`memedit render`: one job file, in the words of a scheduler.

The job is checked by the code that checks every job, and so are its places: what lies beside the
job file here lies nowhere in a pod. What is made holds no keys. The manifests are in
`workflows.render_kubernetes` and `workflows.render_inline`, the Python files in
`workflows/templates`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TextIO
from urllib.parse import parse_qsl, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import jinja2
import yaml

from cluster.store import is_remote
from memedit.errors import InputError
from memedit.progress import Progress
from workflows.arguments import arguments_of, command_of
from workflows.cron import check_cron
from workflows.ingestion.settings import IngestJob
from workflows.jobfile import RESERVED, load_job
from workflows.render_checks import variables_of
from workflows.render_kubernetes import LONGEST_NAME, longest_name, made_for, manifests
from workflows.render_settings import (
    RenderJob,
    RenderKubernetesJob,
    RenderPythonJob,
    ScheduledJob,
)
from workflows.settings import EditJob
from workflows.submit import STOP_WAIT_S, places_in
from workflows.wording import without_keys

BY_THE_SCHEDULER = (
    *("executor", "address", "workers", "gpus_per_worker", "run_id"),
    *("json", "log_format", "debug", "time_zone"),
)
"""Fields that are said on the command line of a rendered run or by its schedule, not in its job
file."""
_SECRET = re.compile(
    "secret|token|password|credential|(api|account).?key|connection.?string|auth(?!2-server-uri$)",
    re.IGNORECASE,
)
_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".txt", ".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A job that is to be rendered.

    `places` are its locations that are paths: field -> the path as the job file has it.
    """

    job: ScheduledJob
    config: Path
    places: Mapping[str, str]

    @property
    def command(self) -> str:
        """What of memedit runs the job."""
        return command_of(self.job)

    @classmethod
    def read(
        cls,
        config: Path,
        *,
        flags: Mapping[str, object] | None = None,
        assignments: Sequence[str] = (),
    ) -> Source:
        """The job of a file: with a section `source` it is an ingestion, otherwise an edit.

        Raises:
            InputError: As `load_job`.
        """
        ingests = _has_source(config, assignments)
        kind: type[ScheduledJob] = IngestJob if ingests else EditJob
        job: ScheduledJob = load_job(kind, config=config, flags=flags, assignments=assignments)
        return cls.of(job, config=config, assignments=assignments)

    @classmethod
    def of(cls, job: ScheduledJob, *, config: Path, assignments: Sequence[str] = ()) -> Source:
        """With the paths as they were written, before they were made absolute here."""
        written = _written(config, assignments)
        places = {}
        for field in dataclasses.fields(job):
            value, text = getattr(job, field.name), str(written.get(field.name))
            if value is None or value == field.default:
                continue
            if isinstance(value, Path) or _is_path(value, text, field.metadata["location"]):
                places[field.name] = text
        for section, name, _ in places_in(job):
            places[f"{section}.{name}"] = str(written.get(f"{section}.{name}"))
        return cls(job=job, config=config, places=places)


def _has_source(config: Path, assignments: Sequence[str]) -> bool:
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # `load_job` says what is wrong
    names = [re.split("[.=]", assignment)[0].strip() for assignment in assignments]
    return "source" in names or (isinstance(content, dict) and "source" in content)


def _written(config: Path, assignments: Sequence[str]) -> dict[str, Any]:
    """What was written for each field: `field` or `section.field` -> the value."""
    content: dict[str, Any] = dict(yaml.safe_load(config.read_text(encoding="utf-8")) or {})
    nested = content.pop("edit", None) or {}  # of an ingestion
    found = _flat(nested) | _flat(content)
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        found |= _flat({name.strip(): yaml.safe_load(value)})
    return found


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
    return found


def _is_path(value: object, written: str, location: object) -> bool:
    """Whether a location is a path, and not a name or a place in object storage."""
    if not location or not isinstance(value, str) or value in RESERVED or "://" in value:
        return False
    certain = location == "path" or value.startswith("/") or Path(value).exists()
    # What is not here either is read as a name by `edit`, though these are names of files.
    named = "*" in written or PurePosixPath(written).suffix in _SUFFIXES
    return certain or named or written.startswith(("./", "../", "~"))


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What was made, and where it lies if not on stdout."""

    scheduler: str
    name: str
    text: str
    out: Path | None

    def write(self, stream: TextIO) -> None:
        """The text, or the name of the file that holds it."""
        stream.write(self.text if self.out is None else f"{self.out}\n")

    def summary(self) -> dict[str, Any]:
        """The JSON object that `render --json` prints."""
        out = None if self.out is None else str(self.out)
        return {
            "scheduler": self.scheduler,
            "name": self.name,
            "out": out,
            "text": self.text,
        }


def run_render(options: RenderJob, progress: Progress) -> Rendered:
    """Render a job and write what was asked for.

    Raises:
        InputError: The job cannot be run there; nothing was written.
    """
    source: Source = options.source
    job = source.job
    name = options.name or _name_from(source.config)
    _check_name(name, options, source.job)
    _check_once(source)
    if options.schedule is not None:
        options = dataclasses.replace(options, schedule=check_cron(options.schedule))
        _check_repeated(job, source.config)
    _check_zone(options.time_zone)
    _check_keys(source)
    if isinstance(options, RenderKubernetesJob):
        scheduler = "kubernetes"
        _check_places(source, options)
        kept = (job.artifacts or job.registry) if isinstance(job, IngestJob) else job.artifacts
        if options.volume_claim is None and not is_remote(kept or ""):
            progress.message(
                "neither --volume-claim nor `artifacts` in s3://: what a run has finished is lost"
                " with its pods, so that one that is killed begins again"
            )
        made = manifests(options, name=name, job=job, job_file=job_file(job))
        text = made_for(options, job) + yaml.dump_all(
            made, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
        )
    else:
        assert isinstance(options, RenderPythonJob)
        scheduler = options.scheduler
        _check_places(source, None)
        text = _python(options, name=name, job=job)
    if variables := variables_of(job):
        _tell_of(variables, options, progress)
    if options.out is not None:
        try:
            options.out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot be written: {error}", field="out") from error
    return Rendered(scheduler=scheduler, name=name, text=text, out=options.out)


def job_file(job: ScheduledJob) -> str:
    """A job file that says what `job` is, but for what a rendered run is told as flags."""
    content: dict[str, Any] = {}
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name not in BY_THE_SCHEDULER and value is not None and value != field.default:
            content[field.name] = _plain(value)
    content = {name: value for name, value in content.items() if value != {}}
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Several lines are written as several lines, so that a person can read them."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
# The same labels stand in many places; written out, each can be read where it stands.
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


# What cannot be


def _name_from(config: Path) -> str:
    words = re.findall(r"[a-z0-9]+", config.stem.lower())
    words = words[1:] if words[:1] == ["memedit"] else words
    return "-".join(["memedit", *words])


def _check_name(name: str, options: RenderJob, job: ScheduledJob) -> None:
    longest = LONGEST_NAME["cronjob"]
    if isinstance(options, RenderKubernetesJob):
        longest = longest_name(options, job)
    if len(name) > longest or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise InputError(
            f"{name!r} is no name; write small letters, digits and '-', a letter first, at most"
            f" {longest} of them",
            field="name",
        )


def _check_zone(name: str) -> None:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"no time zone {name!r}; write one such as Europe/Berlin or Etc/UTC",
            field="time_zone",
        ) from error


def _check_once(source: Source) -> None:
    """A rendered run begins when it is started, does its work and ends."""
    reasons = {
        "every": "the scheduler knows when to run; leave it out, and give --schedule in its place",
        "dry_run": "a run of a scheduler that changes nothing is of no use; leave it out",
    }
    for name, reason in reasons.items():
        if getattr(source.job, name, None):
            raise InputError(reason, source=str(source.config), field=name)


def _check_repeated(job: ScheduledJob, config: Path) -> None:
    """What is scheduled publishes many versions."""
    if job.registry is None:
        raise InputError(
            "a run every night cannot publish into one folder, which must be new or empty; give"
            " `registry` in its place",
            source=str(config),
            field="out",
        )
    if job.run_id is not None:
        raise InputError(
            "names one run, and a schedule has many; leave it out, and each gets its own",
            source=str(config),
            field="run_id",
        )


def _check_keys(source: Source) -> None:
    """Keys come from the environment, wherever somebody has put them."""
    for field in dataclasses.fields(source.job):
        value = repr(getattr(source.job, field.name))
        if without_keys(value) != value:
            raise InputError(
                "holds keys, and they would stand in what is rendered; keys come from a Secret",
                source=str(source.config),
                field=field.name,
            )
    catalog = getattr(source.job, "source", {}).get("catalog")
    for name, value in catalog.items() if isinstance(catalog, Mapping) else ():
        if _SECRET.search(str(name)) or (name == "uri" and _has_password(str(value))):
            raise InputError(
                "would stand in what is rendered; keys come from a Secret, as the environment"
                " variable that pyiceberg reads (PYICEBERG_CATALOG__…)",
                source=str(source.config),
                field=f"source.catalog.{name}",
            )


def _has_password(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        named = [name for name, _ in parse_qsl(parts.query)]
        return bool(parts.password) or any(map(_SECRET.search, named))
    except ValueError:
        return True  # nobody can tell


def _tell_of(variables: Sequence[str], options: RenderJob, progress: Progress) -> None:
    """Whoever names a variable must see to it that the run has it."""
    names = ", ".join(variables)
    if not isinstance(options, RenderKubernetesJob):
        progress.message(f"the job reads {names} from the environment of the cluster")
    elif options.secret is None:
        progress.message(
            f"the job reads {names} from the environment; give --secret, a Secret that has it"
        )


def _check_places(source: Source, options: RenderKubernetesJob | None) -> None:
    """Every path is one of the cluster: absolute, and in a pod on the volume or in the image."""
    elsewhere = "the cluster's file system" if options is None else "a pod"
    volume = None if options is None or options.volume_claim is None else options.mount_path
    if options is not None:
        for name in ("mount_path", "in_image"):
            given = getattr(options, name)
            for folder in given if isinstance(given, tuple) else (given,):
                if not folder.startswith("/") or folder.strip("/") == "":
                    raise InputError(f"{folder!r} is no folder below /", field=name)
    for name, written in source.places.items():
        if not written.startswith("/"):
            hint = "write s3://bucket/prefix" + (
                ", or an absolute path of the cluster"
                if options is None
                else f", or a path below {volume or options.mount_path}, on the volume that"
                " --volume-claim mounts"
            )
            raise InputError(
                f"{written} is relative to the job file here, and in {elsewhere} it is not; {hint}",
                source=str(source.config),
                field=name,
            )
        if options is None or (volume is not None and _below(written, volume)):
            continue
        if name not in _written_to(source.job) and any(
            _below(written, folder) for folder in options.in_image
        ):
            continue
        where = (
            f"below {volume}, where --volume-claim is mounted"
            if volume is not None
            else f"on a volume: give --volume-claim and put it below {options.mount_path}"
        )
        raise InputError(
            f"{written} would not be in a pod, or be lost with it; it must lie in s3://, or {where}"
            " (or, to read from, in a folder of the image: --in-image)",
            source=str(source.config),
            field=name,
        )


def _written_to(job: ScheduledJob) -> set[str]:
    """Places that a run writes to."""
    places = {"out", "registry", "cache", "artifacts", "lineage.file"}
    if isinstance(job, IngestJob) and job.source.get("after", "keep") != "keep":
        places.add("source.path")
    return places


def _below(path: str, folder: str) -> bool:
    pure = PurePosixPath(path)
    return ".." not in pure.parts and pure.is_relative_to(folder)


# Python files


def _python(options: RenderPythonJob, *, name: str, job: ScheduledJob) -> str:
    """The file for Airflow or Dagster."""
    told = dataclasses.replace(
        job, executor="ray", address="auto", json=True, log_format="json", debug=False
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("workflows", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["literal"] = _literal
    return environment.get_template(f"{options.scheduler}.py.j2").render(
        name=name,
        function=name.replace("-", "_"),
        schedule=options.schedule,
        time_zone=options.time_zone,
        task=command_of(job),
        command=["memedit", *arguments_of(told)],
        stop_wait_s=STOP_WAIT_S,
    )


def _literal(text: str) -> str:
    """A text in Python, with the quotes that formatters choose."""
    if '"' in text and "'" not in text and "\\" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False)  # a JSON text is one of Python's, too
