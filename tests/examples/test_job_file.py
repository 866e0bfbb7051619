"""The example job file: every field of it is one, and means what it says."""

from __future__ import annotations

from pathlib import Path

from workflows.jobfile import load_job
from workflows.settings import EditJob, PlanJob

NIGHTLY = Path(__file__).parents[2] / "examples" / "nightly.yaml"


def test_the_nightly_job() -> None:
    job = load_job(EditJob, config=NIGHTLY)
    assert job.registry == "s3://models/capitals" and job.out is None
    assert [gate.metric for gate in job.gates] == ["score"]
    assert job.storage_settings.arguments == {
        "ServerSideEncryption": "AES256",
        "StorageClass": "STANDARD_IA",
    }


def test_it_serves_plan_too() -> None:
    job = load_job(PlanJob, config=NIGHTLY)
    assert (job.model, job.facts) == ("s3://models/pythia-1.4b", "s3://facts/today.parquet")
