"""The version of a registry in which no fact holds any more: the base, as it is."""

from __future__ import annotations

from dataclasses import asdict

from cluster.publication import Publication
from cluster.store import join
from memedit.manifest import (
    MANIFEST_NAME,
    FactsIdentity,
    Manifest,
    ModelIdentity,
    code_versions,
)
from memedit.outcome import EditOutcome, Evaluation, FactCounts
from memedit.patching import write_patched
from memedit.requests import EditBatch
from workflows.edit import FACTS_NAME
from workflows.facts import write_facts
from workflows.ingestion.desired import Desired
from workflows.progress import Timed


def publish_base(desired: Desired, publication: Publication, timed: Timed) -> EditOutcome:
    """Publish the base without an edit: base + MEMIT(nothing). There is nothing to judge."""
    base, settings = desired.base, desired.settings
    patched = write_patched(base.checkpoint, publication.sink, {}, progress=timed)
    write_facts(publication.staging / FACTS_NAME, ())
    nothing = EditBatch(())
    plain = asdict(settings) | {"ingest": desired.notes_for_manifest()}
    publication.publish(
        Manifest(
            run_id=desired.run_id,
            method=settings.method,
            model=ModelIdentity(name=base.name, digest=base.checkpoint.digest),
            layers=settings.layers,
            facts=FactsIdentity(digest=nothing.digest, file=FACTS_NAME, count=0),
            settings=plain,
            files=patched.files,
            tensors=patched.tensors,
            metrics={"before": {}, "after": {}},
        )
    )
    return EditOutcome(
        run_id=desired.run_id,
        out=publication.location,
        manifest=join(publication.location, MANIFEST_NAME),
        method=settings.method,
        model=base.name,
        layers=settings.layers,
        facts=FactCounts(read=0, accepted=0),
        before=Evaluation(metrics={}),
        after=Evaluation(metrics={}),
        timings_s=timed.timings_s,
        settings=plain,
        versions=code_versions(),
    )
