"""`memedit tune`: a search for settings that fit a model, on one half of some facts.

The facts are split by seed. Each trial edits the base with the first half and is judged on it; what
to try next is in `memedit.search`. Z vectors and statistics that a trial has found are kept like
those of any run, so that the next trial, and a search that was killed, need not find them again.
The second half is looked at once, at the end: the settings that were chosen and those that the
search began with, which are what `memedit edit` would take, are both judged on it.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cluster.artifacts import Artifacts, open_artifacts
from cluster.publication import RESULTS_NAME, open_publication
from cluster.store import join, open_file
from memedit import __version__
from memedit.config import EditSettings, EvaluationSettings
from memedit.errors import GateError, InputError, NumericalError
from memedit.evaluate import measurable
from memedit.manifest import code_versions
from memedit.outcome import Evaluation
from memedit.progress import Progress, Silent
from memedit.requests import EditBatch, EditRequest
from memedit.search import Proposal, Rank, Space, search, searchable, values_of
from memedit.writing import whole_file
from workflows.facts import FactTable, read_facts
from workflows.metrics import METRIC
from workflows.moments import STATS_NAME, TokenSource, corpus_of, load_stats
from workflows.origin import TunedRecord, digest_of_tuned, located
from workflows.plain import write_result
from workflows.progress import Timed
from workflows.review import check_measurable
from workflows.session import (
    Base,
    contexts_of,
    encode_facts,
    open_base,
    open_workers,
    settings_of,
    settings_origin,
)
from workflows.settings import new_run_id
from workflows.tuned_settings import SETTINGS_NAME, settings_text
from workflows.tuning_settings import TuneJob
from workflows.tuning_table import TRIALS_NAME, write_trials
from workflows.tuning_trial import Bench, Half, Trial
from workflows.tuning_verdict import verdict_of
from workflows.wording import SETTING_NAMES, plural, setting_text

PAGE_NAME = "page.html"


def run_tune(job: TuneJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit tune`; the folder appears whole or not at all.

    Raises:
        InputError: The input or the settings are wrong, or there are too few facts.
        GateError: No settings that were tried meet the gates; nothing was written.
    """
    timed = Timed(progress)
    run_id = job.run_id or new_run_id()
    with open_publication(job.out, run_id=run_id, storage=job.storage_settings) as publication:
        timed.start("load")
        table = read_facts(job.facts, on_bad_row=job.on_bad_row)
        base = open_base(job, timed)
        start = settings_of(job, base, max(1, len(table.requests) // 2), Silent())
        contexts = contexts_of(start, base, None)
        table, _ = encode_facts(table, base, contexts, on_bad_row=job.on_bad_row)
        halves = _halves(table, job)
        # λ of so many as can be encoded.
        start = settings_of(job, base, len(halves[0]), Silent())
        base.checkpoint.check_editable(
            base.arch.checkpoint_key(layer, base.checkpoint.names) for layer in start.layers
        )
        base.checkpoint.check_finite()
        artifacts = open_artifacts(
            job.artifacts, cache=job.cache_folder, storage=job.storage_settings
        )
        source = TokenSource(
            corpus=corpus_of(job),
            base=base,
            settings=start.moments,
            heldout_tokens=job.evaluation_settings.heldout_tokens,
            artifacts=artifacts,
        )
        space = _space(job, base, start, artifacts)
        with open_workers(job, base.spec(), timed) as executor:
            executor.broadcast("probe", start.layers)
            contexts = contexts_of(start, base, executor)
            if start.contexts.kind == "sampled":  # not known before the model runs
                table, _ = encode_facts(table, base, contexts, on_bad_row=job.on_bad_row)
                halves = _halves(table, job)
                start = settings_of(job, base, len(halves[0]), Silent())
            timed.finish("load")
            bench = Bench(
                job=job,
                base=base,
                contexts=contexts,
                executor=executor,
                artifacts=artifacts,
                source=source,
                progress=timed,
            )
            timed.message(
                f"{plural(len(halves[0]), 'fact')} to search with, {len(halves[1])} held out; the "
                f"search begins with {settings_origin(job, base, len(halves[0]))}",
                warning=False,
            )
            found = _found(job, bench, start, space, halves, table)
        result = {
            "run_id": run_id,
            "out": publication.location,
            "settings_file": join(publication.location, SETTINGS_NAME),
            "model": base.name,
            "model_digest": base.checkpoint.digest,
            "facts": {
                "file": job.facts,
                "read": table.read,
                "accepted": len(found.tuning.requests) + len(found.heldout.requests),
                "tuning": len(found.tuning.requests),
                "heldout": len(found.heldout.requests),
            },
            "method": start.method,
            "objective": job.objective,
            "gates": list(job.gate),
            "searched": list(space.names),
            "origin": settings_origin(job, base, len(halves[0])),
            **found.summary(),
            "versions": code_versions(),
            "timings_s": timed.timings_s,
        }
        if found.missed or found.verdict["tone"] == "worse":
            timed.message("; ".join([found.verdict["text"], *found.missed]))
        record = TunedRecord(
            model=base.name,
            model_digest=base.checkpoint.digest,
            facts=job.facts,
            facts_digest=EditBatch.of(found.tuning.requests).digest,
            facts_at_once=len(found.tuning.requests),
            settings_digest=digest_of_tuned(found.chosen.settings),
            corpus=located(source.corpus.spec),
            stats=located(job.stats) if job.stats else None,
            objective=job.objective,
            trials=len(found.trials),
            when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            run_id=run_id,
            memedit=__version__,
        )
        result["tuned"] = asdict(record)
        result["command"] = record.command(result["settings_file"])
        text = settings_text(
            job, found.chosen.settings, record, contexts=contexts, verdict=found.verdict["text"]
        )
        with whole_file(publication.staging / SETTINGS_NAME) as partial:
            partial.write_text(text, encoding="utf-8")
        write_trials(result, publication.staging / TRIALS_NAME)
        from workflows.tuning_page import write_tuning  # brings matplotlib

        write_tuning(result, publication.staging / PAGE_NAME)
        write_result(publication.staging / RESULTS_NAME, result)
        publication.appear()
    return result


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What was tried on one half of the facts, and what of it was judged on the other."""

    tuning: Half
    heldout: Half
    trials: Sequence[Trial]
    chosen: Trial
    at_first: Trial
    """The settings that the search began with, on the held-out half."""
    at_last: Trial
    """Those that it chose; the same if they are the same."""
    verdict: Mapping[str, Any]
    missed: Sequence[str]
    """The gates that those miss on the held-out half."""

    def summary(self) -> dict[str, Any]:
        """As plain values, without the judgements of single facts."""
        return {
            "start": values_of(self.at_first.settings),
            "chosen": values_of(self.chosen.settings),
            "trial": self.chosen.number,
            "verdict": {**self.verdict, "gates_missed": list(self.missed)},
            "base": {
                "tuning": dict(self.tuning.before.metrics),
                "heldout": dict(self.heldout.before.metrics),
            },
            "trials": [trial.summary() for trial in self.trials],
            "heldout": {"start": self.at_first.summary(), "chosen": self.at_last.summary()},
        }


def _found(
    job: TuneJob,
    bench: Bench,
    start: EditSettings,
    space: Space,
    halves: tuple[Sequence[EditRequest], Sequence[EditRequest]],
    table: FactTable,
) -> _Found:
    """Search with the first half; then, and only then, look at the second."""
    tuning = bench.half(halves[0], _while_searching(job))
    _check_measured(job, tuning.before)
    tuning, first = tuning.begun(start, 1)
    for case_id, reason in first.quarantined.items():
        table = table.reject(case_id, reason)
    if first.quarantined:
        table.require_no_rejects()
    _check_measured(job, tuning.before)
    trials = list(_trials(job, first, space, tuning, bench.progress))
    chosen = _chosen(job, trials, tuning)
    heldout = bench.half(halves[1], job.evaluation_settings)
    heldout, at_first = heldout.begun(start, 0)
    at_last = at_first
    if chosen.settings != start:
        at_last = heldout.tried(Proposal(settings=chosen.settings, moved=""), chosen.number)
    return _Found(
        tuning=tuning,
        heldout=heldout,
        trials=trials,
        chosen=chosen,
        at_first=at_first,
        at_last=at_last,
        verdict=verdict_of(
            job.objective,
            before=at_first.evaluation,
            after=at_last.evaluation,
            failed=at_last.failed,
        ),
        missed=[why for gate in job.gates if (why := heldout.missed(gate, at_last))],
    )


def _check_measured(job: TuneJob, before: Evaluation) -> None:
    """A corpus may have been too small to hold text out, or the base's figures not finite.

    Raises:
        InputError: A metric that decides says nothing of the base.
    """
    for name in _deciding(job):
        value = before.metrics[name]
        if value is not None and math.isfinite(value):
            continue
        raise InputError(
            f"{name} is measured on {METRIC[name].needs}, and there is none"
            if value is None
            else f"{name} of the base is {value}",
            source=job.facts,
            field="objective" if name == job.objective else "gate",
        )


def _while_searching(job: TuneJob) -> EvaluationSettings:
    """What a trial is judged by: free text takes long, and is written only if it decides."""
    texts = {"fluency": "fluency_facts", "consistency": "consistency_facts"}
    decides = _deciding(job)
    left_out = {field: 0 for name, field in texts.items() if name not in decides}
    return replace(job.evaluation_settings, **left_out)


def _deciding(job: TuneJob) -> list[str]:
    """The metrics that decide what is chosen."""
    return list(dict.fromkeys((job.objective, *(gate.metric for gate in job.gates))))


def _halves(
    table: FactTable, job: TuneJob
) -> tuple[tuple[EditRequest, ...], tuple[EditRequest, ...]]:
    """The facts to search with and those to judge with, drawn by seed, each in canonical order.

    Raises:
        InputError: There are too few, or what is asked for cannot be measured on them.
    """
    requests = table.batch.requests
    if len(requests) < 2:
        raise InputError(
            f"{job.facts} holds {plural(len(requests), 'fact')} that can be edited; one half is to "
            "search with and one to judge with",
            field="facts",
        )
    drawn = set(random.Random(job.seed or 0).sample(range(len(requests)), len(requests) // 2))
    tuning = tuple(each for i, each in enumerate(requests) if i in drawn)
    heldout = tuple(each for i, each in enumerate(requests) if i not in drawn)
    for half in (tuning, heldout):
        check_measurable(job.gates, half, job.evaluation_settings, job.facts)
        if job.objective not in measurable(half, job.evaluation_settings):
            raise InputError(
                f"{job.objective} is measured on {METRIC[job.objective].needs}, and a half of "
                "these facts has none; efficacy_exact is measured on any",
                source=job.facts,
                field="objective",
            )
    return tuning, heldout


def _space(job: TuneJob, base: Base, start: EditSettings, artifacts: Artifacts) -> Space:
    """What the job lets move, and the layers that may be edited.

    Raises:
        InputError: There is nothing to search, or the given statistics are not of this model.
    """
    known = searchable(start.method)
    names = job.searched or known
    if wrong := [name for name in names if name not in known]:
        raise InputError(
            f"{start.method} has no {', '.join(wrong)}; it has {', '.join(known)}", field="search"
        )
    blocks = base.arch.n_layers
    layers = frozenset(range(blocks - 1)) | frozenset(start.layers)
    if job.stats:
        load_stats(job.stats, base, start, artifacts)
        counted = json.loads(open_file(join(job.stats, STATS_NAME)).read())["moments"]
        layers &= frozenset(map(int, counted))
    return Space(names=tuple(names), layers=layers, blocks=blocks)


def _trials(
    job: TuneJob, first: Trial, space: Space, tuning: Half, progress: Progress
) -> Iterator[Trial]:
    """The first trial and those that follow, until there is nothing left to try, or no time."""
    began = time.monotonic() - first.seconds
    proposals = search(first.settings, space)
    proposal: Proposal | None = next(proposals)
    best: Rank | None = None
    number = 0
    while proposal is not None:
        number += 1
        trial = first if number == 1 else tuning.tried(proposal, number)
        rank = tuning.rank(trial)
        leads = rank is not None and (best is None or rank > best)
        best = rank if leads else best
        progress.message(
            f"trial {number} of {job.trials} at most: {_told(job, trial)}"
            f"{', the best so far' if leads and number > 1 else ''}",
            warning=False,
        )
        yield trial
        spent = time.monotonic() - began
        if number == job.trials or (job.budget_s is not None and spent >= job.budget_s):
            return
        try:
            proposal = proposals.send(rank)
        except StopIteration:
            proposal = None


def _told(job: TuneJob, trial: Trial) -> str:
    where = ", ".join(
        f"{SETTING_NAMES[name]} {setting_text(value)}"
        for name, value in values_of(trial.settings).items()
    )
    if trial.evaluation is None:
        return f"{where}: {trial.failed}"
    metric = METRIC[job.objective]
    return f"{where}: {metric.label.lower()} {metric.show(trial.evaluation.metrics[metric.key])}"


def _chosen(job: TuneJob, trials: Sequence[Trial], tuning: Half) -> Trial:
    """The best of them; of equals the first.

    Raises:
        NumericalError: None went well.
        GateError: None meets the gates.
    """
    ranks = {trial.number: tuning.rank(trial) for trial in trials}
    well = [(rank, -number) for number, rank in ranks.items() if rank is not None]
    if not well:
        raise NumericalError(
            f"none of {plural(len(trials), 'trial')} went well; the first: {trials[0].failed}"
        )
    _, number = max(well)
    trial = trials[-number - 1]
    if missed := [why for gate in job.gates if (why := tuning.missed(gate, trial))]:
        raise GateError(
            f"none of {plural(len(trials), 'trial')} meets the gates; the nearest: "
            f"{_told(job, trial)}: {'; '.join(missed)}"
        )
    return trial
