"""`memedit apply`: a published delta and its base model in, the full checkpoint out.

Bit by bit what `memedit edit --format full` would have written, which is checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.current import now
from cluster.store import join, open_files
from memedit.architecture import Architecture, architecture_of
from memedit.checkpoint import Checkpoint
from memedit.checksums import record_of
from memedit.delta import DELTA_NAME, load_delta
from memedit.errors import InputError
from memedit.files import File, Files
from memedit.manifest import MANIFEST_NAME, Manifest, code_versions, read_manifest
from memedit.model import load_config
from memedit.patching import PatchedFiles, write_patched
from memedit.progress import Progress
from memedit.solve import Update
from memedit.writing import whole_file
from workflows.destination import destination
from workflows.edit import FACTS_NAME, REJECTS_NAME, REPORT_NAME
from workflows.judgements import FACTS_TABLE_NAME
from workflows.models import resolve_model
from workflows.product import patches_of
from workflows.progress import Timed
from workflows.settings import new_run_id
from workflows.version_settings import ApplyJob

# Others would be written among the files of the base, or through hard links into them.
_PARTS = (DELTA_NAME, FACTS_NAME, FACTS_TABLE_NAME, REJECTS_NAME, REPORT_NAME)


def run_apply(job: ApplyJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit apply`.

    Raises:
        InputError: There is no such delta, it is damaged, or the model is not its base.
        LockError: Another run publishes to the same place.
    """
    timed = Timed(progress)
    run_id = job.run_id or new_run_id()
    with destination(job, run_id) as publication:
        timed.start("load")
        source = open_files(job.delta, cache=job.cache_folder)
        manifest = read_manifest(source)
        if manifest.format != "delta":
            raise InputError(
                f"has the format {manifest.format}; only a delta can be applied",
                source=job.delta,
                field="delta",
            )
        _check_files(source, manifest)
        updates = _updates(source, publication.staging)
        name = job.model or manifest.model.name
        resolved = resolve_model(name, cache=job.cache_folder, progress=timed)
        base = Checkpoint.open(resolved.files, cache=job.cache_folder)
        if base.digest != manifest.model.digest:
            raise InputError(
                f"is not the base of this delta, which is {manifest.model.name} with the digest"
                f" {manifest.model.digest[:12]}…; this has {base.digest[:12]}…",
                source=name,
                field="model",
            )
        architecture = manifest.settings.get("architecture", {})
        arch = architecture_of(load_config(resolved.files), architecture)
        timed.finish("load")
        patches = patches_of(updates, transposed=arch.family.conv1d)
        _check_fit(base, arch, updates, job.delta)
        patched = write_patched(base, publication.sink, patches, progress=timed)
        _check_tensors(manifest, patched, job.delta, timed)
        # Read back, so that what appears is what was meant.
        sha256 = {name: record.sha256 for name, record in patched.tensors.items()}
        replace(Checkpoint.open(publication.files), published=sha256).check_published()
        for file in manifest.files:
            if file != DELTA_NAME:
                with whole_file(publication.staging / file) as partial:
                    partial.write_bytes(source.read(file))
        publication.publish(
            replace(
                manifest,
                run_id=run_id,
                format="full",
                created_at=now(),
                versions=code_versions(),
                model=replace(manifest.model, name=name),
                files=patched.files,
                tensors=patched.tensors,
            )
        )
    return {
        "run_id": run_id,
        "out": publication.location,
        "manifest": join(publication.location, MANIFEST_NAME),
        "model": name,
        "delta": job.delta,
        "facts": manifest.facts.count,
        "tensors": len(patched.tensors),
        "timings_s": {stage: s for stage, s in timed.timings_s.items() if s},
    }


def _check_files(source: Files, manifest: Manifest) -> None:
    for name, listed in manifest.files.items():
        if name not in _PARTS:
            raise InputError(
                f"is no part of a delta, which holds {', '.join(_PARTS)}", source=File(source, name)
            )
        if source.size(name) is None:
            raise InputError("is missing", source=File(source, name))
        if record_of(File(source, name)).sha256 != listed.sha256:
            raise InputError("was changed since it was published", source=File(source, name))


def _updates(source: Files, staging: Path) -> dict[str, Update]:
    if source.here is not None:
        return load_delta(source.here / DELTA_NAME)
    path = staging / DELTA_NAME
    with whole_file(path) as partial:
        partial.write_bytes(source.read(DELTA_NAME))
    try:
        return load_delta(path)
    except InputError as error:
        raise InputError(
            error.message, source=File(source, DELTA_NAME), field=error.field
        ) from error
    finally:
        path.unlink()


def _check_fit(
    base: Checkpoint, arch: Architecture, updates: Mapping[str, Update], delta: str
) -> None:
    for name, update in updates.items():
        left_NO, right_NI = update.left_NO, update.right_NI
        width = left_NO.shape[0] if right_NI is None else right_NI.shape[1]
        stored = (width, left_NO.shape[1]) if arch.family.conv1d else (left_NO.shape[1], width)
        if name != arch.checkpoint_key(update.layer, base.names) or base.info(name).shape != stored:
            raise InputError(
                f"does not fit layer {update.layer} of this model", source=delta, field=name
            )


def _check_tensors(
    manifest: Manifest, patched: PatchedFiles, delta: str, progress: Progress
) -> None:
    """What comes out must be what the delta says of itself: on the machine that made it, every bit.

    Elsewhere matrix products may differ in the last bits of float64, and one in many million
    numbers is then rounded the other way.
    """
    if manifest.tensors.keys() != patched.tensors.keys():
        raise InputError("is not what its manifest lists", source=delta, field="tensors")
    for name, listed in manifest.tensors.items():
        found = patched.tensors[name]
        if found.sha256 == listed.sha256:
            continue
        if not math.isclose(found.delta_norm, listed.delta_norm, rel_tol=1e-9):
            raise InputError(
                "does not give the tensor that its manifest lists", source=delta, field=name
            )
        progress.message(f"{name} differs in last bits from the one that was evaluated")
