"""When a cluster would be through with a plan, and what moves between its machines.

Arithmetic over the stages of a plan and the units that they are cut into. Knows no Ray and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memedit.collect import TOKENS_PER_COUNT
from memedit.config import EditSettings
from memedit.cost import ModelShape, from_factors, sampled_at_once, si
from memedit.prompts import EncodedRequest
from memedit.stages import FACTS_PER_KEY_UNIT, FACTS_PER_SCORE_UNIT, target_units
from workflows.wording import plural

_NUMBER_BYTES = 8  # sums and updates are float64
_Z_BYTES = 4
REPAIRED = 0.2
"""The share of facts that a round of repair is taken to seek anew."""


@dataclass(frozen=True)
class Cut:
    """How a stage is handed out: `units` in each of `passes`, which wait for each other."""

    units: int
    passes: int = 1


def cuts(
    requests: Sequence[EncodedRequest],
    settings: EditSettings,
    shape: ModelShape,
    *,
    sampled: Sequence[int],
    counted: bool,
    protected: int = 0,
) -> dict[str, Cut]:
    """The units of each stage, as `memedit.stages` and `memedit.collect` make them.

    Args:
        requests: Encoded facts.
        settings: Those of the edit.
        shape: The model's.
        sampled: Tokens of each text that is sampled from the model.
        counted: Whether second moments are counted.
        protected: Tokens of the prompts that are protected.
    """
    window, facts = settings.moments.window, len(requests)
    at_once = window * sampled_at_once(shape, window=window)
    found = {
        "evaluation": Cut(math.ceil(facts / FACTS_PER_SCORE_UNIT), passes=2),
        "targets": Cut(len(target_units(requests, settings.targets))),
        "keys": Cut(
            math.ceil(facts / FACTS_PER_KEY_UNIT),
            passes=(1 + settings.repairs) * settings.solve.sweeps * len(settings.layers),
        ),
    }
    if settings.repairs:
        units = math.ceil(REPAIRED * found["targets"].units)
        found["repair"] = Cut(units, passes=settings.repairs)
    if sampled:
        found["sampling"] = Cut(sum(math.ceil(tokens / at_once) for tokens in sampled))
    if counted:
        found["statistics"] = Cut(math.ceil(settings.moments.tokens / TOKENS_PER_COUNT))
    if protected:
        found["protection"] = Cut(math.ceil(protected / TOKENS_PER_COUNT))
    return found


def schedule(
    stages: Mapping[str, Mapping[str, Any]], cut: Mapping[str, Cut], *, workers: int
) -> dict[str, Any]:
    """Each stage in rounds of equal units; what is not cut, the driver does alone."""
    rows: dict[str, Any] = {}
    total, busy = 0.0, 0.0
    for name, stage in stages.items():
        alone = float(stage["seconds"])
        if name not in cut:
            seconds, how = alone, "the driver alone"
        else:
            units, passes = cut[name].units, cut[name].passes
            rounds = math.ceil(units / workers)
            seconds = alone * rounds / units
            busy += alone
            how = (
                f"{plural(units, 'unit')} over {workers:,} workers: {plural(rounds, 'round')} of"
                + (
                    f" {alone / units / passes:.3g} s"
                    + (f", {passes} times one after the other" if passes > 1 else "")
                )
            )
        rows[name] = f"{seconds:.3g} s: {how}"
        total += seconds
    return {
        "workers": workers,
        "seconds": float(f"{total:.3g}"),
        "workers_busy": float(f"{busy / (workers * total):.3g}") if total else 1.0,
        **rows,
    }


def moved(
    shape: ModelShape,
    *,
    layers: Sequence[int],
    facts: int,
    workers: int,
    model_bytes: int,
    moments_per_layer: int,
    sweeps: int = 1,
    repairs: int = 0,
) -> dict[str, Any]:
    """Bytes between machines, at most: as if each worker had one of its own.

    Texts and token ids are too few to count.

    Args:
        shape: The model's.
        layers: The edited layers.
        facts: How many.
        workers: How many.
        model_bytes: Of the checkpoint.
        moments_per_layer: How many are counted: of the corpus, of the protected prompts.
        sweeps: Over the layers, in each solve.
        repairs: Rounds, each of which loads the base and solves again.
    """
    m, n, i, o, w = len(layers), facts, shape.inner, shape.hidden, workers
    loads, solved = 2 + repairs, sweeps * (1 + repairs) * m
    again = f" and {plural(repairs, 'round')} of repair" if repairs else ""
    amounts = {
        "models": (
            loads * w * model_bytes,
            f"base, edited{again}: {loads:,} × {w:,} workers × {si(model_bytes)}B",
        ),
        "z": (
            (1 + repairs) * n * o * _Z_BYTES,
            (f"{1 + repairs} × " if repairs else "") + f"{n:,} facts × {o:,} × {_Z_BYTES}",
        ),
    }
    if moments_per_layer:
        amounts["moments"] = (
            moments_per_layer * m * w * i**2 * _NUMBER_BYTES,
            f"{moments_per_layer} × {m} layers × {w:,} workers × {i:,}² × {_NUMBER_BYTES}, by rows",
        )
    if from_factors(shape, edits=n):
        amounts["keys"] = (
            solved * n * (i + o) * 4,
            f"{solved} layers × {n:,} facts × ({i:,} + {o:,}) × 4",
        )
        update, form = n * (i + o), f"{n:,} × ({i:,} + {o:,})"
    else:
        amounts["keys"] = (
            solved * w * i * (i + o) * _NUMBER_BYTES,
            f"{solved} layers × {w:,} workers × {i:,} × ({i:,} + {o:,}) × {_NUMBER_BYTES}, by rows",
        )
        amounts["residuals"] = (
            solved * n * o * _Z_BYTES,
            f"z handed out again, {solved} layers × {n:,} facts × {o:,} × {_Z_BYTES}",
        )
        update, form = i * o, f"{i:,} × {o:,}"
    amounts["updates"] = (
        solved * w * update * _NUMBER_BYTES,
        f"{solved} layers × {w:,} workers × {form} × {_NUMBER_BYTES}",
    )
    told: dict[str, Any] = {"bytes": sum(amount for amount, _ in amounts.values())}
    for name, (amount, how) in amounts.items():
        told[name] = f"{si(amount)}B = {how}"
    return told
