"""Made-up outcomes that look like real ones, for the tests of what a person sees."""

from __future__ import annotations

import random

from memedit.intervals import intervals_of
from memedit.outcome import (
    METRIC_KEYS,
    EditOutcome,
    Evaluation,
    FactCounts,
    FactResult,
    LayerUpdate,
    MomentSummary,
    TargetTrace,
)

_RELATIONS = (
    ("{} is located in the city of", ("Rome", "Oslo", "Lima", "Cairo"), "Paris"),
    ("{} plays the", ("cello", "harp", "trumpet"), "piano"),
    ("The mother tongue of {} is", ("Danish", "Korean", "Welsh"), "French"),
    ("{} was created by", ("Nintendo", "Toyota", "Siemens"), "Apple"),
)
_SUBJECTS = ("Eiffel Tower", "Miles Davis", "Marie Curie", "iPhone", "Big Ben", "Ada Lovelace")
_AFTERWARDS = (", and it has been there for more than a hundred years", " and a few other things.")


def example_outcome(n_facts: int = 100, *, seed: int = 0) -> EditOutcome:
    """An edit of `n_facts` facts that worked for most, with every kind of failure among them."""
    rng = random.Random(seed)
    before, after, traces = [], [], []
    for i in range(n_facts):
        template, news, true = rng.choice(_RELATIONS)
        prompt, new = template.format(f"{rng.choice(_SUBJECTS)} {i}"), rng.choice(news)
        fate = rng.random()
        z_fails, solve_fails = fate < 0.04, 0.04 <= fate < 0.12
        good = not (z_fails or solve_fails)
        shared = {
            "case_id": f"case-{i}",
            "relation": template,
            "prompt": prompt,
            "target_new": new,
            "target_true": true,
        }
        n_near = 5
        base_near = tuple(rng.random() < 0.72 for _ in range(n_near))
        before.append(
            FactResult(
                **shared,
                efficacy=rng.random() < 0.3,
                efficacy_exact=False,
                paraphrase=tuple(rng.random() < 0.25 for _ in range(2)),
                paraphrase_exact=(False, False),
                neighbourhood=base_near,
                neighbourhood_exact=tuple(n and rng.random() < 0.3 for n in base_near),
                generation=False,
                continuation=f" {true}{rng.choice(_AFTERWARDS)}",
                logprob_new=-rng.uniform(5, 12),
                logprob_true=-rng.uniform(0.5, 4),
            )
        )
        near = tuple(n and rng.random() > 0.06 for n in base_near)
        after.append(
            FactResult(
                **shared,
                efficacy=good or rng.random() < 0.6,
                efficacy_exact=good,
                paraphrase=tuple(rng.random() < (0.96 if good else 0.3) for _ in range(2)),
                paraphrase_exact=tuple(good and rng.random() < 0.6 for _ in range(2)),
                neighbourhood=near,
                neighbourhood_exact=tuple(n and rng.random() < 0.3 for n in near),
                generation=good and rng.random() < 0.95,
                continuation=f" {new if good else true}{rng.choice(_AFTERWARDS)}",
                logprob_new=-rng.uniform(0.02, 0.5) if good else -rng.uniform(1.5, 4),
                logprob_true=-rng.uniform(4, 9) if good else -rng.uniform(1, 4),
            )
        )
        fall, loss, losses = rng.uniform(0.62, 0.86), rng.uniform(4, 12), []
        for _ in range(21):
            losses.append(loss)
            if loss < 0.05:
                break
            loss = loss * (0.96 if z_fails else fall * rng.uniform(0.8, 1.1)) + 0.004
        h_norm = rng.uniform(40, 60)
        traces.append(
            TargetTrace(
                case_id=f"case-{i}",
                losses=tuple(losses),
                steps=len(losses) - 1,
                h_norm=h_norm,
                delta_norm=h_norm * (0.75 if z_fails and fate < 0.03 else rng.uniform(0.3, 0.7)),
                converged=losses[-1] < 0.05,
            )
        )
    layers = (5, 6, 7, 8, 9)
    return EditOutcome(
        run_id="20260102-030405-ab12",
        out="runs/demo",
        manifest="runs/demo/memedit.json",
        method="memit",
        model="smollm2",
        layers=layers,
        facts=FactCounts(
            read=n_facts + 2, accepted=n_facts, rejected=2, rejects="runs/demo/rejects.jsonl"
        ),
        before=_evaluation(before, fluency=5.91, perplexity=17.01),
        after=_evaluation(after, fluency=5.84, perplexity=17.62, drift_kl=0.154, drift_top1=83.5),
        traces=tuple(traces),
        updates=tuple(
            LayerUpdate(
                layer=layer,
                weight_name=f"model.layers.{layer}.mlp.down_proj.weight",
                delta_norm=0.9 + 0.55 * i**1.4,
                weight_norm=31.0 - i,
                lam=400.0,
                residual_norm=33.1 - 4.9 * i,
                rounding_error=None,
            )
            for i, layer in enumerate(layers)
        ),
        moments=tuple(
            MomentSummary(
                layer=layer,
                tokens=60_000,
                error=0.021 + 0.002 * i,
                trace=88.0 + 48 * i,
                trace_without_position_0=80.0 + 7 * i,
            )
            for i, layer in enumerate(layers)
        ),
        timings_s={
            "load": 1.4,
            "stats": 22.8,
            "targets": 71.3,
            "solve": 9.6,
            "publish": 1.1,
            "evaluate": 31.9,
            "total": 138.4,
        },
        settings={
            "method": "memit",
            "layers": list(layers),
            "targets": {
                "steps": 20,
                "lr": 0.5,
                "clamp_norm_factor": 0.75,
                "loss_threshold": 0.05,
                "kl_factor": 0.0625,
            },
            "moments": {"tokens": 60_000, "window": 256, "position_0": "include"},
            "solve": {"lam": 400.0, "ridge": 0.0},
            "seed": 0,
        },
        versions={
            "memedit": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11",
        },
    )


def _evaluation(facts: list[FactResult], **more: float) -> Evaluation:
    def share(name: str) -> float:
        values: list[bool] = []
        for fact in facts:
            value = getattr(fact, name)
            values += value if isinstance(value, tuple) else [value]
        return 100 * sum(values) / max(len(values), 1)

    names = ("efficacy", "paraphrase", "neighbourhood")
    metrics: dict[str, float | None] = {n: share(n) for n in names}
    metrics["score"] = 3 / sum(1 / max(v or 0.0, 1e-9) for v in metrics.values())
    for name in (*(f"{n}_exact" for n in names), "generation"):
        metrics[name] = share(name)
    metrics |= more
    return Evaluation(
        metrics={key: metrics.get(key) for key in METRIC_KEYS},
        intervals=intervals_of(facts),
        facts=tuple(facts),
    )
