"""`memedit compare`: each method edits the same base with the same facts, and is judged alike.

Nothing is published but the comparison: a table of metrics, every judgement in Parquet, a page. A
method that fails on some number of facts has a row that says why, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cluster.artifacts import Artifacts, open_artifacts
from cluster.publication import RESULTS_NAME, open_publication
from memedit.config import ONE_LAYER, EvaluationSettings, MethodName
from memedit.drift import DriftReference
from memedit.errors import InputError, MemeditError, NumericalError
from memedit.executor import Executor
from memedit.manifest import code_versions
from memedit.outcome import Evaluation, FactResult, RepairRound
from memedit.progress import Progress, Silent
from memedit.requests import EditRequest
from memedit.stages import judge
from workflows.editing import Edited, Editing, editing_for
from workflows.facts import FactTable, read_facts
from workflows.judgements import Labels, relation_metrics, write_judgements
from workflows.metrics import SHOWN_RELATIONS
from workflows.mixing import Mixed, Pair, pairs_of
from workflows.moments import TokenSource, corpus_of, load_stats
from workflows.plain import write_result
from workflows.progress import Timed
from workflows.protection import prompts_for_drift
from workflows.session import (
    Base,
    contexts_of,
    encode_fact,
    encode_facts,
    open_base,
    open_workers,
    settings_of,
)
from workflows.settings import new_run_id
from workflows.study_settings import CompareJob
from workflows.wording import plural

BASE = "base"
JUDGEMENTS_NAME = "judgements.parquet"
PAGE_NAME = "page.html"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One method on one number of facts."""

    method: str
    edits: int
    layers: tuple[int, ...] = ()
    lam: float | None = None
    evaluation: Evaluation | None = None
    seconds: float = 0.0
    """For z vectors and updates; z that an earlier method has found is not sought again."""
    moved: float = 0.0
    """The largest ‖ΔW‖ / ‖W‖ of its layers."""
    repairs: tuple[RepairRound, ...] = ()
    failed: str | None = None
    """Why there is no evaluation."""

    def summary(self) -> dict[str, Any]:
        """Without the judgements of single facts."""
        found = self.evaluation
        facts = found.facts if found is not None else ()
        return {
            "method": self.method,
            "edits": self.edits,
            "layers": list(self.layers),
            "lam": self.lam,
            "metrics": None if found is None else dict(found.metrics),
            "intervals": {} if found is None else {n: list(p) for n, p in found.intervals.items()},
            "relations": [r.summary() for r in relation_metrics(facts, most=SHOWN_RELATIONS)],
            "seconds": self.seconds,
            "moved": self.moved,
            "repairs": [asdict(each) for each in self.repairs],
            "failed": self.failed,
        }


def run_compare(job: CompareJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit compare`; the folder appears whole or not at all.

    Raises:
        InputError: The input or the settings are wrong, or there are too few facts.
    """
    timed = Timed(progress)
    run_id = job.run_id or new_run_id()
    with open_publication(job.out, run_id=run_id, storage=job.storage_settings) as publication:
        timed.start("load")
        table = read_facts(job.facts, on_bad_row=job.on_bad_row)
        base = open_base(job, timed)
        settings = settings_of(job, base, job.edit_counts[-1], timed)  # doubts are told here, once
        layers: set[int] = set()
        for method in job.method_names:  # what is wrong with one is said before the others begin
            layers |= set(settings_of(job_of(job, method), base, 1, Silent()).layers)
        base.checkpoint.check_editable(
            base.arch.checkpoint_key(layer, base.checkpoint.names) for layer in layers
        )
        contexts = contexts_of(settings, base, None)
        table, _ = encode_facts(table, base, contexts, on_bad_row=job.on_bad_row)
        _need(table, job)
        pairs_of(table.batch.requests, job.pairs)  # refused before anything takes long
        base.checkpoint.check_finite()
        artifacts = open_artifacts(
            job.artifacts, cache=job.cache_folder, storage=job.storage_settings
        )
        with open_workers(job, base.spec(), timed) as executor:
            executor.broadcast("probe", tuple(sorted(layers)))
            timed.finish("load")
            comparison = _Comparison(
                job=job,
                base=base,
                table=table,
                executor=executor,
                artifacts=artifacts,
                progress=timed,
            )
            rows = list(comparison.rows())
            pairs = list(comparison.mixed())
        result = {
            "run_id": run_id,
            "out": publication.location,
            "model": base.name,
            "facts": {"read": table.read, "accepted": len(table.requests)},
            "rows": [row.summary() for row in rows],
            "pairs": [row.summary() for row in pairs],
            "versions": code_versions(),
            "timings_s": timed.timings_s,
        }
        write_judgements(
            publication.staging / JUDGEMENTS_NAME,
            _judgements(rows, pairs),
        )
        from workflows.comparison_page import write_comparison  # brings matplotlib

        write_comparison(result, publication.staging / PAGE_NAME)
        write_result(publication.staging / RESULTS_NAME, result)
        publication.appear()
    return result


def _judgements(
    rows: Sequence[Compared], pairs: Sequence[Mixed]
) -> Iterator[tuple[Labels, Sequence[FactResult]]]:
    """Every judgement, with what tells it apart from the others of its fact."""

    def labels(method: str, edits: int, pair: str = "", side: str = "") -> Labels:
        return {"method": method, "edits": edits, "pair": pair, "side": side}

    for row in rows:
        if row.evaluation is not None:
            yield labels(row.method, row.edits), row.evaluation.facts
    for mixed in pairs:
        for side, found in (("together", mixed.together), ("apart", mixed.apart)):
            if found is not None:
                pair = " + ".join(mixed.relations)
                yield labels(mixed.method, mixed.edits, pair, side), found.facts


def _need(table: FactTable, job: CompareJob) -> None:
    if len(table.requests) < job.edit_counts[-1]:
        raise InputError(
            f"{job.edit_counts[-1]} of them are asked for, and {job.facts} holds "
            f"{plural(len(table.requests), 'fact')} that can be edited",
            field="edits",
        )


def job_of(job: CompareJob, method: MethodName) -> CompareJob:
    """The job with one of its methods; λ is MEMIT's, and one of several layers is the last."""
    solve, layers = dict(job.solve), job.layers
    if method == "alphaedit":
        solve.pop("lam", None)
    if method in ONE_LAYER and layers:
        layers = layers[-1:]
    return replace(job, method=method, solve=solve, layers=layers)


@dataclass(frozen=True)
class _Asked:
    """What is judged, as `memedit.stages.judge` takes it."""

    requests: Sequence[EditRequest]
    settings: EvaluationSettings
    heldout: Sequence[Sequence[int]] = ()
    elsewhere: Sequence[str] = ()
    reference: DriftReference | None = None


_FACTS_ALONE = {"drift_prompts": 0, "fluency_facts": 0, "consistency_facts": 0}
"""To judge facts, and not what happened beside them."""


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    job: CompareJob
    base: Base
    table: FactTable
    executor: Executor
    artifacts: Artifacts
    progress: Timed

    def rows(self) -> Iterator[Compared]:
        """The base and every method, for each number of facts."""
        for count in self.job.edit_counts:
            # Canonical order is by digest: the first are as good as drawn.
            requests = self.table.batch.requests[:count]
            heldout = self._source("memit", count).heldout(self.executor, self.progress)
            settings = self.job.evaluation_settings
            elsewhere = prompts_for_drift(
                requests, heldout, self.base.tokenizer, self.base.positions, settings
            )
            asked = _Asked(requests, settings, heldout, elsewhere)
            before, reference = self._judged(asked)
            yield Compared(method=BASE, edits=count, evaluation=before)
            for method in self.job.method_names:
                yield self._row(method, requests, replace(asked, reference=reference))

    def mixed(self) -> Iterator[Mixed]:
        """Every method on each pair of relations, together and apart."""
        settings = replace(self.job.evaluation_settings, **_FACTS_ALONE)
        requests = self.table.batch.requests
        for pair in pairs_of(requests, self.job.pairs):
            asked = [*pair.judged[0], *pair.judged[1]]
            names = {request.case_id for request in asked}
            both = [request for request in requests if request.case_id in names]  # as edit has them
            for method in self.job.method_names:
                together = self._row(method, both, _Asked(asked, settings))
                apart = [
                    self._row(method, edited, _Asked(judged, settings))
                    for edited, judged in zip(pair.facts, pair.judged, strict=True)
                ]
                yield _mixed(pair, together, apart)

    def _row(self, method: MethodName, requests: Sequence[EditRequest], asked: _Asked) -> Compared:
        """A method on some facts."""
        edits = len(requests)
        self.progress.message(f"{method}, {plural(edits, 'fact')}")
        job = job_of(self.job, method)
        settings = settings_of(job, self.base, edits, Silent())
        row = Compared(method=method, edits=edits, layers=settings.layers, lam=settings.solve.lam)
        try:
            with self._editing(job, requests) as editing:
                began = time.perf_counter()
                edited = self._edited(editing, requests)
                row = replace(
                    row,
                    seconds=time.perf_counter() - began,
                    repairs=edited.rounds,
                    moved=self._moved(edited),
                )
                editing.install(edited)
                return replace(row, evaluation=self._judged(asked)[0])
        except (MemeditError, torch.OutOfMemoryError) as error:
            self.progress.message(f"{method}, {plural(edits, 'fact')}: {error}")
            return replace(row, failed=str(error))

    def _source(self, method: Any, count: int) -> TokenSource:
        settings = settings_of(job_of(self.job, method), self.base, count, Silent())
        return TokenSource(
            corpus=corpus_of(self.job),
            base=self.base,
            settings=settings.moments,
            heldout_tokens=self.job.evaluation_settings.heldout_tokens,
            artifacts=self.artifacts,
        )

    @contextmanager
    def _editing(self, job: CompareJob, requests: Sequence[EditRequest]) -> Iterator[Editing]:
        """A method that is ready to begin; the workers hold the base again afterwards."""
        base, executor, progress = self.base, self.executor, self.progress
        settings = settings_of(job, base, len(requests), Silent())
        source = self._source(job.method, len(requests))
        try:
            yield editing_for(
                requests,
                source,
                base=base,
                settings=settings,
                contexts=contexts_of(settings, base, executor),
                executor=executor,
                artifacts=self.artifacts,
                progress=progress,
                given=load_stats(job.stats, base, settings, self.artifacts) if job.stats else None,
            )
        finally:
            executor.broadcast("load", base.spec())

    def _edited(self, editing: Editing, requests: Sequence[EditRequest]) -> Edited:
        encoded = [encode_fact(each, self.base, editing.contexts) for each in requests]
        targets, quarantined = editing.targets(encoded)
        if quarantined:
            raise NumericalError(f"{plural(len(quarantined), 'fact')} cannot be optimised")
        return editing.solve(encoded, targets)

    def _moved(self, edited: Edited) -> float:
        checkpoint, shares = self.base.checkpoint, [0.0]
        for one in edited.solved:
            name = self.base.arch.checkpoint_key(one.update.layer, checkpoint.names)
            norm = float(checkpoint.read(name).double().norm())
            shares.append(float(one.update.delta_OI.norm()) / norm)
        return max(shares)

    def _judged(self, asked: _Asked) -> tuple[Evaluation, DriftReference]:
        return judge(
            self.executor,
            asked.requests,
            heldout=asked.heldout,
            elsewhere=asked.elsewhere,
            reference=asked.reference,
            settings=asked.settings,
            progress=self.progress,
        )


def _mixed(pair: Pair, together: Compared, apart: Sequence[Compared]) -> Mixed:
    row = Mixed(
        method=together.method, relations=pair.relations, edits=pair.edits, lam=together.lam
    )
    found = []
    for name, run in zip(("together", *pair.relations), (together, *apart), strict=True):
        if run.evaluation is None:
            return replace(row, failed=f"{name}: {run.failed}")
        found.append(run.evaluation)
    return row.with_judgements(*found)
