"""Whether a new version is good enough: gates on samples of facts, and canaries.

Judged are the new facts and a sample of all active ones, so that old facts are seen to be still
there. Knows gates and canaries; how a fact is judged is in `memedit.evaluate`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.current import folder_of
from cluster.registry import Registry
from memedit.errors import GateError, InputError, MemeditError
from memedit.evaluate import evaluation_of
from memedit.outcome import EditOutcome, Evaluation, FactResult
from memedit.requests import EditRequest, Neighbour
from memedit.stages import judge
from workflows.facts import Reject
from workflows.ingestion.canary import Canary, check_canaries, read_canaries
from workflows.ingestion.desired import Desired
from workflows.ingestion.rows import DIGEST
from workflows.ingestion.settings import IngestJob
from workflows.ingestion.verdict import Verdict
from workflows.review import Trial, check_measurable, not_published
from workflows.wording import plural

_NEIGHBOURS = 5
_HURT = 50
"""How many facts a report lists."""


class ReviewSample:
    """The review of an ingestion; see `workflows.review.Review`."""

    def __init__(self, job: IngestJob, desired: Desired, registry: Registry) -> None:
        self.job, self.desired, self.registry = job, desired, registry
        self.canaries: tuple[Canary, ...] = read_canaries(job.canary) if job.canary else ()
        self.verdict = Verdict()
        self._groups: dict[str, frozenset[str]] = {}

    def choose(self, requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
        """New facts, and a sample of all that the version must say, old ones too."""
        self._compared_with()  # not after hours, if it cannot be
        ordered = sorted(requests, key=lambda r: r.digest)
        new = [r for r in ordered if self.desired.is_new(r)][: self.job.judged_new]
        some = self.desired.sample(self.job.judged_all)
        chosen = {r.case_id: r for r in (*some, *new)}
        relations = self.desired.relations
        judged = with_neighbours(
            [
                without_edited(r, self.desired.texts)
                for r in sorted(chosen.values(), key=lambda r: r.digest)
            ],
            relations,
        )
        judged = [replace(r, relation_id=relations.get(r.case_id)) for r in judged]
        self._groups = {
            "new": frozenset(r.case_id for r in new),
            "all": frozenset(r.case_id for r in some),
        }
        # What of the new facts can be measured differs from night to night.
        for name, group in (
            ("", judged),
            ("all", [r for r in judged if r.case_id in self._groups["all"]]),
        ):
            gates = [gate for gate in self.job.gates if gate.group == name]
            check_measurable(gates, group, self.job.evaluation_settings, f"{name} facts".strip())
        return judged

    def refuse(self, rejects: Sequence[Reject]) -> None:
        """See `Review`: a version says all active facts, so it is begun anew without these.

        Raises:
            RefusedError: There are some.
        """
        by_id = {r.case_id: r.digest[:DIGEST] for r in self.desired.requests}
        reasons = {by_id[str(r.raw["id"])]: r.reason for r in rejects}
        if reasons:
            raise RefusedError(reasons)

    def accept(self, trial: Trial) -> None:
        """See `Review`; says which facts hurt."""
        outcome = trial.outcome
        self.verdict.outcome = outcome
        self.verdict.metrics = dict(outcome.summary()["metrics"])
        after = self._named(outcome.after)
        self.verdict.groups = {
            name: self._group(outcome.after, ids) for name, ids in self._groups.items()
        }
        # The canaries first: the version before is loaded in place of the new one.
        missed = list(check_canaries(self.canaries, trial.executor, self.job.canary or ""))
        models = {"base": self._named(outcome.before)}
        previous = self._previous(trial)
        if previous is not None:
            models["previous"] = self._named(previous)
        for gate in self.job.gates:
            if gate.group == "new" and after.get(gate.name) is None:
                continue  # nothing of tonight's to measure it on
            if reason := gate.check(after, models):
                missed.append(reason)
        if missed:
            self.verdict.missed = missed
            self.verdict.hurt = hurt(outcome, self._groups["new"])
            raise GateError(not_published(missed, outcome.after.metrics))

    def _compared_with(self) -> str | None:
        """The version before, where a gate speaks of it and it can be judged.

        Raises:
            InputError: It is a delta or an adapter.
        """
        current = self.desired.current
        if current is None or all(gate.model != "previous" for gate in self.job.gates):
            return None
        try:
            manifest = self.registry.require_whole(current).manifest
        except InputError:  # damaged, and perhaps what is being made anew: as if there were none
            return None
        if manifest is None or manifest.format != "full":
            raise InputError(
                f"the version before ({current}) is no full checkpoint, so it cannot be judged",
                field="gate",
            )
        return current

    def _previous(self, trial: Trial) -> Evaluation | None:
        """The version before on the same facts, where a gate speaks of it."""
        current = self._compared_with()
        if current is None:
            return None
        files = self.registry.store.files(folder_of(current))
        trial.executor.broadcast("load", trial.base.spec(files=files))
        found, _ = judge(
            trial.executor,
            trial.judged,
            heldout=trial.heldout,
            reference=trial.reference,
            settings=self.job.evaluation_settings,
            progress=trial.progress,
        )
        return found

    def _named(self, evaluation: Evaluation) -> dict[str, float | None]:
        """Metrics by the names that gates use: `score`, `all.score`, `new.score`."""
        named = dict(evaluation.metrics)
        for name, ids in self._groups.items():
            group = self._group(evaluation, ids)
            # What is measured of the whole model is the same for every group.
            whole = {k: v for k, v in evaluation.metrics.items() if k in _WHOLE}
            named |= {f"{name}.{k}": v for k, v in {**group, **whole}.items()}
        return named

    @staticmethod
    def _group(evaluation: Evaluation, ids: frozenset[str]) -> dict[str, float | None]:
        facts = [fact for fact in evaluation.facts if fact.case_id in ids]
        return dict(evaluation_of(facts, {}).metrics)


class RefusedError(MemeditError):
    """Facts that cannot be written into the model: reason by the fact's digest."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        super().__init__(f"{plural(len(reasons), 'fact')} cannot be written into the model")


_WHOLE = ("fluency", "perplexity", "drift_kl", "drift_top1")


def without_edited(request: EditRequest, edited: Collection[str]) -> EditRequest:
    """The fact without neighbours that are facts themselves: their answers should change."""
    kept = tuple(n for n in request.neighbourhood if n.prompt not in edited)
    return (
        request if len(kept) == len(request.neighbourhood) else replace(request, neighbourhood=kept)
    )


def with_neighbours(
    requests: Sequence[EditRequest], relations: Mapping[str, str]
) -> list[EditRequest]:
    """Facts with neighbourhood prompts, which those of a relation without any get from the others.

    Other subjects of the same relation must keep their own answers.
    """
    groups: dict[str, list[EditRequest]] = {}
    for request in requests:
        if (relation := relations.get(request.case_id)) is not None:
            groups.setdefault(relation, []).append(request)
    places = {r.case_id: i for group in groups.values() for i, r in enumerate(group)}

    def neighboured(request: EditRequest) -> EditRequest:
        relation = relations.get(request.case_id)
        if relation is None or request.neighbourhood:
            return request
        group, start = groups[relation], places[request.case_id]
        others = (group[(start + step) % len(group)] for step in range(1, len(group)))
        found = [
            Neighbour(prompt=other.text, target=other.target_new)
            for other in others
            if other.target_new != request.target_new and other.text != request.text
        ]
        return replace(request, neighbourhood=tuple(found[:_NEIGHBOURS]))

    return [neighboured(request) for request in requests]


def hurt(outcome: EditOutcome, new: Iterable[str]) -> list[dict[str, Any]]:
    """The facts that went badly, the worst first: what is not said, and whose neighbours moved."""
    before = {fact.case_id: fact for fact in outcome.before.facts}
    fresh = set(new)
    found: list[tuple[float, dict[str, Any]]] = []
    for fact in outcome.after.facts:
        said = fact.efficacy if fact.efficacy is not None else fact.generation
        lost = _lost(before.get(fact.case_id), fact)
        reasons = [] if said else ["the model does not say it"]
        if lost:
            reasons.append(f"{lost} of its {len(fact.neighbourhood)} neighbours changed")
        if reasons:
            found.append(
                (
                    (not said) + lost / max(1, len(fact.neighbourhood)),
                    {
                        "id": fact.case_id,
                        "prompt": fact.prompt,
                        "target_new": fact.target_new,
                        "says": fact.continuation,
                        "new": fact.case_id in fresh,
                        "reason": "; ".join(reasons),
                    },
                )
            )
    found.sort(key=lambda pair: (-pair[0], pair[1]["id"]))
    return [fact for _, fact in found[:_HURT]]


def _lost(before: FactResult | None, after: FactResult) -> int:
    """Neighbours that held before and do not hold now."""
    if before is None:
        return 0
    pairs = zip(before.neighbourhood, after.neighbourhood, strict=False)
    return sum(held and not holds for held, holds in pairs)
