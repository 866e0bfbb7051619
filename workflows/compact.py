"""`memedit compact`: the version in use becomes a base of its own.

The facts in it are part of the weights from then on: later runs solve only what came after, but
nothing takes those facts out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.current import folder_of, now
from cluster.publication import open_publication
from cluster.registry import open_registry
from cluster.store import join
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError
from memedit.manifest import MANIFEST_NAME, Manifest, ModelIdentity
from memedit.patching import write_patched
from memedit.progress import Progress
from memedit.writing import whole_file
from workflows.edit import FACTS_NAME
from workflows.ingestion.compacted import note_base
from workflows.ingestion.runs import Runs
from workflows.ingestion.settings import CompactJob
from workflows.progress import Timed
from workflows.settings import new_run_id
from workflows.version_names import run_id_of


def run_compact(job: CompactJob, progress: Progress) -> Mapping[str, Any]:
    """Publish a version of a registry as a new base, and note which facts it says.

    Raises:
        InputError: There is no such version, it is not a full checkpoint of an ingestion, or the
            place is not empty.
    """
    timed = Timed(progress)
    storage = job.storage_settings
    registry = open_registry(job.registry, storage=storage)
    version = run_id_of(job.version, registry, field="version")
    runs = Runs(registry.store)
    with registry.hold(version):
        manifest = registry.require_whole(version).manifest
        sequence = runs.sequence_of(version)
        if manifest is None or manifest.format != "full" or not sequence:
            raise InputError(
                f"{version} was not made by `memedit ingest`: which facts it says is not known",
                field="version",
            )
        files = registry.store.files(folder_of(version))
        made = Checkpoint.open(files, cache=job.cache_folder)
        run_id = new_run_id()
        with open_publication(job.out, run_id=run_id, storage=storage) as publication:
            patched = write_patched(made, publication.sink, {}, progress=timed)
            with whole_file(publication.staging / FACTS_NAME) as partial:
                partial.write_bytes(files.read(FACTS_NAME))
            # Before it appears: a base of which nobody knows what it says would be edited twice.
            note_base(
                registry.store, made.digest, sequence=sequence, version=version, model=job.out
            )
            publication.publish(
                Manifest(
                    run_id=run_id,
                    method=manifest.method,
                    model=ModelIdentity(name=manifest.model.name, digest=manifest.model.digest),
                    layers=manifest.layers,
                    facts=manifest.facts,
                    settings=dict(manifest.settings) | {"compacted": version},
                    moments=manifest.moments,
                    files=patched.files,
                    tensors=manifest.tensors,
                    metrics=manifest.metrics,
                    created_at=now(),
                )
            )
    return {
        "run_id": run_id,
        "out": publication.location,
        "manifest": join(publication.location, MANIFEST_NAME),
        "version": version,
        "facts": manifest.facts.count,
        "model": job.out,
        "timings_s": {stage: s for stage, s in timed.timings_s.items() if s},
    }
