"""A job file, rendered for KubeRay in each of its kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.workflows.runs import Ran, memedit
from workflows.rayjob_starter import run_of

JOB = """\
# token: wJalrXUtnFEMI, as nobody should write
model: s3://models/pythia
facts: s3://facts/today.parquet
registry: s3://models/capitals
layers: 5-9
gate: ["score>=80"]
targets: {lr: 1e-1, steps: 15}
workers: 3
matrix_gflops: 10     # of `plan`
"""
NIGHTLY = ("--schedule", "0 2 * * *")
FULL = (
    *("--workers", 8, "--gpus-per-worker", 2, "--secret", "s3", "--volume-claim", "data"),
    *("--service-account", "reader", "--namespace", "models", "--head-gpus", 1),
    *("--time-zone", "Europe/Berlin", "--image", "registry.example.com:5000/memedit:1.2"),
)
KINDS: dict[str, tuple[object, ...]] = {
    "rayjob": ("--queue", "night"),
    "raycronjob": (*NIGHTLY, "--kind", "raycronjob"),
    "cronjob": (*NIGHTLY, "--queue", "night"),
}


def render(job: Path, *more: object) -> Ran:
    return memedit("render", "kubernetes", "--config", job, *more)


def made(job: Path, *more: object) -> dict[str, Any]:
    """The manifests by their kind."""
    ran = render(job, *more)
    assert ran.code == 0, ran.stderr
    found = list(yaml.safe_load_all(ran.stdout))
    assert len({each["kind"] for each in found}) == len(found)
    return {each["kind"]: each for each in found}


def ray_job(manifests: dict[str, Any]) -> dict[str, Any]:
    """The RayJob that runs in the end, whoever starts it."""
    if "RayJob" in manifests:
        found: dict[str, Any] = manifests["RayJob"]
        return found
    if "RayCronJob" in manifests:
        schedule = manifests["RayCronJob"]
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": schedule["metadata"],
            "spec": schedule["spec"]["jobTemplate"],
        }
    template = json.loads(manifests["ConfigMap"]["data"]["rayjob.json"])
    return run_of(template, job="memedit-capitals-nightly-29345678", uid="u-1")
