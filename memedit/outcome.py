"""What a run yields: the evaluation before and after, and the trace of how it got there.

Plain data that survives JSON. Knows no model, no file and no terminal: `memedit.evaluate` and
`workflows.edit` fill it, `workflows.tables` and `workflows.report` show it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

METRIC_KEYS = (
    "efficacy",
    "paraphrase",
    "neighbourhood",
    "score",
    "efficacy_exact",
    "paraphrase_exact",
    "neighbourhood_exact",
    "efficacy_accuracy",
    "paraphrase_accuracy",
    "neighbourhood_accuracy",
    "attribute",
    "portability",
    "generation",
    "consistency",
    "fluency",
    "perplexity",
    "neighbourhood_kl",
    "drift_kl",
    "drift_top1",
)
"""The keys of `Evaluation.metrics`, in the order in which they are shown."""

STAGES = ("load", "stats", "targets", "solve", "publish", "evaluate")
"""The stages of a run, in order; `EditOutcome.timings_s` has them and `total`."""


class _Plain:
    """To and from the values that JSON has."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as dictionaries, lists and plain values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a round through JSON; unknown keys are dropped."""
        return _build(cls, values)  # type: ignore[no-any-return]


def _build(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        names = [f.name for f in fields(kind) if f.name in value]
        return kind(**{name: _build(hints[name], value[name]) for name in names})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], v) for v in value)
    if get_origin(kind) is dict:
        return {key: _build(get_args(kind)[1], v) for key, v in value.items()}
    if get_origin(kind) in (Union, types.UnionType):
        inner = next(k for k in get_args(kind) if k is not type(None))
        return None if value is None else _build(inner, value)
    return value


@dataclass(frozen=True, kw_only=True)
class FactResult(_Plain):
    """How one fact fares in one model.

    `efficacy`, `paraphrase`, `neighbourhood` compare probabilities (new against true; for
    neighbourhood the reverse; for attribute prompts new against true again, as it was before the
    edit); the `_exact` ones say that every target token is the argmax, the `_accuracy` ones and
    `portability` which share of them is (0 to 1). `logprob_*` are mean log-probabilities per target
    token, in nats.
    """

    case_id: str
    relation: str = ""
    """The data set's relation id, or else the template."""
    prompt: str
    """With the subject filled in."""
    target_new: str
    target_true: str | None = None
    efficacy: bool | None = None
    """None without a `target_true` to compare with."""
    efficacy_exact: bool
    paraphrase: tuple[bool, ...] = ()
    paraphrase_exact: tuple[bool, ...] = ()
    neighbourhood: tuple[bool, ...] = ()
    neighbourhood_exact: tuple[bool, ...] = ()
    efficacy_accuracy: float | None = None
    paraphrase_accuracy: tuple[float, ...] = ()
    neighbourhood_accuracy: tuple[float, ...] = ()
    neighbourhood_kl: float | None = None
    """Mean KL(base ‖ model) on the neighbourhood prompts that drift is measured on, in nats."""
    attribute: tuple[bool, ...] = ()
    portability: tuple[float, ...] = ()
    generation: bool
    """The greedy continuation says the new object."""
    continuation: str
    """What the model says after `prompt`, greedily."""
    logprob_new: float
    logprob_true: float | None = None
    texts: tuple[str, ...] = ()
    """What the model writes on the fact's generation prompts, with them."""
    consistency: float | None = None
    """Cosine of those texts with the fact's references (TF-IDF), 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Plain):
    """The metrics of one model on one batch, and each fact behind them.

    `metrics` has the keys of `METRIC_KEYS`; None where there was nothing to measure. In percent,
    but `fluency` (bits), `perplexity`, `neighbourhood_kl` and `drift_kl` (nats).
    """

    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95% bootstrap intervals: over facts, of the score too; over prompts or windows of what is
    measured of the whole model."""
    facts: tuple[FactResult, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TargetTrace(_Plain):
    """How the optimisation of one fact's z went."""

    case_id: str
    losses: tuple[float, ...]
    """The loss before each step, and after the last one where it was measured."""
    steps: int
    h_norm: float
    delta_norm: float
    converged: bool
    """Stopped under the loss threshold."""


@dataclass(frozen=True, kw_only=True)
class LayerUpdate(_Plain):
    """The update of one layer's weight; the norms are Frobenius norms."""

    layer: int
    weight_name: str
    delta_norm: float
    weight_norm: float
    """Of the base weight."""
    lam: float
    """λ of the solve."""
    residual_norm: float | None
    """Mean ‖z - h‖ over the facts before this layer's update, of the last sweep; None without z."""
    rounding_error: float | None = None
    """‖stored - exact‖ / ‖ΔW‖: what the dtype of the checkpoint took from the update."""
    rank: int | None = None
    """Of the LoRA adapter that was published in place of the update."""
    truncation_error: float | None = None
    """‖Δ - B·A‖ / ‖Δ‖: what that rank took from the update."""


@dataclass(frozen=True, kw_only=True)
class MomentSummary(_Plain):
    """The statistics of one layer."""

    layer: int
    tokens: int
    error: float | None
    """Estimated relative error of C, measured without position 0; None where not estimated."""
    trace: float
    trace_without_position_0: float | None = None


@dataclass(frozen=True, kw_only=True)
class RepairRound(_Plain):
    """One more attempt at the facts that the edited model did not say."""

    unsaid_before: int
    """Facts whose new object was not the argmax in every token."""
    unsaid_after: int
    drift_before: float
    """Mean KL against the base on held-out prompts, in nats."""
    drift_after: float
    kept: bool
    """Whether its updates are published, rather than those before it."""

    @property
    def told(self) -> str:
        """As a person is told it."""
        return (
            f"facts that are not said {self.unsaid_before} -> {self.unsaid_after}, drift "
            f"{self.drift_before:.3g} -> {self.drift_after:.3g}{'' if self.kept else '; not kept'}"
        )


@dataclass(frozen=True, kw_only=True)
class FactCounts(_Plain):
    """How many rows of the fact table were read, taken and refused."""

    read: int
    accepted: int
    rejected: int = 0
    rejects: str | None = None
    """Path of `rejects.jsonl`, None without rejects."""
    duplicates: int = 0
    """Rows that say what another row says; they count once."""


@dataclass(frozen=True, kw_only=True)
class EditOutcome(_Plain):
    """All that one edit leaves behind for a reader, apart from the checkpoint itself."""

    run_id: str
    out: str
    manifest: str
    method: str
    model: str
    layers: tuple[int, ...]
    facts: FactCounts
    before: Evaluation
    after: Evaluation
    traces: tuple[TargetTrace, ...] = ()
    updates: tuple[LayerUpdate, ...] = ()
    moments: tuple[MomentSummary, ...] = ()
    repairs: tuple[RepairRound, ...] = ()
    timings_s: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    report: str | None = None
    format: str = "full"
    """What was published: `full`, `delta` or `lora`."""

    def summary(self) -> dict[str, Any]:
        """The JSON object that `edit --json` prints; a number that is not finite becomes None."""
        return {
            "run_id": self.run_id,
            "out": self.out,
            "manifest": self.manifest,
            "method": self.method,
            "format": self.format,
            "model": self.model,
            "layers": list(self.layers),
            "facts": self.facts.to_dict(),
            "metrics": {
                "before": _finite(self.before.metrics),
                "after": _finite(self.after.metrics),
            },
            "intervals": {
                "before": {name: list(pair) for name, pair in self.before.intervals.items()},
                "after": {name: list(pair) for name, pair in self.after.intervals.items()},
            },
            **({"repairs": [r.to_dict() for r in self.repairs]} if self.repairs else {}),
            "timings_s": dict(self.timings_s),
            "report": self.report,
        }


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    return {k: v if v is not None and math.isfinite(v) else None for k, v in metrics.items()}
