"""Made-up results of `compare`, `tune` and `trace`, for the tests of their pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from memedit.config import EditSettings, SolveSettings, TraceSettings
from memedit.outcome import Evaluation, FactResult
from memedit.requests import EditRequest
from memedit.tracing import KINDS, PARTS, FactTrace, TraceRequest
from tests.workflows.outcomes import example_outcome
from workflows.compare import BASE, Compared
from workflows.mixing import Mixed
from workflows.trace import Traced, summarise
from workflows.tuning_trial import Trial
from workflows.tuning_verdict import verdict_of

METHODS = ("memit", "memedit", "emmet", "alphaedit", "rome")
RELATIONS = (
    "{} is located in the city of",
    "The mother tongue of {} is",
    "{} plays the",
    "{} was created by",
    "{}, who holds a citizenship of the country that is named",
    "What does <b>{}</b> cost? It costs $5 & not $",
    "P17",
    "国{}の首都は何という名前の都市ですか、教えてください",
)
"""Templates of any length, signs of TeX and HTML, an id, and letters that are wide."""
PAIRS = (("{} plays the", "The mother tongue of {} is"), (RELATIONS[4], RELATIONS[5]))


def example_comparison(
    methods: Sequence[str] = METHODS,
    *,
    edits: Sequence[int] = (1, 10, 100),
    relations: Sequence[str] = RELATIONS,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    failing: Sequence[str] = ("alphaedit",),
) -> dict[str, Any]:
    """What `memedit compare` gives; those in `failing` fail on the most facts and the last pair."""
    rows = []
    for count in edits:
        before = of_relations(example_outcome(count).before, relations)
        rows.append(Compared(method=BASE, edits=count, evaluation=before))
        for seed, method in enumerate(methods):
            row = Compared(method=method, edits=count, layers=(5, 6, 7), lam=400.0, seconds=31.5)
            if method in failing and count == edits[-1]:
                rows.append(replace(row, failed="no null space; raise solve.null_threshold"))
                continue
            found = of_relations(example_outcome(count, seed=seed).after, relations)
            rows.append(replace(row, evaluation=found, moved=0.12))
    mixed = []
    for pair in pairs:
        for seed, method in enumerate(methods):
            one = Mixed(method=method, relations=pair, edits=40, lam=150.0)
            if method in failing and pair == pairs[-1]:
                mixed.append(replace(one, failed="together: no null space"))
                continue
            together, apart = (example_outcome(40, seed=seed + s).after for s in (10, 20))
            mixed.append(one.with_judgements(together, apart))
    return {
        "run_id": "20260102-030405-ab12",
        "model": "smollm2",
        "rows": [row.summary() for row in rows],
        "pairs": [row.summary() for row in mixed],
    }


def of_relations(found: Evaluation, relations: Sequence[str]) -> Evaluation:
    """The same judgements, of these relations by turns."""
    facts: list[FactResult] = [
        replace(fact, relation=relations[i % len(relations)]) for i, fact in enumerate(found.facts)
    ]
    return replace(found, facts=tuple(facts))


def example_tuning() -> dict[str, Any]:
    """What `memedit tune` gives: eleven trials, of which one fails."""
    start = EditSettings(method="memedit", layers=(5, 6, 7, 8, 9), solve=SolveSettings(lam=400.0))
    trials = []
    for number in range(1, 12):
        lam = 400.0 * 2 ** (number % 5 - 2)
        trial = Trial(
            number=number,
            moved="lam" if number > 1 else "",
            settings=replace(start, solve=SolveSettings(lam=lam)) if number > 1 else start,
            seconds=64.0,
            z_found=40 if number == 1 else 0,
            z_reused=0 if number == 1 else 40,
        )
        if number == 6:
            trials.append(
                replace(trial, failed="layer 9: the sums are not finite; raise solve.lam")
            )
        else:
            trials.append(replace(trial, evaluation=example_outcome(40, seed=number).after))
    chosen, base = trials[3], example_outcome(40, seed=50)
    first = replace(trials[0], number=0, evaluation=base.after)
    last = replace(chosen, evaluation=example_outcome(40, seed=51).after)
    summary = chosen.summary()
    verdict = verdict_of("score", before=first.evaluation, after=last.evaluation)
    return {
        "run_id": "20260102-030405-ab12",
        "model": "smollm2",
        "model_digest": "sha256:" + 64 * "5",
        "facts": {"file": "data/facts.jsonl", "tuning": 40, "heldout": 40},
        "method": "memedit",
        "objective": "score",
        "gates": ["perplexity<=base*1.1"],
        "searched": ["layers", "lam", "weight"],
        "origin": "measured for SmolLM2",
        "start": first.summary()["settings"],
        "chosen": summary["settings"],
        "trial": chosen.number,
        "verdict": {**verdict, "gates_missed": ["perplexity 27.1 is above 26.9"]},
        "base": {"heldout": dict(base.before.metrics)},
        "trials": [trial.summary() for trial in trials],
        "heldout": {"start": first.summary(), "chosen": last.summary()},
        "tuned": {"when": "2026-01-02 03:04 UTC"},
        "command": "memedit edit --config runs/tuned/settings.yaml --facts … --out …",
        "versions": {"memedit": "0.1.0", "torch": "2.13.0"},
    }


def example_traces(facts: int = 9, *, layers: int = 30) -> list[Traced]:
    """Traces in which the MLPs of early layers bring facts back at the subject's last token."""
    return [_traced(i, layers) for i in range(facts)]


def example_trace(traced: Sequence[Traced]) -> dict[str, Any]:
    """What `memedit trace` gives of these."""
    skipped = {"id": "s", "subject": "Big Ben", "reason": "the model goes on with ' the'"}
    return {
        "run_id": "20260102-030405-ab12",
        "model": "smollm2",
        "settings": asdict(TraceSettings(window=10)),
        "facts": {"read": len(traced) + 1, "traced": len(traced), "skipped": 1},
        **summarise(traced, seed=0),
        "skipped": [skipped],
    }


def _traced(number: int, layers: int) -> Traced:
    subject = ("Eiffel Tower", "Antidisestablishmentarianism & co", "Oslo")[number % 3]
    tokens = (*subject.split(" "), "is", "located", "in", "the", "city", "of", "\n")
    last, total = len(subject.split(" ")) - 1, 0.5 + 0.04 * number

    def effects(middle: float, place: int) -> torch.Tensor:
        """A hill over the layers at one place, some of it everywhere."""
        rows_L1 = torch.exp(-(((torch.arange(layers) - middle * layers) / 5) ** 2))[:, None]
        there_T = torch.full((len(tokens),), 0.1)
        there_T[place] = 0.8
        return total * rows_L1 * there_T

    places = {"hidden": (0.35, last), "mlp": (0.25, last), "attention": (0.7, len(tokens) - 1)}
    effects_LT = {kind: effects(*places[kind]) for kind in KINDS}
    hidden_L = effects_LT["hidden"][:, last]
    fall_L = torch.tensor([1 - math.exp(-layer / 6) for layer in range(layers)])
    request = EditRequest(
        case_id=f"case-{number}",
        subject=subject,
        prompt="{} is located in the city of",
        target_new="Rome",
    )
    return Traced(
        request=request,
        place=TraceRequest(
            case_id=request.case_id,
            ids=tuple(range(len(tokens))),
            subject_first=0,
            subject_last=last,
            target_id=7,
        ),
        trace=FactTrace(
            case_id=request.case_id,
            clean=total + 0.1,
            corrupted=0.1,
            effects_LT=effects_LT,
            severed_L={part: hidden_L * fall_L for part in PARTS},
        ),
        tokens=tokens,
        object=" Paris",
    )
