"""The main job: a table of facts and a base model in, a patched checkpoint and a report out.

Reads top to bottom as the job runs. Nothing is visible at `out` before its last line but one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from cluster.artifacts import open_artifacts
from cluster.publication import Publication
from cluster.store import join
from memedit.config import EditSettings
from memedit.errors import InputError
from memedit.evaluate import leave_out
from memedit.executor import Executor
from memedit.manifest import (
    MANIFEST_NAME,
    FactsIdentity,
    Manifest,
    ModelIdentity,
    code_versions,
)
from memedit.outcome import (
    EditOutcome,
    FactCounts,
    LayerUpdate,
    TargetTrace,
)
from memedit.progress import Progress
from memedit.requests import EditBatch
from memedit.stages import SolvedLayer, judge
from memedit.targets import Target
from workflows.destination import destination
from workflows.editing import editing_for
from workflows.facts import FactTable, read_facts, write_facts, write_rejects
from workflows.judgements import FACTS_TABLE_NAME, write_judgements
from workflows.moments import TokenSource, corpus_of, load_stats
from workflows.product import Product, make_product
from workflows.progress import Timed
from workflows.protection import prompts_for_drift
from workflows.review import Review, ReviewAll, Trial, check_heldout
from workflows.session import (
    Base,
    contexts_of,
    encode_facts,
    open_base,
    open_workers,
    settings_of,
    settings_origin,
)
from workflows.settings import EditJob, new_run_id

FACTS_NAME = "facts.jsonl"
REJECTS_NAME = "rejects.jsonl"
REPORT_NAME = "report.html"


def run_edit(job: EditJob, progress: Progress) -> EditOutcome:
    """Run `memedit edit`.

    Raises:
        InputError: The input or the settings are wrong; nothing was written.
        GateError: A gate was not met; nothing was published.
        LockError: Another run publishes to the same place.
    """
    timed = Timed(progress)
    run_id = job.run_id or new_run_id()
    with destination(job, run_id) as publication:
        # Everything that can be wrong with the input is found before a weight is loaded.
        timed.start("load")
        table = read_facts(job.facts, on_bad_row=job.on_bad_row)
        outcome = edit_facts(
            job, table, publication, timed, run_id=run_id, review=ReviewAll(job=job)
        )
    return replace(outcome, timings_s=timed.timings_s)


def edit_facts(
    job: EditJob,
    table: FactTable,
    publication: Publication,
    timed: Timed,
    *,
    run_id: str,
    review: Review,
    counted: Base | None = None,
    notes: Mapping[str, Any] | None = None,
) -> EditOutcome:
    """Write the facts of a table into the job's model, and publish what comes out.

    Args:
        job: Model, settings and format; its facts are those of the table.
        table: The facts.
        publication: Where the version appears.
        timed: Told of each stage.
        run_id: Of the version.
        review: Judges what comes out.
        counted: The model whose second moments are used, where it is not the job's.
        notes: Kept among the settings in the manifest.

    Raises:
        InputError: The input or the settings are wrong; nothing was written.
        GateError: The review did not accept it; nothing was published.
    """
    timed.start("load")
    base = open_base(job, timed)
    settings = settings_of(job, base, len(table.requests), timed)
    table, encoded = encode_facts(
        table,
        base,
        contexts_of(settings, base, None),
        on_bad_row=job.on_bad_row,
        refuse=review.refuse,
    )
    names = {i: base.arch.checkpoint_key(i, base.checkpoint.names) for i in settings.layers}
    review.choose(table.requests)
    base.checkpoint.check_editable(names.values())
    base.checkpoint.check_finite()
    artifacts = open_artifacts(job.artifacts, cache=job.cache_folder, storage=job.storage_settings)
    source = TokenSource(
        corpus=corpus_of(job),
        base=counted or base,
        settings=settings.moments,
        heldout_tokens=job.evaluation_settings.heldout_tokens,
        artifacts=artifacts,
    )
    given = load_stats(job.stats, counted or base, settings, artifacts) if job.stats else None

    with open_workers(job, base.spec(), timed) as executor:
        _require_shared(executor, publication)
        executor.broadcast("probe", settings.layers)
        contexts = contexts_of(settings, base, executor)
        if settings.contexts.kind == "sampled":  # not known before the model runs
            table, encoded = encode_facts(
                table, base, contexts, on_bad_row=job.on_bad_row, refuse=review.refuse
            )
        batch = table.batch
        timed.finish("load")
        editing = editing_for(
            batch.requests,
            source,
            base=base,
            settings=settings,
            contexts=contexts,
            executor=executor,
            artifacts=artifacts,
            progress=timed,
            given=given,
        )
        heldout = source.heldout(executor, timed)
        judged = review.choose(batch.requests)
        before, reference = judge(
            executor,
            judged,
            heldout=heldout,
            elsewhere=prompts_for_drift(
                judged, heldout, base.tokenizer, base.positions, job.evaluation_settings
            ),
            reference=None,
            settings=job.evaluation_settings,
            progress=timed,
        )
        check_heldout(job, before)
        targets, quarantined = editing.targets(encoded)
        if quarantined:
            for case_id, reason in quarantined.items():
                table = table.reject(case_id, reason)
            if job.on_bad_row == "fail":
                table.require_no_rejects()
            review.refuse(table.rejects)
            table.require_requests()
            batch = table.batch
            encoded = [e for e in encoded if e.request.case_id not in quarantined]
            judged = [r for r in judged if r.case_id not in quarantined]
            before = leave_out(before, quarantined)
        edited = editing.solve(encoded, targets)
        solved = edited.solved

        product = make_product(job, base, solved, names, publication, timed)
        # What is judged is what was saved, not what is in memory.
        product.load(executor)
        after, _ = judge(
            executor,
            judged,
            heldout=heldout,
            reference=reference,
            settings=job.evaluation_settings,
            progress=timed,
        )
        outcome = EditOutcome(
            run_id=run_id,
            out=publication.location,
            manifest=join(publication.location, MANIFEST_NAME),
            method=settings.method,
            model=base.name,
            layers=settings.layers,
            facts=_counts(table, publication),
            before=before,
            after=after,
            traces=tuple(map(_trace, edited.targets)),
            updates=_updates(solved, product, names, _lam(settings)),
            moments=tuple(s.moment for s in solved),
            repairs=edited.rounds,
            timings_s=timed.timings_s,
            settings=asdict(settings)
            | {
                "origin": settings_origin(job, base, len(batch)),
                "resolved_contexts": list(contexts),
                "evaluation": asdict(job.evaluation_settings),
                "heldout": source.corpus.spec,
                "moments": dict(editing.moments.settings),
                "corpus": dict(editing.moments.corpus),
                "protected_prompts": editing.protected_prompts,
                "dtype": job.dtype,
                "device": base.device,
                "architecture": dict(job.architecture),
                **(notes or {}),
            },
            versions=code_versions(),
            report=join(publication.location, REPORT_NAME),
            format=product.format,
        )
        review.accept(
            Trial(
                outcome=outcome,
                base=base,
                executor=executor,
                judged=judged,
                heldout=heldout,
                reference=reference,
                progress=timed,
            )
        )

    write_facts(publication.staging / FACTS_NAME, batch.requests)
    if table.rejects:
        write_rejects(publication.staging / REJECTS_NAME, table.rejects)
    write_judgements(
        publication.staging / FACTS_TABLE_NAME,
        (
            ({"model": name}, evaluation.facts)
            for name, evaluation in (("before", outcome.before), ("after", outcome.after))
        ),
    )
    outcome = replace(outcome, timings_s=timed.timings_s)
    # Brings matplotlib, which need not lie in memory while the work is done.
    from workflows.report import write_report

    write_report(outcome, publication.staging / REPORT_NAME)
    publication.publish(_manifest(outcome, base, batch, product, editing.moments.digests))
    return outcome


def _counts(table: FactTable, publication: Publication) -> FactCounts:
    return FactCounts(
        read=table.read,
        accepted=len(table.requests),
        duplicates=len(table.duplicates),
        rejected=len(table.rejects),
        rejects=join(publication.location, REJECTS_NAME) if table.rejects else None,
    )


def _require_shared(executor: Executor, publication: Publication) -> None:
    """Check now, not after hours, that workers can load from the place that is written to."""
    with publication.probe() as name:
        if not all(executor.broadcast("sees", publication.files, name)):
            raise InputError(
                "not every worker sees this place; publish to one that all machines share",
                source=publication.location,
                field="out",
            )


def _lam(settings: EditSettings) -> float:
    assert settings.solve.lam is not None, "the defaults of every family set λ"
    return settings.solve.lam


def _trace(target: Target) -> TargetTrace:
    return TargetTrace(
        case_id=target.case_id,
        losses=target.losses,
        steps=len(target.losses),
        h_norm=target.h_norm,
        delta_norm=target.delta_norm,
        converged=target.converged,
    )


def _updates(
    solved: Sequence[SolvedLayer],
    product: Product,
    names: dict[int, str],
    lam: float,
) -> tuple[LayerUpdate, ...]:
    def updated(s: SolvedLayer) -> LayerUpdate:
        name = names[s.update.layer]
        tensor, adapter = product.tensors[name], product.ranks.get(name)
        return LayerUpdate(
            layer=s.update.layer,
            weight_name=name,
            delta_norm=tensor.delta_norm,
            weight_norm=tensor.weight_norm,
            lam=lam,
            residual_norm=s.residual_norm,
            rounding_error=tensor.rounding_error,
            rank=adapter.rank if adapter else None,
            truncation_error=adapter.truncation_error if adapter else None,
        )

    return tuple(map(updated, solved))


def _manifest(
    outcome: EditOutcome,
    base: Base,
    batch: EditBatch,
    product: Product,
    moment_digests: Mapping[int, str],
) -> Manifest:
    return Manifest(
        run_id=outcome.run_id,
        method=outcome.method,
        model=ModelIdentity(name=base.name, digest=base.checkpoint.digest),
        layers=outcome.layers,
        facts=FactsIdentity(digest=batch.digest, file=FACTS_NAME, count=len(batch)),
        settings=outcome.settings,
        moments={str(layer): digest for layer, digest in moment_digests.items()},
        files=product.files,
        tensors=product.tensors,
        format=product.format,
        ranks=product.ranks,
        metrics={"before": outcome.before.metrics, "after": outcome.after.metrics},
    )
