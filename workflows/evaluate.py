"""`memedit evaluate`: the metrics of a checkpoint on a fact table. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from memedit.checkpoint import Checkpoint
from memedit.errors import InputError
from memedit.executor import InlineExecutor
from memedit.model import ModelSpec, load_tokenizer
from memedit.progress import Progress
from memedit.prompts import encode
from memedit.stages import judge, once
from workflows.corpora import open_corpus
from workflows.facts import read_facts
from workflows.models import resolve_model
from workflows.progress import Timed
from workflows.session import CHARACTERS_PER_TOKEN, device_of_job
from workflows.settings import EvaluateJob, ModelJob


def run_evaluate(job: EvaluateJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit evaluate`; with `base`, drift is measured against that checkpoint."""
    timed = Timed(progress)
    timed.start("load")
    table = read_facts(job.facts, on_bad_row=job.on_bad_row)
    requests = table.batch.requests
    settings = job.evaluation_settings
    reference = None
    spec = spec_of(job, job.model, timed)
    if job.base is not None:
        base_spec = spec_of(job, job.base, timed)
        if _vocabulary(base_spec) != _vocabulary(spec):
            raise InputError(
                f"its tokenizer is not that of {job.model}, so its predictions cannot be compared",
                source=job.base,
                field="base",
            )
        only_drift = replace(settings, fluency_facts=0)
        with InlineExecutor(base_spec) as executor:
            _, reference = once(executor, "damage", requests, (), None, only_drift)
    with InlineExecutor(spec) as executor:
        timed.finish("load")
        evaluation, _ = judge(
            executor,
            requests,
            heldout=_heldout(job, spec.folder),
            reference=reference,
            settings=settings,
            progress=timed,
        )
    metrics = evaluation.metrics
    if reference is None:
        metrics = {**metrics, "drift_kl": None, "drift_top1": None}  # nothing to compare with
    return {
        "model": job.model,
        "facts": {
            "read": table.read,
            "accepted": len(requests),
            "rejected": len(table.rejects),
            "duplicates": len(table.duplicates),
        },
        "metrics": metrics,
        "per_fact": [fact.to_dict() for fact in evaluation.facts],
        "timings_s": timed.timings_s,
    }


def _vocabulary(spec: ModelSpec) -> Mapping[str, int]:
    vocabulary: Mapping[str, int] = load_tokenizer(spec.folder).get_vocab()
    return vocabulary


def _heldout(job: EvaluateJob, folder: Path) -> list[list[int]]:
    """Token ids of the first documents of the job's text, for the perplexity."""
    if job.text is None:
        return []
    tokenizer = load_tokenizer(folder)
    wanted = job.evaluation_settings.heldout_tokens
    found: list[list[int]] = []
    for document in open_corpus(job.text).documents():
        if sum(map(len, found)) >= wanted:
            break
        found.append(encode(tokenizer, document[: wanted * CHARACTERS_PER_TOKEN]))
    return found


def spec_of(job: ModelJob, name: str, progress: Progress) -> ModelSpec:
    """What to load in order to look at a model, whether or not it can be edited."""
    resolved = resolve_model(name, cache=job.cache_folder, progress=progress)
    Checkpoint.open(resolved.folder)
    return ModelSpec(
        folder=resolved.folder,
        device=device_of_job(job),
        dtype=job.dtype,
        overrides=dict(job.architecture),
        editable=False,
    )
