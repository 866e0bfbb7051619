"""OpenLineage events: from which data set a run made which version of a model.

Knows OpenLineage's names and events, and that a run neither waits for them nor fails with them.
Does not know what a run does. The library's own settings (`OPENLINEAGE_URL`, `openlineage.yml` and
others) are passed over, so that events go where the settings of the run say and nowhere else;
`OPENLINEAGE_DISABLED=true` is honoured.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from memedit import __version__
from memedit.errors import InputError
from memedit.progress import Progress
from workflows.ingestion.hooks import checked_url, host_of, within, without_secrets
from workflows.ingestion.source_settings import AnySource, IcebergSettings
from workflows.wording import did_you_mean, without_keys

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

_ENDPOINT = "api/v1/lineage"
_ANSWER_S = 3.0
"""How long the server may take for one answer of the network."""
_EVENT_S = 7.0
"""How long a run waits for an event to be delivered, whatever happens."""
_PRODUCER = f"urn:memedit:{__version__}"
_REMEDY = "pip install 'memedit[lineage]'"


@dataclass(frozen=True, kw_only=True)
class LineageSettings:
    """Where events go: to a file or to a server."""

    file: Path | None = None
    """One JSON object a line is appended to it."""
    url: str | None = None
    """The server, such as `http://marquez:5000`; `api/v1/lineage` is put behind it."""
    api_key_env: str | None = None
    """The environment variable with the server's key."""
    namespace: str = "memedit"
    """Of the job."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set as OpenLineage names it."""

    namespace: str
    name: str
    version: str | None = None
    """A snapshot, a table version, or the version of a model."""
    layer: Literal["iceberg", "delta"] | None = None
    alias: tuple[str, str] | None = None
    """Namespace and name in the catalog, of a table that is named by its place."""

    @classmethod
    def at(
        cls,
        place: str | os.PathLike[str],
        *,
        version: str | None = None,
        layer: Literal["iceberg", "delta"] | None = None,
        alias: tuple[str, str] | None = None,
    ) -> Dataset:
        """A file or folder, here or at `s3://`; of a glob it is the folder above."""
        namespace, name = _named(os.fspath(place))
        return cls(namespace=namespace, name=name, version=version, layer=layer, alias=alias)

    @classmethod
    def of(
        cls, source: AnySource, *, version: str | None = None, location: str | None = None
    ) -> Dataset:
        """The data set behind a source.

        Args:
            source: The settings of the source.
            version: The snapshot or table version that was read.
            location: The place of an Iceberg table, where it is known: then that is its name, as
                for Spark and Flink, and the name in the catalog is an alias.
        """
        if not isinstance(source, IcebergSettings):
            layer: Literal["delta"] | None = "delta" if source.kind == "delta" else None
            return cls.at(location or source.path, version=version, layer=layer)
        alias = (_catalog(source.catalog), source.table)
        if location is not None:
            return cls.at(location, version=version, layer="iceberg", alias=alias)
        return cls(namespace=alias[0], name=alias[1], version=version, layer="iceberg")


def parse_lineage(value: object) -> LineageSettings | None:
    """The section `lineage` of a settings file; None stands for no events.

    Raises:
        InputError: With the field that is wrong, such as `lineage.url`.
    """
    if value is None:
        return None
    allowed = ("file", "url", "api_key_env", "namespace")
    if not isinstance(value, Mapping):
        raise InputError("must be a mapping with a `file` or a `url`", field="lineage")
    for name in value:
        if name not in allowed:
            raise InputError(
                f"no such field{did_you_mean(str(name), allowed)}", field=f"lineage.{name}"
            )
    given = {name: text for name, text in value.items() if text is not None}
    for name, text in given.items():
        is_path = name == "file" and isinstance(text, Path)
        if not is_path and (not isinstance(text, str) or not text.strip()):
            raise InputError("must be a text, and not an empty one", field=f"lineage.{name}")
    if ("file" in given) == ("url" in given):
        raise InputError("give one of `file` and `url`", field="lineage")
    if "file" in given:
        if "api_key_env" in given:
            raise InputError("a key is for a `url`", field="lineage.api_key_env")
        if ":/" in str(given["file"]) or "\0" in str(given["file"]):
            raise InputError("must be a path on this machine", field="lineage.file")
        given["file"] = Path(given["file"]).expanduser()
    else:
        parts = checked_url(given["url"], field="lineage.url")
        if parts.query or parts.fragment:
            raise InputError(
                "an address with ? or #; a key for the server is named by `api_key_env`",
                field="lineage.url",
            )
    if not re.fullmatch(r"[A-Za-z_]\w*", given.get("api_key_env", "NAME"), re.ASCII):
        # Perhaps the key itself, so it is not repeated.
        raise InputError("not the name of an environment variable", field="lineage.api_key_env")
    return LineageSettings(**given)


class Lineage:
    """The events of one run: START, then one of COMPLETE and FAIL.

    Every attempt of a run is a run of its own for OpenLineage, so the id is a new one each time;
    memedit's id is in the run's facet `memedit`. Nothing here raises, and nothing takes long.

    Args:
        settings: Where events go; None for nowhere.
        job_name: Stays the same from run to run.
        run_id: memedit's id of the run.
        progress: Is told of events that could not be delivered.
    """

    def __init__(
        self,
        settings: LineageSettings | None,
        job_name: str,
        run_id: str,
        *,
        progress: Progress,
    ) -> None:
        self.id = str(uuid.uuid4())
        """OpenLineage's id of the run."""
        self._settings, self._job_name, self._run_id = settings, job_name, run_id
        self._progress = progress
        self._state: Literal["new", "started", "ended"] = "new"
        self._inputs: tuple[Dataset, ...] = ()
        self._outputs: tuple[Dataset, ...] = ()
        if settings is None or _is_disabled():
            self._state = "ended"

    def start(self, inputs: Iterable[Dataset] = (), outputs: Iterable[Dataset] = ()) -> None:
        """The run has begun."""
        if self._state == "new":
            self._state = "started"
            self._inputs, self._outputs = tuple(inputs), tuple(outputs)
            self._send(lambda: self._event("START", {}))

    def complete(
        self,
        inputs: Iterable[Dataset] | None = None,
        outputs: Iterable[Dataset] | None = None,
        *,
        version: str | None = None,
        facts: Mapping[str, int] | None = None,
    ) -> None:
        """The run has ended well.

        Args:
            inputs: What was read; by default as said at the start.
            outputs: What was published, which may be nothing; by default as said at the start.
            version: The version that was published.
            facts: How many facts were read, added, …, by what they are called.
        """
        self._end("COMPLETE", inputs, outputs, {"version": version, "facts": facts}, None)

    def fail(
        self,
        error_message: str,
        *,
        inputs: Iterable[Dataset] | None = None,
        outputs: Iterable[Dataset] | None = None,
        facts: Mapping[str, int] | None = None,
    ) -> None:
        """The run has failed, or a gate kept it from publishing."""
        self._end("FAIL", inputs, outputs, {"facts": facts}, error_message)

    def _end(
        self,
        kind: Literal["COMPLETE", "FAIL"],
        inputs: Iterable[Dataset] | None,
        outputs: Iterable[Dataset] | None,
        facet: Mapping[str, Any],
        error_message: str | None,
    ) -> None:
        if self._state == "ended":
            return
        self.start()  # an end without a beginning is nothing to OpenLineage
        if self._state != "started":
            return
        self._state = "ended"
        self._inputs = self._inputs if inputs is None else tuple(inputs)
        self._outputs = self._outputs if outputs is None else tuple(outputs)
        self._send(lambda: self._event(kind, facet, error_message))

    def _send(self, event: Callable[[], RunEvent]) -> None:
        """Deliver an event, or tell why not."""
        assert self._settings is not None
        settings = self._settings
        secrets = [os.environ.get(settings.api_key_env or "", "").strip()]
        try:
            # Also a file may make us wait: a full pipe, or a network share that is gone.
            within(_EVENT_S, lambda: _deliver(settings, event()))
        except ImportError:
            self._state = "ended"
            self._tell(f"the package openlineage-python cannot be imported; {_REMEDY}")
        except TimeoutError:
            self._tell(f"{_where(settings)} did not answer in time", secrets)
        except _NoKeyError as error:
            self._state = "ended"
            self._tell(str(error), secrets)
        except Exception as error:  # lineage is never a reason for a run to fail
            self._tell(f"{_where(settings)}: {_reason(error)}", secrets)

    def _tell(self, why: str, secrets: Iterable[str] = ()) -> None:
        text = f"no lineage event was sent: {why}"
        self._progress.message(without_secrets(text, filter(None, secrets)), warning=True)

    def _event(
        self,
        kind: Literal["START", "COMPLETE", "FAIL"],
        facet: Mapping[str, Any],
        error_message: str | None = None,
    ) -> RunEvent:
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunState
        from openlineage.client.event_v2 import RunEvent as Event
        from openlineage.client.facet_v2 import RunFacet, error_message_run, job_type_job

        assert self._settings is not None
        own: dict[str, Any] = {"run_id": self._run_id, "memedit_version": __version__}
        own |= {k: dict(v) if isinstance(v, Mapping) else v for k, v in facet.items() if v}
        facets: dict[str, Any] = {
            "memedit": RunFacet(producer=_PRODUCER).with_additional_properties(**own)
        }
        if error_message is not None:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
                message=without_keys(error_message),
                programmingLanguage="python",
                producer=_PRODUCER,
            )
        job_type = job_type_job.JobTypeJobFacet(
            processingType="BATCH", integration="MEMEDIT", jobType="JOB", producer=_PRODUCER
        )
        return Event(
            eventType=RunState(kind),
            eventTime=datetime.now(UTC).isoformat(),
            producer=_PRODUCER,
            run=Run(runId=self.id, facets=facets),
            job=Job(
                namespace=self._settings.namespace,
                name=self._job_name,
                facets={"jobType": job_type},
            ),
            inputs=[InputDataset(d.namespace, d.name, facets=_facets(d)) for d in self._inputs],
            outputs=[OutputDataset(d.namespace, d.name, facets=_facets(d)) for d in self._outputs],
        )


class _NoKeyError(Exception):
    """The server's key is not there."""


def _is_disabled() -> bool:
    return os.environ.get("OPENLINEAGE_DISABLED", "").lower().strip() == "true"


def _deliver(settings: LineageSettings, event: RunEvent) -> None:
    """Give an event to the library's transport.

    Not to its client, which would read its own settings: they can leave events out, and add
    environment variables and the address of a Git repository to them.
    """
    if settings.file is not None:
        from openlineage.client.transport.file import FileConfig, FileTransport

        settings.file.parent.mkdir(parents=True, exist_ok=True)
        # Without `append` each event would have a file of its own, with the time in its name.
        FileTransport(FileConfig(log_file_path=str(settings.file), append=True)).emit(event)
        return

    from openlineage.client.transport.http import (
        ApiKeyTokenProvider,
        HttpConfig,
        HttpTransport,
        TokenProvider,
        get_session,
    )

    token = TokenProvider({})
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env, "").strip()
        if not key:
            raise _NoKeyError(f"the environment variable {settings.api_key_env} is not set")
        token = ApiKeyTokenProvider({"api_key": key})
    session = get_session()
    session.auth = lambda request: request  # or requests puts a login from ~/.netrc over our key
    session.max_redirects = 0
    assert settings.url is not None
    base = settings.url.rstrip("/").removesuffix(f"/{_ENDPOINT}")
    config = HttpConfig(
        url=f"{base}/",  # without the slash the end of the address would be dropped
        endpoint=_ENDPOINT,
        timeout=_ANSWER_S,
        auth=token,
        session=session,
        retry={"total": 1, "read": 0, "redirect": 0, "allowed_methods": ["POST"]},
    )
    transport = HttpTransport(config)
    try:
        transport.emit(event)
    finally:
        transport.close()


def _facets(dataset: Dataset) -> dict[str, Any]:
    from openlineage.client.facet_v2 import (
        dataset_version_dataset,
        storage_dataset,
        symlinks_dataset,
    )

    facets: dict[str, Any] = {}
    if dataset.version is not None:
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(
            datasetVersion=dataset.version, producer=_PRODUCER
        )
    if dataset.layer is not None:
        facets["storage"] = storage_dataset.StorageDatasetFacet(
            storageLayer=dataset.layer, fileFormat="parquet", producer=_PRODUCER
        )
    if dataset.alias is not None:
        namespace, name = dataset.alias
        facets["symlinks"] = symlinks_dataset.SymlinksDatasetFacet(
            identifiers=[symlinks_dataset.Identifier(namespace=namespace, name=name, type="TABLE")],
            producer=_PRODUCER,
        )
    return facets


def _named(place: str) -> tuple[str, str]:
    """Namespace and name of a place, by OpenLineage's rules."""
    scheme, separator, rest = without_keys(place).partition("://")
    if separator and scheme == "file":
        return _named("/" + rest.lstrip("/"))
    if separator:
        bucket, _, key = rest.partition("/")
        key = _folder_of_glob(key).strip("/")
        scheme = "s3" if scheme in ("s3a", "s3n") else scheme
        return f"{scheme}://{bucket.rpartition('@')[2]}", key or "/"
    # The path is made whole first: "*.csv" has no folder of its own.
    return "file", _folder_of_glob(os.path.abspath(place)) or "/"


def _folder_of_glob(path: str) -> str:
    parts = path.split("/")
    for number, part in enumerate(parts):
        if re.search(r"[*?]", part):
            return "/".join(parts[:number])
    return path


def _catalog(catalog: str | Mapping[str, str]) -> str:
    """The namespace of a catalog: its address without keys, its name, or its file."""
    if isinstance(catalog, str):
        is_path = "/" in catalog or catalog.endswith((".db", ".sqlite"))
        return f"sqlite://{os.path.abspath(catalog)}" if is_path else f"iceberg://{catalog}"
    parts = urlsplit(str(catalog.get("uri", "")))
    if not parts.scheme:
        return f"iceberg://{catalog.get('type', 'default')}"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if host else f"{parts.scheme}://{parts.path}"


def _where(settings: LineageSettings) -> str:
    return host_of(urlsplit(settings.url)) if settings.url else f"the file {settings.file}"


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        if 300 <= status < 400:
            return f"the server sends elsewhere ({status}); give the address it sends to"
        return f"the server answered {status}"
    if type(error).__module__.startswith("requests"):
        return f"cannot be reached ({type(error).__name__})"
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else None
    return f"{type(error).__name__}: {error}" if cause is None else f"{cause.strerror or cause}"
