"""Whether an edit is good enough to be published: what is judged, and the gates.

Knows gates; how a fact is judged is in `memedit.evaluate`. The review of an ingestion, on samples
and against the version before, is in `workflows.ingestion.review`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from memedit.config import EvaluationSettings
from memedit.drift import DriftReference
from memedit.errors import GateError, InputError
from memedit.evaluate import measurable
from memedit.executor import Executor
from memedit.outcome import EditOutcome, Evaluation
from memedit.progress import Progress
from memedit.requests import EditRequest
from workflows.facts import Reject
from workflows.gates import Gate
from workflows.metrics import METRIC
from workflows.session import Base
from workflows.settings import EditJob


class Review(Protocol):
    """Which facts are judged, and whether what came out is good enough to be published."""

    def choose(self, requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
        """The facts to judge, in their order.

        Raises:
            InputError: What is asked for can never be measured on them.
        """

    def refuse(self, rejects: Sequence[Reject]) -> None:
        """Some facts cannot be written into the model; unless this raises, the others are."""

    def accept(self, trial: Trial) -> None:
        """Look at what was made; it is published unless this raises.

        Raises:
            GateError: It is not good enough.
        """


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An edit that is made and judged, and not yet published."""

    outcome: EditOutcome
    base: Base
    executor: Executor
    """Its workers hold the edited model as it was saved."""
    judged: Sequence[EditRequest]
    heldout: Sequence[Sequence[int]]
    reference: DriftReference
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class ReviewAll:
    """Judges every fact, by the gates of the job."""

    job: EditJob

    def choose(self, requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
        """See `Review`: all of them, if the gates can be measured on them."""
        check_measurable(self.job.gates, requests, self.job.evaluation_settings, self.job.facts)
        return requests

    def refuse(self, rejects: Sequence[Reject]) -> None:
        """See `Review`: the report and the table of rejects say it."""

    def accept(self, trial: Trial) -> None:
        """See `Review`."""
        after, before = trial.outcome.after.metrics, trial.outcome.before.metrics
        missed = [
            reason for gate in self.job.gates if (reason := gate.check(after, {"base": before}))
        ]
        if missed:
            raise GateError(not_published(missed, after))


def check_measurable(
    gates: Sequence[Gate],
    requests: Sequence[EditRequest],
    settings: EvaluationSettings,
    source: str,
) -> None:
    """Refuse now, not after hours, a gate on what will not be measured.

    Raises:
        InputError: A gate can never be met.
    """
    found = measurable(requests, settings)
    for gate in gates:
        if gate.metric not in found:
            raise _unmeasurable(gate, source)


_OF_HELDOUT = ("perplexity", "drift_kl", "drift_top1")


def check_heldout(job: EditJob, before: Evaluation) -> None:
    """A corpus may have been too small to hold text out, or have had no names.

    Raises:
        InputError: A gate is on the perplexity or the drift of nothing.
    """
    for gate in job.gates:
        if gate.metric in _OF_HELDOUT and before.metrics[gate.metric] is None:
            raise _unmeasurable(gate, job.facts)


def _unmeasurable(gate: Gate, source: str) -> InputError:
    return InputError(
        f"{gate} can never be met: {gate.metric} is measured on "
        f"{METRIC[gate.metric].needs}, and there is none",
        source=source,
        field="gate",
    )


def not_published(missed: Sequence[str], metrics: Mapping[str, float | None]) -> str:
    """Why a version was not published, and what was measured."""
    measured = (f"  {k} {v:.4g}" for k, v in metrics.items() if v is not None)
    return "\n".join((f"not published: {'; '.join(missed)}", "measured:", *measured))
