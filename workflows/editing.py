"""A method at work on a batch of facts: what lies between its statistics and its updates.

The stages are in `memedit.stages` and the equations in `memedit.solve`; here they meet what was
kept by earlier runs, and the rounds of repair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch

from cluster.artifacts import Artifacts, target_digest
from cluster.background import Background
from memedit.config import ONE_LAYER, EditSettings, digest_of
from memedit.drift import DriftReference
from memedit.errors import NumericalError
from memedit.executor import Executor
from memedit.moments import SecondMoment
from memedit.outcome import RepairRound
from memedit.progress import Progress, Silent
from memedit.prompts import EncodedRequest
from memedit.requests import EditRequest
from memedit.solve import METHODS, Update, solve_device
from memedit.stages import SolvedLayer, find_targets, once, said, solve_layers
from memedit.targets import Target
from workflows.moments import StoredMoments, TokenSource, moments_for
from workflows.protection import Protection, protection_for
from workflows.session import Base

_LEAST_DRIFT = 1e-3
"""In nats; below it a difference of two drifts says nothing."""


@dataclass(frozen=True, kw_only=True)
class Edited:
    """Updates, the z vectors that they were solved for, and how it came to them."""

    targets: Sequence[Target]
    solved: Sequence[SolvedLayer]
    rounds: tuple[RepairRound, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Editing:
    """One run of a method. Its workers hold the base when it is made, and what is solved later."""

    executor: Executor
    base: Base
    settings: EditSettings
    contexts: tuple[str, ...]
    moments: StoredMoments
    protection: Protection | None
    """For method `memedit`."""
    artifacts: Artifacts
    stored: Mapping[int, torch.dtype]
    """The dtype of each layer's weight in the checkpoint."""
    device: torch.device
    progress: Progress

    @property
    def protected_prompts(self) -> int:
        """How many prompts are protected."""
        return self.protection.prompts if self.protection else 0

    def targets(
        self, encoded: Sequence[EncodedRequest], *, model: str | None = None
    ) -> tuple[list[Target], dict[str, str]]:
        """Z vectors, kept by earlier runs or found and kept now; and which facts have none.

        Methods that seek none before they edit give none.

        Args:
            encoded: The facts.
            model: Identity of the workers' model, where it is not the base.
        """
        if self.settings.method in ONE_LAYER:
            return [], {}
        requests = [each.request for each in encoded]
        digests = target_digests(requests, self.contexts, self.base, self.settings, model=model)
        # Waiting for the disk is no work for the thread that feeds the workers.
        with Background() as background:
            return find_targets(
                self.executor,
                encoded,
                layer=self.settings.layers[-1],
                settings=self.settings.targets,
                known=self.artifacts.targets(digests),
                keep=lambda target: background.do(
                    self.artifacts.keep_target, digests[target.case_id], target
                ),
                progress=self.progress,
            )

    def solve(self, encoded: Sequence[EncodedRequest], targets: Sequence[Target]) -> Edited:
        """Updates for these z vectors; the workers' models, which hold the base, are edited.

        With method `memedit`, facts that are not said then are tried again. `rome` seeks its own.
        """
        if self.settings.method == "rome":
            return self._one_by_one(encoded)
        if self.settings.method == "ft":
            return self._fine_tuned(encoded)
        reference = self._reference()
        if reference is None:
            return Edited(targets=targets, solved=self._solve(encoded, targets))
        return self._repair(encoded, targets, reference)

    def _solve(
        self,
        encoded: Sequence[EncodedRequest],
        targets: Sequence[Target],
        *,
        moments: Mapping[int, SecondMoment] | None = None,
        progress: Progress | None = None,
    ) -> list[SolvedLayer]:
        return solve_layers(
            self.executor,
            encoded,
            targets,
            moments=moments or self.moments,
            layers=self.settings.layers,
            method=METHODS[self.settings.method],
            settings=self.settings.solve,
            protected=self.protection.moments if self.protection else None,
            protect_weight=self.settings.protect.weight,
            residual_scale=self.base.arch.residual_scale,
            stored=self.stored,
            device=self.device,
            progress=progress or self.progress,
        )

    def install(self, edited: Edited) -> None:
        """Let the workers' models be the base with these updates, whatever they are now."""
        self.executor.broadcast("load", self.base.spec())
        for one in edited.solved:
            layer = one.update.layer
            self.executor.broadcast("apply", one.update, self.stored[layer])

    def _one_by_one(self, encoded: Sequence[EncodedRequest]) -> Edited:
        """ROME (arXiv 2202.05262): each fact on the model that those before it have left.

        The key is the mean over contexts in both places where the update has it; the published
        code's two keys are what made single edits ruin a model (arXiv 2403.07175).
        """
        (layer,) = self.settings.layers
        moments = {layer: self.moments[layer]}
        targets: list[Target] = []
        solved: list[SolvedLayer] = []
        self.progress.start("targets", total=len(encoded), unit="facts")
        for each in encoded:
            found, quarantined = find_targets(
                self.executor,
                [each],
                layer=layer,
                settings=self.settings.targets,
                known={},
                keep=lambda target: None,
                progress=Silent(),
            )
            for case_id, reason in quarantined.items():
                raise NumericalError(f"fact {case_id}: {reason}")
            solved += self._solve([each], found, moments=moments, progress=Silent())
            targets += found
            self.progress.advance("targets", 1, loss=found[0].losses[-1])
        self.progress.finish("targets")
        norms = [one.residual_norm for one in solved if one.residual_norm is not None]
        whole = SolvedLayer(
            update=Update.sum([one.update for one in solved]),
            residual_norm=fmean(norms),
            moment=moments[layer].summary,
        )
        return Edited(targets=targets, solved=[whole])

    def _fine_tuned(self, encoded: Sequence[EncodedRequest]) -> Edited:
        (layer,) = self.settings.layers
        self.progress.start("solve", total=1, unit="layers")
        update: Update = once(self.executor, "fine_tune", encoded, layer, self.settings.finetune)
        self.executor.broadcast("apply", update, self.stored[layer])
        self.progress.advance("solve", 1)
        self.progress.finish("solve")
        moment = self.moments[layer].summary
        return Edited(
            targets=[], solved=[SolvedLayer(update=update, residual_norm=None, moment=moment)]
        )

    def _reference(self) -> DriftReference | None:
        """The base's predictions on held-out prompts; None where nothing is to be repaired."""
        if self.protection is None or not self.settings.repair.rounds:
            return None
        reference: DriftReference = once(self.executor, "predictions", self.protection.heldout)
        return reference

    def _repair(
        self,
        encoded: Sequence[EncodedRequest],
        targets: Sequence[Target],
        reference: DriftReference,
    ) -> Edited:
        """Solve, and then find z anew, on the edited model, for what that does not say, in rounds.

        All facts are then solved for again, from the base. A round that helps fewer facts than it
        should, or moves more of the rest than it may, is not kept, and is the last one.
        """
        settings = self.settings.repair
        kept = Edited(targets=targets, solved=self._solve(encoded, targets))
        unsaid, drift = self._unsaid(encoded), self._drift(reference)
        rounds: list[RepairRound] = []
        for number in range(1, settings.rounds + 1):
            failed = [each for each in encoded if each.request.case_id in unsaid]
            if not failed:
                break
            try:
                found, _ = self.targets(failed, model=self._edited(encoded, number))
                anew = {target.case_id: target for target in found}
                targets = [anew.get(target.case_id, target) for target in kept.targets]
                self.executor.broadcast("load", self.base.spec())
                trial = Edited(targets=targets, solved=self._solve(encoded, targets))
            except NumericalError as error:  # what there is already is whole
                self.progress.message(f"repair, round {number} is not kept: {error}")
                break
            left, moved = self._unsaid(encoded), self._drift(reference)
            keep = len(left) < len(unsaid) and moved <= max(
                drift * growth_allowed(len(unsaid), len(left), settings.drift), _LEAST_DRIFT
            )
            rounds.append(
                RepairRound(
                    unsaid_before=len(unsaid),
                    unsaid_after=len(left),
                    drift_before=drift,
                    drift_after=moved,
                    kept=keep,
                )
            )
            self.progress.message(f"repair, round {number}: {rounds[-1].told}")
            if not keep:
                break
            kept, unsaid, drift = trial, left, moved
        return Edited(targets=kept.targets, solved=kept.solved, rounds=tuple(rounds))

    def _unsaid(self, encoded: Sequence[EncodedRequest]) -> frozenset[str]:
        return frozenset(i for i, is_said in said(self.executor, encoded).items() if not is_said)

    def _drift(self, reference: DriftReference) -> float:
        """Mean KL on the held-out prompts, in nats; 0 where there are none."""
        measured = once(self.executor, "drift", reference)
        return 0.0 if measured is None else float(measured[0])

    def _edited(self, encoded: Sequence[EncodedRequest], number: int) -> str:
        """Identity of the edited model of a round: of all that it was made from."""
        return digest_of("edited", self._made_from, [e.request.digest for e in encoded], number)

    @cached_property
    def _made_from(self) -> str:
        protected = self.protection.moments if self.protection else None
        settings = self.settings.of_method()
        settings.pop("repair", None)  # when rounds end does not change what a round begins with
        return digest_of(
            self.base.checkpoint.digest,
            settings,
            sorted(self.moments.digests.items()),
            sorted(protected.digests.items()) if protected else None,
        )


def growth_allowed(before: int, after: int, each_halving: float) -> float:
    """By what factor drift may grow in a round of repair that leaves fewer facts unsaid.

    (1 + `each_halving`)^log₂(before / after); where none is left, as if it were half a fact.
    """
    return float((1 + each_halving) ** math.log2(before / max(after, 0.5)))


def editing_for(
    requests: Sequence[EditRequest],
    source: TokenSource,
    *,
    base: Base,
    settings: EditSettings,
    contexts: tuple[str, ...],
    executor: Executor,
    artifacts: Artifacts,
    progress: Progress,
    given: StoredMoments | None = None,
) -> Editing:
    """A method that is ready to begin: what it needs is counted now, where it was not kept.

    Args:
        requests: The facts, whose templates make the prompts that are protected.
        source: The text to count, on the model that it names.
        base: What is edited; the workers hold it.
        settings: Checked, see `workflows.session.settings_of`.
        contexts: See `workflows.session.contexts_of`.
        executor: Where the work is done.
        artifacts: What earlier runs have kept.
        progress: Told of each stage.
        given: Second moments to use instead of counting them.
    """
    moments = given or moments_for(
        source,
        base=source.base,
        settings=settings,
        executor=executor,
        artifacts=artifacts,
        progress=progress,
    )
    protection = protection_for(
        requests,
        source,
        base=base,
        settings=settings,
        executor=executor,
        artifacts=artifacts,
        progress=progress,
    )
    names = {i: base.arch.checkpoint_key(i, base.checkpoint.names) for i in settings.layers}
    return Editing(
        executor=executor,
        base=base,
        settings=settings,
        contexts=contexts,
        moments=moments,
        protection=protection,
        artifacts=artifacts,
        stored={i: base.checkpoint.info(name).dtype for i, name in names.items()},
        device=solve_device(base.job.device),
        progress=progress,
    )


def target_digests(
    requests: Iterable[EditRequest],
    contexts: tuple[str, ...],
    base: Base,
    settings: EditSettings,
    *,
    model: str | None = None,
) -> dict[str, str]:
    """What the z vector of each fact is kept under, by its id."""
    return {
        request.case_id: target_digest(
            request,
            model=model or base.checkpoint.digest,
            contexts=contexts,
            settings=settings.targets,
            layer=settings.layers[-1],
            dtype=base.job.dtype,
            architecture=base.job.architecture,
        )
        for request in requests
    }
