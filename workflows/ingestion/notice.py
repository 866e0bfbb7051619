"""Who is told of a run: hooks, and OpenLineage. Neither can make a run fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.current import folder_of
from cluster.store import join
from memedit.progress import Progress
from workflows.ingestion.hooks import Hooks, parse_hooks
from workflows.ingestion.lineage import Dataset, Lineage, parse_lineage
from workflows.ingestion.settings import IngestJob
from workflows.ingestion.sources import parse_source
from workflows.wording import without_keys


class Notice:
    """Tells the beginning and the end of one run."""

    def __init__(self, job: IngestJob, progress: Progress) -> None:
        self._job, self._progress = job, progress
        # A dry run is nobody's business.
        quiet = job.dry_run
        self._hooks = Hooks() if quiet else parse_hooks(job.hooks or None)
        settings = None if quiet else parse_lineage(job.lineage or None)
        self._lineage = Lineage(
            settings, f"ingest.{_last(job.registry)}", job.run_id or "", progress=progress
        )
        self._source = parse_source(job.source)
        self._inputs = [Dataset.of(self._source)]

    def begun(self) -> None:
        """The run begins."""
        self._lineage.start(inputs=self._inputs)

    def read(self, snapshot: str | None) -> None:
        """What was read is known now."""
        if snapshot is not None:
            self._inputs = [Dataset.of(self._source, version=snapshot)]

    def ended(self, summary: Mapping[str, Any]) -> None:
        """The run has ended, whether or not it has published."""
        version, facts = summary["version"], dict(summary["facts"])
        if summary["status"] == "gated":
            self._lineage.fail(
                "\n".join(summary["notes"]), inputs=self._inputs, outputs=[], facts=facts
            )
        else:
            outputs = []
            if summary["status"] == "published":
                place = join(self._job.registry, folder_of(version))
                outputs = [Dataset.at(place, version=version)]
            self._lineage.complete(self._inputs, outputs, version=version, facts=facts)
        self._hooks.tell({**summary, "registry": self._job.registry}, self._progress)

    def left_out(self) -> None:
        """Another run works on the registry, so this one has nothing to say."""
        self._lineage.complete(self._inputs, [])

    def failed(self, error: BaseException) -> None:
        """The run has failed, or was stopped."""
        why = without_keys(str(error)).strip() or type(error).__name__
        self._lineage.fail(why, inputs=self._inputs, outputs=[])
        event = {
            "run_id": self._job.run_id,
            "status": "failed",
            "version": None,
            "error": {"kind": type(error).__name__, "message": why},
            "registry": self._job.registry,
        }
        self._hooks.tell(event, self._progress)


def _last(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2] or location
