"""`memedit trace`: which states of a model bring back its facts, and which layers to edit.

Nothing of the model is changed. What is published are every effect in Parquet, their means, and a
page that begins with the proposal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from cluster.publication import RESULTS_NAME, open_publication
from memedit.config import TraceSettings
from memedit.effects import Curve, average, class_of, propose
from memedit.errors import InputError
from memedit.executor import Executor
from memedit.intervals import middle, resampled_means
from memedit.manifest import code_versions
from memedit.model import positions_of
from memedit.progress import Progress
from memedit.prompts import encode_completion, locate_subject
from memedit.requests import EditRequest
from memedit.trace_stages import find_spread, say_next, trace_all
from memedit.tracing import (
    KINDS,
    PARTS,
    FactTrace,
    TraceRequest,
    default_tokens_per_batch,
)
from memedit.writing import whole_file
from workflows.facts import read_facts
from workflows.plain import write_result
from workflows.progress import Timed
from workflows.session import Base, open_base, open_workers, sift
from workflows.settings import new_run_id
from workflows.study_settings import TraceJob

EFFECTS_NAME = "effects.parquet"
PAGE_NAME = "page.html"
_ASKED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Question:
    """A fact as token ids; `object_id` is the first token of its `target_true`, if it has one."""

    request: EditRequest
    ids: tuple[int, ...]
    subject_first: int
    subject_last: int
    object_id: int | None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A fact that was not traced, and why."""

    id: str
    subject: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A fact with its trace, and the texts of its tokens."""

    request: EditRequest
    place: TraceRequest
    trace: FactTrace
    tokens: tuple[str, ...]
    object: str


def run_trace(job: TraceJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit trace`; the folder appears whole or not at all.

    Raises:
        InputError: The input or the settings are wrong, or there is no fact to trace.
    """
    timed = Timed(progress)
    run_id = job.run_id or new_run_id()
    with open_publication(job.out, run_id=run_id, storage=job.storage_settings) as publication:
        timed.start("load")
        table = read_facts(job.facts, on_bad_row=job.on_bad_row)
        base = open_base(job, timed)
        settings = _filled_in(job.trace_settings, base)
        table, questions = sift(
            table, lambda request: encode_question(request, base), on_bad_row=job.on_bad_row
        )
        base.checkpoint.check_finite()
        with open_workers(job, base.spec(), timed) as executor:
            timed.finish("load")
            timed.start("select")
            chosen, skipped = choose(
                executor, questions, base.tokenizer, settings=settings, limit=job.limit
            )
            timed.finish("select")
            places = [place for _, place in chosen]
            spread = find_spread(executor, places) if places else 0.0
            traces = trace_all(executor, places, settings=settings, spread=spread, progress=timed)
        traced = []
        for (request, place), trace in zip(chosen, traces, strict=True):
            if trace.total > 0:
                texts = [str(base.tokenizer.decode([i])) for i in (*place.ids, place.target_id)]
                traced.append(
                    Traced(
                        request=request,
                        place=place,
                        trace=trace,
                        tokens=tuple(texts[:-1]),
                        object=texts[-1],
                    )
                )
            else:
                skipped.append(_skip(request, "the noise does not make its object less probable"))
        if not traced:
            raise InputError(
                f"none of its {len(skipped)} facts can be traced; {skipped[0].subject!r}:"
                f" {skipped[0].reason}",
                source=job.facts,
                field="facts",
            )
        result = {
            "run_id": run_id,
            "out": publication.location,
            "model": base.name,
            "settings": {**asdict(settings), "spread": spread},
            "facts": {
                "read": table.read,
                "accepted": len(table.requests),
                "traced": len(traced),
                "skipped": len(skipped),
            },
            **summarise(traced, seed=settings.seed),
            "skipped": [asdict(each) for each in skipped],
            "versions": code_versions(),
            "timings_s": timed.timings_s,
        }
        write_effects(publication.staging / EFFECTS_NAME, traced)
        from workflows.trace_page import write_trace_page  # brings matplotlib

        write_trace_page(result, traced, publication.staging / PAGE_NAME)
        write_result(publication.staging / RESULTS_NAME, result)
        publication.appear()
    return result


def _filled_in(settings: TraceSettings, base: Base) -> TraceSettings:
    """What was left open, decided here: workers of other sizes would decide otherwise."""
    batch = settings.tokens_per_batch
    return replace(
        settings,
        window=settings.window_of(base.arch.n_layers),
        tokens_per_batch=batch or default_tokens_per_batch(torch.device(base.device)),
    )


def encode_question(request: EditRequest, base: Base) -> Question:
    """Token ids of one fact.

    Raises:
        InputError: The subject cannot be located, or the prompt is longer than the model reads.
    """
    located = locate_subject(base.tokenizer, request.prompt, request.subject)
    if len(located.ids) > positions_of(base.config):
        raise InputError(
            f"{len(located.ids)} tokens; the model reads {positions_of(base.config)}",
            field="prompt",
        )
    object_id = None
    if request.target_true is not None:
        _, ids = encode_completion(base.tokenizer, request.text, request.target_true)
        object_id = ids[0] if ids else None
    return Question(
        request=request,
        ids=located.ids,
        subject_first=located.subject_first,
        subject_last=located.subject_last,
        object_id=object_id,
    )


def choose(
    executor: Executor,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: TraceSettings,
    limit: int,
) -> tuple[list[tuple[EditRequest, TraceRequest]], list[Skipped]]:
    """The first facts that are to be traced, and those before them that are not.

    The token that is watched is the first of `target_true`, or what the model says if there is
    none. Unless `settings.facts` is "all", a fact of which the model says something else is
    skipped: it is not known, so there is nothing to be found.
    """
    chosen: list[tuple[EditRequest, TraceRequest]] = []
    skipped: list[Skipped] = []
    for start in range(0, len(questions), _ASKED_AT_ONCE):
        asked = questions[start : start + _ASKED_AT_ONCE]
        said = say_next(executor, [question.ids for question in asked])
        for question, token in zip(asked, said, strict=True):
            if len(chosen) == limit:
                return chosen, skipped
            target = token if question.object_id is None else question.object_id
            if settings.facts == "said" and target != token:
                told = tokenizer.decode([token])
                skipped.append(_skip(question.request, f"the model goes on with {told!r}"))
                continue
            place = TraceRequest(
                case_id=question.request.case_id,
                ids=question.ids,
                subject_first=question.subject_first,
                subject_last=question.subject_last,
                target_id=target,
            )
            chosen.append((question.request, place))
    return chosen, skipped


def _skip(request: EditRequest, reason: str) -> Skipped:
    return Skipped(id=request.case_id, subject=request.subject, reason=reason)


def summarise(traced: Sequence[Traced], *, seed: int) -> dict[str, Any]:
    """Mean effects with their intervals, and the layers to edit; all in probability."""
    traces = [each.trace for each in traced]
    curves, gap_RL = average(traces, [each.place for each in traced], seed=seed)
    totals_F1 = torch.tensor([[trace.total] for trace in traces], dtype=torch.float64)
    low_1, high_1 = middle(resampled_means(totals_F1, seed=seed))
    proposal = propose(curves, gap_RL)
    return {
        "clean": sum(trace.clean for trace in traces) / len(traces),
        "corrupted": sum(trace.corrupted for trace in traces) / len(traces),
        "total_effect": {
            "mean": float(totals_F1.mean()),
            "interval": [float(low_1), float(high_1)],
        },
        "proposal": None
        if proposal is None
        else {
            "flag": proposal.flag,
            "layers": list(proposal.layers),
            "last_interval": [proposal.last_low, proposal.last_high],
            "gap": list(proposal.gap),
        },
        "curves": [_curve(curve) for curve in curves],
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(curve).items()}


def write_effects(path: Path, traced: Sequence[Traced]) -> None:
    """Every effect, one a row: fact, kind, layer and position, with the token there."""
    with whole_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(_rows(traced)), schema=_SCHEMA), partial)


_SCHEMA = pa.schema(
    [
        ("case_id", pa.string()),
        ("subject", pa.string()),
        ("prompt", pa.string()),
        ("object", pa.string()),
        ("clean", pa.float64()),
        ("corrupted", pa.float64()),
        ("kind", pa.string()),
        ("layer", pa.int64()),
        ("position", pa.int64()),
        ("token", pa.string()),
        ("position_class", pa.string()),
        ("effect", pa.float64()),
    ]
)


def _rows(traced: Sequence[Traced]) -> Iterator[dict[str, Any]]:
    for each in traced:
        trace, place = each.trace, each.place
        about = {
            "case_id": place.case_id,
            "subject": each.request.subject,
            "prompt": each.request.prompt,
            "object": each.object,
            "clean": trace.clean,
            "corrupted": trace.corrupted,
        }
        tokens = [
            {"position": position, "token": token, "position_class": class_of(position, place)}
            for position, token in enumerate(each.tokens)
        ]
        for kind in KINDS:
            for layer, effects in enumerate(trace.effects_LT[kind].tolist()):
                for token, effect in zip(tokens, effects, strict=True):
                    yield {**about, **token, "kind": kind, "layer": layer, "effect": effect}
        for part in PARTS:
            for layer, effect in enumerate(trace.severed_L[part].tolist()):
                severed = {"kind": f"{part}_severed", "layer": layer, "effect": effect}
                yield {**about, **tokens[place.subject_last], **severed}
