"""Side effects without an executor: its parts one after another, on a model at hand."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memedit.architecture import Architecture
from memedit.config import EvaluationSettings
from memedit.drift import DriftReference
from memedit.free_text import Sample
from memedit.requests import EditRequest
from memedit.side_effects import SideEffects, side_effect_parts, side_effects_of


def measure_side_effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arch: Architecture | None,
    requests: Sequence[EditRequest],
    *,
    heldout: Sequence[Sequence[int]] | None = None,
    elsewhere: Sequence[str] = (),
    reference: DriftReference | None = None,
    settings: EvaluationSettings | None = None,
) -> SideEffects:
    """What is measured of a model as a whole, in one process; see `side_effect_parts`."""
    settings = settings or EvaluationSettings()
    sample = (reference and reference.sample) or Sample.of(requests, settings)
    parts = side_effect_parts(
        requests,
        heldout=heldout,
        elsewhere=elsewhere,
        reference=reference,
        sample=sample,
        settings=settings,
    )
    results = [part.of(model, tokenizer, arch) for part in parts]
    return side_effects_of(parts, results, reference, sample)
