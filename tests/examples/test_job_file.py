"""The example job files: every field of them is one, and means what it says."""

from __future__ import annotations

import re
from pathlib import Path

from workflows.ingestion.settings import IngestJob
from workflows.ingestion.source_settings import FilesSettings
from workflows.ingestion.sources import parse_source
from workflows.jobfile import load_job
from workflows.settings import EditJob, PlanJob

EXAMPLES = Path(__file__).parents[2] / "examples"
NIGHTLY = EXAMPLES / "nightly.yaml"
INGEST = EXAMPLES / "ingest.yaml"


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


def test_the_ingestion() -> None:
    job = load_job(IngestJob, config=INGEST)
    assert job.model == "smollm2" and job.executor == "inline"
    assert Path(job.registry).resolve() == EXAMPLES.parent / "runs" / "registry"
    source = parse_source(job.source)
    assert isinstance(source, FilesSettings)
    assert source.path == f"{EXAMPLES}/inbox/*.jsonl" and source.name == "inbox"
    assert [(gate.metric, gate.model) for gate in job.gates] == [
        ("score", None),
        ("score", "previous"),
        ("perplexity", "base"),
    ]
    assert job.seed == 0


def test_what_the_ingestion_says_in_comments_can_be_said(tmp_path: Path) -> None:
    text = re.sub(r"^( *)# ( *[a-z_]+: )", r"\1\2", INGEST.read_text(), flags=re.MULTILINE)
    config = tmp_path / "ingest.yaml"
    config.write_text(text)
    job = load_job(IngestJob, config=config)
    assert job.layers == (7, 8, 9) and job.targets == {"steps": 25}
    assert job.canary == f"{tmp_path}/canary.jsonl"
    assert job.source["where"] and job.source["templates"] == f"{tmp_path}/templates.yaml"
    assert job.hooks.keys() == {"success", "failure"}
    assert job.lineage["api_key_env"] == "MARQUEZ_KEY"
