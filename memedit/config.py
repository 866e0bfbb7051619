"""Settings of one edit: frozen, with the published defaults of each model family.

Every default names its source. Knows numbers; does not know YAML, flags or files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """The texts put before a prompt, so that a key does not depend on one context only.

    `fixed` uses `templates`; `sampled` lets the model continue `starts` (as the reference does),
    seeded; `none` uses the bare prompt only. The bare prompt is always the first context.
    """

    kind: Literal["fixed", "sampled", "none"] = "fixed"
    templates: tuple[str, ...] = ()
    starts: tuple[str, ...] = ("The", "Therefore", "Because", "I", "You")
    sampled_tokens: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """Optimisation of the z vectors (method.md, step 2; the paper's Eq. 16)."""

    steps: int = 20
    lr: float = 0.5
    clamp_norm_factor: float = 0.75
    v_weight_decay: float = 0.5
    kl_factor: float = 0.0625
    loss_threshold: float = 0.05
    tokens_per_batch: int | None = None
    """Token positions (facts times contexts times length, and a few more for what each row holds
    beside them) that are optimised at once; None for what suits the device. Changes speed and
    memory, and only the last bits of the result."""


@dataclass(frozen=True, kw_only=True)
class MomentSettings:
    """Collection of the second moments C_l = E[k kᵀ]."""

    tokens: int = 60_000
    """Stop after this many tokens; the reference's 100,000 documents are 200 times too many."""
    window: int = 256
    """Tokens per window; windows are drawn across documents."""
    seed: int = 0
    position_0: Literal["include", "exclude"] = "include"
    """Whether the first position (an attention sink in many models) counts."""
    tolerance: float = 0.0
    """Stop early once the estimated relative error of C is below this; 0 never stops early."""


@dataclass(frozen=True, kw_only=True)
class SolveSettings:
    """The layer update Δ = R Kᵀ (λ C + K Kᵀ)⁻¹."""

    lam: float | None = None
    """λ, the reference's `mom2_update_weight`; None takes the family's default, which may grow
    with the number of facts."""
    ridge: float = 0.0
    """Added to the diagonal of λ C as a fraction of its mean."""
    sums_above: int | None = None
    """With more facts than this a layer is solved from sums that are streamed over the workers, and
    nobody holds the keys of all; None where that is cheaper. Changes only the last bits."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How much is measured beside the facts, and in what portions."""

    drift_prompts: int = 200
    """At most this many prompts of facts that were not edited; 0 leaves drift out."""
    fluency_facts: int = 20
    """Continuations for the n-gram entropy; 0 leaves fluency out."""
    fluency_tokens: int = 50
    heldout_tokens: int = 2048
    """Held-out text is the same before and after: a small sample shows a small difference."""
    heldout_window: int = 256
    facts_per_portion: int = 64
    """Facts scored together, so that memory does not grow with the batch."""
    tokens_per_batch: int | None = None
    """Rows times columns of one forward pass; None for what suits the device."""


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """All that decides which numbers come out, given a base model, facts and a corpus."""

    method: Literal["memit"] = "memit"
    layers: tuple[int, ...] = ()
    contexts: ContextSettings = field(default_factory=ContextSettings)
    targets: TargetSettings = field(default_factory=TargetSettings)
    moments: MomentSettings = field(default_factory=MomentSettings)
    solve: SolveSettings = field(default_factory=SolveSettings)


def digest_of(*parts: object) -> str:
    """sha256 over dataclasses, mappings and plain values, in a canonical form."""

    def plain(value: object) -> object:
        return asdict(value) if hasattr(value, "__dataclass_fields__") else value  # type: ignore[call-overload]

    text = json.dumps([plain(p) for p in parts], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = [
    "ContextSettings",
    "EditSettings",
    "EvaluationSettings",
    "MomentSettings",
    "SolveSettings",
    "TargetSettings",
    "digest_of",
]
