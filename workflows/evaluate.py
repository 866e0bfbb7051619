"""`memedit evaluate`: the metrics of a checkpoint, and of its base, on a fact table.

Changes nothing. With `out` the result, the judgement of each fact and a page lie there, too, whole
or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from cluster.publication import RESULTS_NAME, open_publication
from cluster.store import join
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError
from memedit.files import Files
from memedit.intervals import changes_of
from memedit.model import ModelSpec, load_config, load_tokenizer, positions_of
from memedit.outcome import Evaluation, FactCounts
from memedit.progress import Progress
from memedit.prompts import check_prompts, encode, readable
from memedit.requests import EditRequest
from memedit.stages import judge
from workflows.corpora import open_corpus
from workflows.facts import FactTable, read_facts
from workflows.findings import Verdict, verdict
from workflows.judgements import (
    FACTS_TABLE_NAME,
    RelationMetrics,
    relation_metrics,
    write_judgements,
)
from workflows.metrics import SHOWN_RELATIONS
from workflows.models import resolve_model
from workflows.moments import CHARACTERS_PER_TOKEN
from workflows.plain import write_result
from workflows.progress import Timed
from workflows.protection import prompts_for_drift
from workflows.session import device_of_job, gpus_of_job, open_workers, sift
from workflows.settings import EvaluateJob, ModelJob, new_run_id
from workflows.wording import plural

PAGE_NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """How a model fares on a table of facts, beside its base where that was judged, too."""

    model: str
    base: str | None = None
    text: str | None = None
    """What the perplexity is measured on."""
    facts: FactCounts
    before: Evaluation | None = None
    """Of the base."""
    after: Evaluation
    changes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The 95% interval of how much each metric of facts has changed."""
    relations: Sequence[RelationMetrics] = ()
    """Of the model."""
    timings_s: Mapping[str, float] = field(default_factory=dict)
    out: str | None = None

    @property
    def verdict(self) -> Verdict:
        """What a person should conclude."""
        return verdict(self.before, self.after, f"{plural(self.facts.accepted, 'fact')} judged")

    def summary(self) -> dict[str, Any]:
        """The JSON object that `evaluate --json` prints."""
        counts = self.facts.to_dict()
        return {
            "model": self.model,
            "facts": {n: counts[n] for n in ("read", "accepted", "rejected", "duplicates")},
            **_measured(self.after),
            "before": None
            if self.before is None
            else {"model": self.base, **_measured(self.before)},
            "changes": {name: list(pair) for name, pair in self.changes.items()},
            "relations": [each.summary() for each in self.relations],
            "per_fact": [fact.to_dict() for fact in self.after.facts],
            "timings_s": dict(self.timings_s),
            "out": self.out,
            "report": None if self.out is None else join(self.out, PAGE_NAME),
        }


def _measured(found: Evaluation) -> dict[str, Any]:
    intervals = {name: list(pair) for name, pair in found.intervals.items()}
    return {"metrics": dict(found.metrics), "intervals": intervals}


def run_evaluate(job: EvaluateJob, progress: Progress) -> Evaluated:
    """Run `memedit evaluate`; a base is judged alike, and drift is measured against it.

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
        found = _evaluated(job, timed)
        if publication is not None:
            found = replace(found, out=publication.location)
            models = (("before", found.before), ("after", found.after))
            write_judgements(
                publication.staging / FACTS_TABLE_NAME,
                [({"model": name}, each.facts) for name, each in models if each is not None],
            )
            # Brings matplotlib, which need not lie in memory while the work is done.
            from workflows.evaluation_page import write_evaluation

            write_evaluation(found, publication.staging / PAGE_NAME)
            write_result(publication.staging / RESULTS_NAME, found.summary())
            publication.appear()
    return found


def _evaluated(job: EvaluateJob, timed: Timed) -> Evaluated:
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
    heldout = _heldout(job, places)
    for files in places:
        Checkpoint.open(files, cache=job.cache_folder).check_finite()
    requests = table.batch.requests
    if base_spec is None:  # nothing to compare with
        settings = replace(settings, drift_prompts=0)
    positions = min(positions_of(load_config(files)) for files in places)
    elsewhere = prompts_for_drift(
        requests, heldout, load_tokenizer(spec.files), positions, settings
    )
    judged = partial(
        judge,
        requests=requests,
        heldout=heldout,
        elsewhere=elsewhere,
        settings=settings,
        progress=timed,
    )
    before = reference = None
    with open_workers(job, base_spec or spec, timed) as executor:
        timed.finish("load")
        if base_spec is not None:
            before, reference = judged(executor, reference=None)
            executor.broadcast("load", spec)
        after, _ = judged(executor, reference=reference)
    return Evaluated(
        model=job.model,
        base=job.base,
        text=job.text,
        facts=FactCounts(
            read=table.read,
            accepted=len(requests),
            rejected=len(table.rejects),
            duplicates=len(table.duplicates),
        ),
        before=before,
        after=after,
        changes={} if before is None else changes_of(before.facts, after.facts),
        relations=relation_metrics(after.facts, most=SHOWN_RELATIONS),
        timings_s=timed.timings_s,
    )


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


def _heldout(job: EvaluateJob, places: Sequence[Files]) -> list[list[int]]:
    """Token ids of the first documents of the job's text, for the perplexity.

    Raises:
        InputError: There is no such text, or a model cannot read its windows to their ends.
    """
    if job.text is None:
        return []
    positions = min(positions_of(load_config(files)) for files in places)
    window = job.evaluation_settings.heldout_window
    if window > positions:
        raise InputError(
            f"{window} tokens; a window has at most {positions}, as far as the model reads",
            field="evaluation.heldout_window",
        )
    tokenizer = load_tokenizer(places[0])
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
