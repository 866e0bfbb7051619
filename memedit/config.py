"""Settings of one edit: frozen, with the published defaults of each model family.

Every default names its source. Knows numbers; does not know YAML, flags or files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

MethodName = Literal["memit", "memedit", "emmet", "alphaedit", "rome", "ft"]
"""The editing methods; `memedit` is MEMIT with protected keys and repair, `ft` is FT-W."""

ONE_LAYER: frozenset[MethodName] = frozenset(("rome", "ft"))
"""Methods that edit a single layer."""


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
    """The layer update, for MEMIT Δ = R Kᵀ (λ C + K Kᵀ)⁻¹."""

    lam: float | None = None
    """λ, the reference's `mom2_update_weight`; None takes the family's default, which may grow
    with the number of facts. For AlphaEdit the weight of the identity; EMMET has none."""
    ridge: float = 0.0
    """Added to the diagonal of λ C as a fraction of its mean."""
    null_threshold: float = 0.02
    """AlphaEdit: an eigenvector of C whose eigenvalue is below this is one of its null space."""
    sweeps: int = 1
    """How often the layers are gone through from the lowest up; a further sweep spreads over them
    what the facts still miss."""
    sums_above: int | None = None
    """With more facts than this a layer is solved from sums that are streamed over the workers, and
    nobody holds the keys of all; None where that is cheaper. Changes only the last bits."""


@dataclass(frozen=True, kw_only=True)
class ProtectSettings:
    """Keys that must keep their values beside those of the corpus (method `memedit`).

    They are the keys of prompts that say of other subjects what the facts say of theirs, and enter
    the solve with a residual of zero: A = λ (C + weight · C_p) + K Kᵀ.
    """

    prompts: int = 300
    """So many prompts; 0 protects nothing."""
    weight: float = 3.0
    """Of the mean C_p of their keys, against 1 of the corpus' C."""
    source: Literal["neighbourhood", "templates"] = "neighbourhood"
    """Of the facts' neighbourhood prompts, of which about half is never protected so that drift can
    be measured there, filled up with the facts' own templates with names out of the corpus; or the
    latter alone."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """Another attempt at the facts that the edited model does not say (method `memedit`)."""

    rounds: int = 2
    """At most so many; 0 repairs nothing."""
    drift: float = 1.0
    """A round is kept if more facts are said after it, and the drift has grown by no more than this
    fraction for each time that it halves the facts which are not said: at 1, by no larger factor
    than those have become fewer."""
    prompts: int = 100
    """On so many prompts like the protected ones, but not protected, is that drift measured."""


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """Fine-tuning of one rewrite weight (method `ft`); the defaults are the reference's."""

    steps: int = 25
    """Passes over all facts at most."""
    lr: float = 5e-4
    weight_decay: float = 5e-4
    batch: int = 64
    """Facts per update."""
    loss_threshold: float = 0.01
    seed: int = 0
    """Of the order of the facts."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """Causal tracing (ROME, section 2 and appendix B; MEMIT, section 4.1)."""

    noise: float = 3.0
    """Of what is added to the embeddings of the subject's tokens, in standard deviations of the
    embeddings of all traced subjects."""
    samples: int = 10
    """Corrupted runs of a fact; their probabilities are averaged."""
    window: int | None = None
    """Layers around one whose MLP or attention outputs are restored together; None takes a third of
    the layers, ten at most (the papers' number)."""
    facts: Literal["said", "all"] = "said"
    """`said` traces the facts whose object's first token the model says, as the papers do; `all`
    those, too, whose object is only less probable once the subject is corrupted."""
    seed: int = 0
    tokens_per_batch: int | None = None
    """Rows times columns of one forward pass, with the tokens before, whose states each row takes
    along; None for what suits the device. Changes speed and memory, and only the last bits of the
    result."""

    def window_of(self, n_layers: int) -> int:
        """The number of layers that are restored together."""
        return self.window or min(10, -(-n_layers // 3))


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How much is measured beside the facts, and in what portions."""

    drift_prompts: int = 200
    """At most this many prompts of facts that were not edited; 0 leaves drift out."""
    fluency_facts: int = 20
    """Continuations for the n-gram entropy; 0 leaves fluency out."""
    fluency_tokens: int = 50
    consistency_facts: int = 20
    """Of the facts with generation prompts and references, for which the model writes free text."""
    consistency_tokens: int = 100
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

    method: MethodName = "memit"
    layers: tuple[int, ...] = ()
    contexts: ContextSettings = field(default_factory=ContextSettings)
    targets: TargetSettings = field(default_factory=TargetSettings)
    moments: MomentSettings = field(default_factory=MomentSettings)
    solve: SolveSettings = field(default_factory=SolveSettings)
    protect: ProtectSettings = field(default_factory=ProtectSettings)
    repair: RepairSettings = field(default_factory=RepairSettings)
    finetune: FineTuneSettings = field(default_factory=FineTuneSettings)

    @property
    def repairs(self) -> int:
        """Rounds of repair at most; 0 for methods that repair nothing."""
        return self.repair.rounds if self.method == "memedit" else 0

    def of_method(self) -> dict[str, object]:
        """As plain values: what tells one edit from another, without what its method ignores."""
        used = {"memedit": ("protect", "repair"), "ft": ("finetune",)}.get(self.method, ())
        others = {"protect", "repair", "finetune"} - set(used)
        found = {name: value for name, value in asdict(self).items() if name not in others}
        if self.solve.sweeps == 1:  # what was made before there were several keeps its name
            del found["solve"]["sweeps"]
        if self.method == "memedit":
            found["rules"] = _RULES
        return found


_RULES = 2
"""Of protection and repair; higher when the same settings come to mean another edit."""


def digest_of(*parts: object) -> str:
    """sha256 over dataclasses, mappings and plain values, in a canonical form."""

    def plain(value: object) -> object:
        return asdict(value) if hasattr(value, "__dataclass_fields__") else value  # type: ignore[call-overload]

    text = json.dumps([plain(p) for p in parts], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = [
    "ONE_LAYER",
    "ContextSettings",
    "EditSettings",
    "EvaluationSettings",
    "FineTuneSettings",
    "MethodName",
    "MomentSettings",
    "ProtectSettings",
    "RepairSettings",
    "SolveSettings",
    "TargetSettings",
    "TraceSettings",
    "digest_of",
]
