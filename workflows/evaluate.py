"""`memedit evaluate`: the metrics of a checkpoint on a fact table. Changes nothing.

With `out` the result and the judgement of each fact lie there, too, whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

from cluster.publication import RESULTS_NAME, open_publication
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError
from memedit.files import Files
from memedit.model import ModelSpec, load_config, load_tokenizer, positions_of
from memedit.outcome import FactResult
from memedit.progress import Progress
from memedit.prompts import check_prompts, encode, readable
from memedit.requests import EditRequest
from memedit.stages import judge, predictions
from workflows.corpora import open_corpus
from workflows.facts import FactTable, read_facts
from workflows.judgements import FACTS_TABLE_NAME, relation_metrics, write_judgements
from workflows.metrics import SHOWN_RELATIONS
from workflows.models import resolve_model
from workflows.moments import CHARACTERS_PER_TOKEN
from workflows.plain import write_result
from workflows.progress import Timed
from workflows.session import device_of_job, gpus_of_job, open_workers, sift
from workflows.settings import EvaluateJob, ModelJob, new_run_id


def run_evaluate(job: EvaluateJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit evaluate`; with `base`, drift is measured against that checkpoint.

    Raises:
        InputError: The input or the settings are wrong, or the weights hold NaN.
    """
    timed = Timed(progress)
    with ExitStack() as stack:
        publication = None
        if job.out is not None:
            run_id = job.run_id or new_run_id()
            publication = stack.enter_context(
                open_publication(job.out, run_id=run_id, storage=job.storage_settings)
            )
        result, facts = _evaluated(job, timed)
        if publication is not None:
            write_judgements(publication.staging / FACTS_TABLE_NAME, [({}, facts)])
            result["out"] = publication.location
            write_result(publication.staging / RESULTS_NAME, result)
            publication.appear()
    return result


def _evaluated(job: EvaluateJob, timed: Timed) -> tuple[dict[str, Any], Sequence[FactResult]]:
    """The result as plain values, and the judgements in it."""
    timed.start("load")
    table = read_facts(job.facts, on_bad_row=job.on_bad_row)
    settings = job.evaluation_settings
    spec = spec_of(job, job.model, timed)
    base_spec = None if job.base is None else spec_of(job, job.base, timed)
    if base_spec is not None and _vocabulary(base_spec) != _vocabulary(spec):
        raise InputError(
            f"its tokenizer is not that of {job.model}, so its predictions cannot be compared",
            source=job.base,
            field="base",
        )
    places = [each.files for each in (spec, base_spec) if each is not None]
    table = _readable(table, places, on_bad_row=job.on_bad_row)
    heldout = _heldout(job, spec.files)
    for files in places:
        Checkpoint.open(files, cache=job.cache_folder).check_finite()
    requests = table.batch.requests
    if base_spec is None:  # nothing to compare with
        settings = replace(settings, drift_prompts=0)
    reference = None
    with open_workers(job, base_spec or spec, timed) as executor:
        timed.finish("load")
        if base_spec is not None:
            reference = predictions(executor, requests, settings=settings, progress=timed)
            executor.broadcast("load", spec)
        evaluation, _ = judge(
            executor,
            requests,
            heldout=heldout,
            reference=reference,
            settings=settings,
            progress=timed,
        )
    relations = relation_metrics(evaluation.facts, most=SHOWN_RELATIONS)
    result = {
        "model": job.model,
        "facts": {
            "read": table.read,
            "accepted": len(requests),
            "rejected": len(table.rejects),
            "duplicates": len(table.duplicates),
        },
        "metrics": dict(evaluation.metrics),
        "intervals": {name: list(pair) for name, pair in evaluation.intervals.items()},
        "relations": [each.summary() for each in relations],
        "per_fact": [fact.to_dict() for fact in evaluation.facts],
        "timings_s": timed.timings_s,
        "out": None,
    }
    return result, evaluation.facts


def _readable(
    table: FactTable, places: Sequence[Files], *, on_bad_row: Literal["fail", "skip"]
) -> FactTable:
    """The facts that each of the models, whose tokenizers are equal, can read to their ends.

    Raises:
        InputError: A fact is too long and `on_bad_row` is "fail", or none is left.
    """
    tokenizer = load_tokenizer(places[0])
    positions = min(positions_of(load_config(files)) for files in places)

    def read(request: EditRequest) -> EditRequest:
        check_prompts(tokenizer, request, positions)
        return readable(tokenizer, request, positions)

    table, found = sift(table, read, on_bad_row=on_bad_row)
    return replace(table, requests=tuple(found))


def _vocabulary(spec: ModelSpec) -> Mapping[str, int]:
    vocabulary: Mapping[str, int] = load_tokenizer(spec.files).get_vocab()
    return vocabulary


def _heldout(job: EvaluateJob, files: Files) -> list[list[int]]:
    """Token ids of the first documents of the job's text, for the perplexity.

    Raises:
        InputError: There is no such text, or the model cannot read its windows to their ends.
    """
    if job.text is None:
        return []
    positions = positions_of(load_config(files))
    window = job.evaluation_settings.heldout_window
    if window > positions:
        raise InputError(
            f"{window} tokens; a window has at most {positions}, as far as the model reads",
            field="evaluation.heldout_window",
        )
    tokenizer = load_tokenizer(files)
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
    Checkpoint.open(resolved.files)
    return ModelSpec(
        files=resolved.files,
        device=device_of_job(job),
        dtype=job.dtype,
        gpus=gpus_of_job(job),
        overrides=dict(job.architecture),
        editable=False,
    )
