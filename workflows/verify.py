"""`memedit verify`: check a published version against its manifest and its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.store import is_remote, open_files
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError, MemeditError
from memedit.manifest import Manifest, read_manifest
from memedit.progress import Progress
from memedit.verify import verify
from workflows.models import EMBEDDED_NAME, resolve_model
from workflows.version_settings import VerifyJob


def run_verify(job: VerifyJob, progress: Progress) -> Mapping[str, Any]:
    """Compare every file of the version with its manifest, and its tensors with the base's.

    Raises:
        InputError: The manifest is missing or damaged, or the base that was named is another.
    """
    files = open_files(job.version, cache=job.cache_folder)
    manifest = read_manifest(files)
    base = _base(job, manifest, progress) if manifest.format == "full" and not job.quick else None
    problems = verify(files, base=base, quick=job.quick)
    return {
        "ok": not problems,
        "version": job.version,
        "run_id": manifest.run_id,
        "format": manifest.format,
        "files": len(manifest.files),
        "tensors": len(manifest.tensors),
        "base": None if base is None else (job.base or manifest.model.name),
        "problems": [{"file": p.file, "kind": p.kind, "message": p.message} for p in problems],
    }


def _base(job: VerifyJob, manifest: Manifest, progress: Progress) -> Checkpoint | None:
    """The base that the job names, or the one that the version names if it is at hand."""
    name = job.base or manifest.model.name
    at_hand = name == EMBEDDED_NAME or is_remote(name) or Path(name).expanduser().is_dir()
    if job.base is None and not at_hand:
        progress.message(f"The base {name} is not at hand, so nothing is compared with it (--base)")
        return None
    try:
        resolved = resolve_model(name, cache=job.cache_folder, progress=progress)
        base = Checkpoint.open(resolved.files, cache=job.cache_folder)
        same = base.digest == manifest.model.digest
    except MemeditError as error:
        if job.base is not None:
            raise
        progress.message(f"The base cannot be compared with: {error}")
        return None
    if not same and job.base is not None:
        raise InputError(
            f"is not the base of this version, whose digest is {manifest.model.digest[:12]}…",
            source=name,
            field="base",
        )
    if not same:
        progress.message(f"{name} is another model by now, so nothing is compared with it (--base)")
        return None
    return base
