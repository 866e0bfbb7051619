"""One process that holds a model and does units of the work: count, optimise, read keys, score.

Every method is a generator, so that whoever calls it in the same process sees each fact as it is
finished, and whoever calls it from far away collects the lot. Knows no Ray and no files beyond the
checkpoint that it loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memedit.architecture import check_additivity
from memedit.config import EvaluationSettings, FineTuneSettings, TargetSettings, TraceSettings
from memedit.drift import DriftReference, drift_reference, measure_drift
from memedit.errors import NumericalError
from memedit.evaluate import score_facts
from memedit.files import Files
from memedit.finetune import fine_tune
from memedit.generate import greedy_continuations
from memedit.keys import KeyPass, Keys, case_ids_of, default_tokens_per_chunk
from memedit.memory import release_memory, trim_memory
from memedit.model import LoadedModel, ModelSpec, load_model
from memedit.moments import MomentAccumulator, Spread
from memedit.outcome import FactResult
from memedit.patching import row_blocks
from memedit.prompts import EncodedRequest
from memedit.requests import EditRequest
from memedit.sampling import sample_contexts, sample_windows
from memedit.scoring import Completion, Ids, next_token_logprobs, score_completions
from memedit.side_effects import Part
from memedit.solve import Update
from memedit.tally import Held, Tally
from memedit.targets import Target, default_tokens_per_batch, optimise_targets
from memedit.tracing import FactTrace, TraceRequest, embedding_spread, trace_facts
from memedit.tracing import default_tokens_per_batch as trace_tokens_per_batch


class Room:
    """How much is done at once, halved where the device had no memory for more."""

    def __init__(self) -> None:
        self._shares: dict[str, int] = {}

    def of(self, work: str, whole: int) -> int:
        """What fits of `whole`."""
        return max(1, whole // self._shares.get(work, 1))

    def halve(self, work: str, whole: int) -> bool:
        """Take half as much from now on; False if there is nothing left to halve."""
        if self.of(work, whole) == 1:
            return False
        self._shares[work] = 2 * self._shares.get(work, 1)
        return True


class Worker:
    """Holds one model and the state of one run over it.

    Args:
        spec: The model to load.
        threads: Threads of torch in this process; None leaves torch's own choice.
    """

    def __init__(self, spec: ModelSpec, *, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.loaded = load_model(spec)
        release_memory()
        self._accumulator: MomentAccumulator | None = None
        self._tallies: dict[str, Tally] = {}
        self._passes: dict[int, KeyPass] = {}
        self._kept: dict[int, Tensor] = {}
        self._room = Room()

    def load(self, spec: ModelSpec) -> Iterator[None]:
        """Let go of the model and of all state, and load another."""
        self._accumulator, self._tallies, self._passes, self._kept = None, {}, {}, {}
        vars(self).pop("loaded", None)  # a load that failed has let go of it already
        release_memory()
        self.loaded = load_model(spec)
        yield None

    def sample(self, rows: int, length: int, seed: int) -> Iterator[list[list[int]]]:
        """Windows of text sampled from the model itself."""
        windows = sample_windows(
            self.loaded.model, self.loaded.tokenizer, rows=rows, length=length, seed=seed
        )
        trim_memory()
        yield windows

    def contexts(self, starts: tuple[str, ...], tokens: int, seed: int) -> Iterator[list[str]]:
        """Context templates sampled from the model."""
        yield sample_contexts(
            self.loaded.model, self.loaded.tokenizer, starts=starts, tokens=tokens, seed=seed
        )

    def count(
        self, unit: int, windows: Sequence[Sequence[int]], layers: tuple[int, ...], count_0: bool
    ) -> Iterator[tuple[int, int, dict[int, Spread]]]:
        """Add a batch of windows to this worker's second moments; its unit, tokens and spread."""
        if self._accumulator is None:
            model, arch = self.loaded.model, self.loaded.arch
            self._accumulator = MomentAccumulator(model, arch, layers=layers, count_0=count_0)
        spreads = self._accumulator.add(windows)
        tally = self._tally("moments")
        tally.units.append(unit)
        for layer, moment in self._accumulator.moments.items():
            tally.matrices[layer] = moment.sum_II
            # No view: it would take the whole matrix along wherever it is sent.
            empty_0I = torch.empty((0, moment.sum_II.shape[1]), dtype=torch.float64)
            tally.facts[layer] = replace(moment, sum_II=empty_0I)
        yield unit, sum(map(len, windows)), spreads

    def _tally(self, kind: str) -> Tally:
        return self._tallies.setdefault(kind, Tally())

    def held(self, kind: str) -> Iterator[Held]:
        """Which units this worker has added to sums of a kind (`moments`, `keys`)."""
        tally = self._tally(kind)
        yield Held(state=tally.state, units=tuple(tally.units), facts=dict(tally.facts))

    def rows(
        self, kind: str, name: Any, start: int, stop: int
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Some rows of one of the sums, float64 on the CPU, with the state that they are of."""
        tally = self._tally(kind)
        matrix = tally.matrices.get(name)
        if matrix is None:
            yield tally.state, None
        else:  # a copy: a view would be sent with the whole matrix
            yield tally.state, matrix[start:stop].to("cpu", torch.float64, copy=True)

    def forget(self, kind: str) -> Iterator[None]:
        """Let go of the sums of a kind."""
        self._tallies.pop(kind, None)
        if kind == "moments":
            self._accumulator = None
        trim_memory()
        yield None

    def targets(
        self, requests: Sequence[EncodedRequest], layer: int, settings: TargetSettings
    ) -> Iterator[Target]:
        """Optimise the z vectors of some facts, in smaller batches where the GPU has no room."""
        model, arch = self.loaded.model, self.loaded.arch
        budget = settings.tokens_per_batch or default_tokens_per_batch(model.device)
        missing = {request.request.case_id: request for request in requests}
        while True:
            fitting = replace(settings, tokens_per_batch=self._room.of("targets", budget))
            facts = list(missing.values())
            try:
                for target in optimise_targets(model, arch, facts, layer=layer, settings=fitting):
                    del missing[target.case_id]
                    yield target
            except torch.OutOfMemoryError:
                if not self._room.halve("targets", budget):
                    raise
            else:
                break
            release_memory()  # not before: the error holds on to what was being computed
        trim_memory()

    def fine_tune(
        self, requests: Sequence[EncodedRequest], layer: int, settings: FineTuneSettings
    ) -> Iterator[Update | None]:
        """The update of one layer by fine-tuning, at the end; the model itself stays as it is."""
        model, arch = self.loaded.model, self.loaded.arch
        yield from fine_tune(model, arch, requests, layer=layer, settings=settings)
        trim_memory()

    def keys(
        self, unit: int, requests: Sequence[EncodedRequest], layer: int, last_layer: int
    ) -> Iterator[Keys]:
        """Keys and current values of a unit of facts; layers must be asked for in order."""
        keys = self._keys(unit, requests, layer, last_layer)
        trim_memory()
        yield keys

    def sum_keys(
        self,
        unit: int,
        requests: Sequence[EncodedRequest],
        z_NO: Tensor,
        share: float,
        layer: int,
        last_layer: int,
    ) -> Iterator[tuple[int, float]]:
        """Add a unit of facts to Σ k kᵀ and Σ r kᵀ of a layer; the unit and Σ ‖z − h^L‖.

        The residual r is `share` of z − h^L.
        """
        keys = self._keys(unit, requests, layer, last_layer)
        keys_NI = keys.keys_NI.to(self.loaded.model.device).double()
        residuals_NO = (z_NO.double() - keys.current_NO.double()).to(keys_NI.device)
        if not bool(keys_NI.isfinite().all() and residuals_NO.isfinite().all()):
            raise NumericalError(f"the keys of layer {layer} are not finite")
        tally = self._tally("keys")
        tally.units.append(unit)
        tally.add_product("keys", keys_NI, keys_NI)
        tally.add_product("residuals", residuals_NO * share, keys_NI)
        trim_memory()
        yield unit, float(residuals_NO.norm(dim=1).sum())

    def _keys(
        self, unit: int, requests: Sequence[EncodedRequest], layer: int, last_layer: int
    ) -> Keys:
        model, arch = self.loaded.model, self.loaded.arch
        budget = default_tokens_per_chunk(model.device)
        while True:
            known = self._passes.get(unit)
            # A unit has the same facts all through a solve; the next solve may have others.
            if known is None or known.entry > layer or known.case_ids != case_ids_of(requests):
                self._passes[unit] = KeyPass(
                    model,
                    arch,
                    requests,
                    last_layer=last_layer,
                    tokens_per_chunk=self._room.of("keys", budget),
                )
            try:
                return self._passes[unit].at(layer)
            except torch.OutOfMemoryError:
                del self._passes[unit]  # it may have come half way
                if not self._room.halve("keys", budget):
                    raise
            release_memory()

    def keep(self, layers: Sequence[int]) -> Iterator[None]:
        """Remember the rewrite weights as they are, for updates that take the place of others."""
        self._kept = {layer: self._weight(layer).cpu().clone() for layer in layers}
        yield None

    def apply(self, update: Update, stored: torch.dtype, anew: bool = False) -> Iterator[None]:
        """Add an update to the weight in memory, rounded as it will be stored.

        With `anew`, to the weight that was kept. A pass over some facts that is beyond this layer
        began with the weight before, and is forgotten.
        """
        self._passes = {u: p for u, p in self._passes.items() if p.entry <= update.layer}
        if anew:
            self._weight(update.layer).copy_(self._kept[update.layer])
        add_update(self.loaded, update, stored)
        yield None

    def _weight(self, layer: int) -> Tensor:
        weight = self.loaded.arch.rewrite_module(self.loaded.model, layer).weight
        assert isinstance(weight, Tensor)
        return weight.data

    def score(
        self, requests: Sequence[EditRequest], settings: EvaluationSettings
    ) -> Iterator[FactResult]:
        """Judge some facts."""
        loaded = self.loaded
        results: tuple[FactResult, ...] | None = None
        while results is None:
            facts = self._room.of("score", settings.facts_per_portion)
            try:
                results = score_facts(
                    loaded.model,
                    loaded.tokenizer,
                    loaded.known_arch,
                    requests,
                    settings=replace(settings, facts_per_portion=facts),
                )
            except torch.OutOfMemoryError:
                if not self._room.halve("score", settings.facts_per_portion):
                    raise
            if results is None:
                release_memory()
        yield from results

    def said(self, requests: Sequence[EncodedRequest]) -> Iterator[tuple[str, bool]]:
        """Whether the model says the new object of each fact: every token of it is the argmax."""
        completions = [
            Completion(prompt_ids=r.contexts[0].ids, target_ids=r.target_ids) for r in requests
        ]
        scores = score_completions(self.loaded.model, self.loaded.arch, completions)
        trim_memory()
        for request, score in zip(requests, scores, strict=True):
            yield request.request.case_id, score.exact

    def predictions(self, contexts: Sequence[Ids]) -> Iterator[DriftReference]:
        """The distributions of the next token after some contexts."""
        yield drift_reference(self.loaded.model, self.loaded.arch, contexts)

    def next_tokens(self, contexts: Sequence[Ids]) -> Iterator[list[int]]:
        """The most probable next token after each context."""
        found = [0] * len(contexts)
        for places, logprobs_QV in next_token_logprobs(
            self.loaded.model, self.loaded.arch, contexts
        ):
            for place, token in zip(places, logprobs_QV.argmax(-1).tolist(), strict=True):
                found[place] = token
        yield found

    def spread(self, ids: Sequence[int]) -> Iterator[float]:
        """The standard deviation of some tokens' embeddings."""
        yield embedding_spread(self.loaded.model, ids)

    def trace(
        self, requests: Sequence[TraceRequest], settings: TraceSettings, spread: float
    ) -> Iterator[FactTrace]:
        """Trace some facts, fewer at once and in smaller batches where the GPU has no room."""
        model, arch = self.loaded.model, self.loaded.arch
        budget = settings.tokens_per_batch or trace_tokens_per_batch(model.device)
        left = list(requests)
        while left:
            # What is kept of the facts' runs takes memory as well as the passes over them.
            some = left[: self._room.of("trace", len(requests))]
            fitting = replace(settings, tokens_per_batch=self._room.of("trace", budget))
            try:
                traces = trace_facts(model, arch, some, settings=fitting, spread=spread)
            except torch.OutOfMemoryError:
                if not self._room.halve("trace", budget):
                    raise
            else:
                left = left[len(some) :]
                yield from traces
                continue
            release_memory()  # not before: the error holds on to what was being computed
        trim_memory()

    def drift(self, reference: DriftReference) -> Iterator[tuple[float, float] | None]:
        """How far they have moved since then; see `measure_drift`."""
        yield measure_drift(self.loaded.model, self.loaded.arch, reference)

    def go_on(self, prompts: Sequence[str], tokens: Sequence[int]) -> Iterator[list[str]]:
        """Greedy continuations of some prompts, by at most so many tokens each."""
        loaded = self.loaded
        yield greedy_continuations(loaded.model, loaded.tokenizer, prompts, tokens)
        trim_memory()

    def damage(self, part: Part) -> Iterator[Any]:
        """A part of the side effects of the model as it is; see `side_effect_parts`."""
        loaded = self.loaded
        measured = part.of(loaded.model, loaded.tokenizer, loaded.known_arch)
        trim_memory()
        yield measured

    def sees(self, files: Files, name: str) -> Iterator[bool]:
        """Whether a file of the driver's is visible here."""
        yield files.size(name) is not None

    def probe(self, layers: tuple[int, ...]) -> Iterator[None]:
        """Check that the rewrite modules' output reaches the residual stream as it is."""
        for layer in layers:
            check_additivity(self.loaded.model, self.loaded.arch, layer)
        yield None


def add_update(loaded: LoadedModel, update: Update, stored: torch.dtype) -> None:
    """Add Δ to the rewrite weight of a model in memory, whatever its orientation and dtype.

    The sum is rounded to `stored` first: where computing is at least as wide as storing, it is then
    what a reader of the saved checkpoint gets.

    Raises:
        NumericalError: The sum does not fit the stored dtype.
    """
    weight = loaded.arch.rewrite_module(loaded.model, update.layer).weight
    assert isinstance(weight, torch.Tensor)
    # In the blocks of `memedit.patching`, so that every bit is the same.
    for start, stop in row_blocks(weight.shape):
        rows = weight.data[start:stop]
        delta = update.rows(start, stop, transposed=loaded.arch.family.conv1d)
        rounded = (rows.double() + delta.to(rows.device)).to(stored)
        if not bool(rounded.isfinite().all()):
            raise NumericalError(
                f"the edited weight of layer {update.layer} holds NaN or a number beyond {stored}; "
                "a larger λ or a smaller clamp makes the update smaller"
            )
        rows.copy_(rounded)
