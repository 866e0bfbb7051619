"""`memedit verify`: is a published version still what its manifest says?"""

from __future__ import annotations

from typing import Any

from memedit.manifest import read_manifest, verify
from memedit.progress import Progress
from workflows.settings import VerifyJob


def run_verify(job: VerifyJob, progress: Progress) -> dict[str, Any]:
    """Compare every file of the version with its manifest.

    Raises:
        InputError: the manifest is missing or damaged.
    """
    manifest = read_manifest(job.version)
    problems = verify(job.version)
    return {
        "ok": not problems,
        "version": str(job.version),
        "run_id": manifest.run_id,
        "files": len(manifest.files),
        "problems": [{"file": p.file, "kind": p.kind, "message": p.message} for p in problems],
    }
