"""Causal tracing: which states, restored one at a time, bring back a fact that noise has hidden.

A fact's subject is corrupted by noise on its embeddings (ROME, arXiv 2202.05262, section 2.1). One
state of the clean run is then put back at one layer and position, and what that adds to the
probability of the object is the state's indirect effect:

    IE(kind, l, t) = P(o | corrupted, state of `kind` at (l, t) restored) - P(o | corrupted)

The plain way runs the whole model for each of them. But nothing below layer l and nothing to the
left of position t can change, so here a pass begins at layer l with the corrupted states that are
kept, reads the keys and values of the tokens before t from the corrupted run, sees all noise
samples and many positions of many facts at once, and asks for logits at the last position only.
What lies before the subject has no effect at all. Knows a model and token ids; does not know
texts, averages (`memedit.effects`) or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from memedit.architecture import Architecture
from memedit.config import TraceSettings, digest_of
from memedit.errors import NumericalError
from memedit.interventions import first_output_replaced, noisy_embeddings, recorded_outputs
from memedit.segments import (
    Prefix,
    Rows,
    States,
    device_of,
    head_positions,
    run,
    run_to_block,
    skipped_blocks,
    stacked,
)

Kind: TypeAlias = Literal["hidden", "mlp", "attention"]
Part: TypeAlias = Literal["mlp", "attention"]
KINDS: tuple[Kind, ...] = ("hidden", "mlp", "attention")
"""What is restored: the output of a block, or those of the MLPs or attentions of a window."""
PARTS: tuple[Part, ...] = ("mlp", "attention")
"""What is severed: kept at its corrupted value while a hidden state is restored."""


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """The token ids of a fact's prompt, where its subject is, and the token that is watched."""

    case_id: str
    ids: tuple[int, ...]
    subject_first: int
    subject_last: int
    target_id: int


@dataclass(frozen=True, kw_only=True)
class FactTrace:
    """What restoring each state of one fact does to the probability of its object.

    `effects_LT[kind]` are indirect effects by layer and position, float32 on the CPU;
    `severed_L[part]` are those of the hidden state at the subject's last token while the MLPs (or
    attentions) of that token in all layers above stay at their corrupted values.
    """

    case_id: str
    clean: float
    """P(object) of the clean run."""
    corrupted: float
    """Mean P(object) of the corrupted runs."""
    effects_LT: Mapping[Kind, Tensor]
    severed_L: Mapping[Part, Tensor]

    @property
    def total(self) -> float:
        """The total effect: what the noise takes away, and all that a state can bring back."""
        return self.clean - self.corrupted


def default_tokens_per_batch(device: torch.device) -> int:
    """Positions held at once; a CPU wants what its caches hold, a GPU many."""
    return 256 * torch.get_num_threads() if device.type == "cpu" else 16384


@torch.inference_mode()
def embedding_spread(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """The standard deviation of the entries of some tokens' embeddings."""
    ids_T = torch.tensor(ids, device=device_of(model))
    return float(model.get_input_embeddings()(ids_T).double().std(correction=0))


def noise_of(request: TraceRequest, settings: TraceSettings, spread: float, width: int) -> Tensor:
    """Noise for the subject's tokens in each corrupted run, [S, subject, width], float32.

    It follows from the seed and the prompt, whatever else is traced, and wherever.
    """
    seed = int(digest_of(settings.seed, request.ids)[:15], 16)
    tokens = request.subject_last + 1 - request.subject_first
    drawn = torch.randn(
        settings.samples, tokens, width, generator=torch.Generator().manual_seed(seed)
    )
    return settings.noise * spread * drawn


def window_around(layer: int, window: int, n_layers: int) -> range:
    """The layers that are restored together; fewer at both ends of the model."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


@torch.inference_mode()
def trace_facts(
    model: PreTrainedModel,
    arch: Architecture,
    requests: Sequence[TraceRequest],
    *,
    settings: TraceSettings,
    spread: float,
) -> list[FactTrace]:
    """Trace some facts: every kind of state, every layer, every position.

    Args:
        model: On any device, any dtype; it is left as it was.
        arch: Where it keeps things.
        requests: The facts; their runs are in memory together.
        settings: See `TraceSettings`.
        spread: One standard deviation of the noise's unit; see `embedding_spread`.

    Raises:
        NumericalError: The model gives NaN or an infinity.
    """
    runs = _run_all(model, arch, requests, settings, spread)
    passes = _Passes(model=model, arch=arch, requests=requests, runs=runs, settings=settings)
    shapes = [(arch.n_layers, len(request.ids)) for request in requests]
    effects = {kind: [torch.zeros(shape) for shape in shapes] for kind in KINDS}
    severed = {part: [torch.zeros(arch.n_layers) for _ in requests] for part in PARTS}
    everywhere = [
        _Cell(fact=fact, position=position, tokens=len(request.ids) - position)
        for fact, request in enumerate(requests)
        # A state before the subject is the same in both runs.
        for position in range(request.subject_first, len(request.ids))
    ]
    for batch in passes.batches(everywhere):
        for kind in KINDS:
            for layer, found_C in enumerate(passes.restored(batch, kind)):
                for cell, effect in zip(batch.cells, found_C, strict=True):
                    effects[kind][cell.fact][layer, cell.position] = effect
    for batch in passes.batches([cell for cell in everywhere if passes.is_subject_last(cell)]):
        for part in PARTS:
            for layer, found_C in enumerate(passes.severed(batch, part)):
                for cell, effect in zip(batch.cells, found_C, strict=True):
                    severed[part][cell.fact][layer] = effect
    return [
        FactTrace(
            case_id=request.case_id,
            clean=float(runs.clean_N[fact]),
            corrupted=float(runs.corrupted_N[fact]),
            effects_LT={kind: effects[kind][fact] for kind in KINDS},
            severed_L={part: severed[part][fact] for part in PARTS},
        )
        for fact, request in enumerate(requests)
    ]


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """The clean run and the S corrupted runs of N facts, R = N (1 + S) rows, a fact's clean first.

    `outputs[kind, layer]` [R, T, O]; `states` the keys and values of all blocks, [2 L, R, h, T, d].
    """

    noise_RTO: Tensor
    outputs: Mapping[tuple[Kind, int], Tensor]
    states: States
    clean_N: Tensor
    corrupted_N: Tensor


def _parts_of(model: nn.Module, arch: Architecture) -> dict[tuple[Kind, int], nn.Module]:
    """The modules that give each kind of state."""
    found: dict[tuple[Kind, int], nn.Module] = {}
    for layer in range(arch.n_layers):
        found["hidden", layer] = arch.block(model, layer)
        # The output of the MLP's second map is the MLP's, and so it is with the attention's;
        # what a family wraps around them may hold the residual stream, too.
        found["mlp", layer] = arch.rewrite_module(model, layer)
        found["attention", layer] = arch.attention_output(model, layer)
    return found


def _run_all(
    model: PreTrainedModel,
    arch: Architecture,
    requests: Sequence[TraceRequest],
    settings: TraceSettings,
    spread: float,
) -> _Runs:
    """Run every fact clean and corrupted, once, and keep all states."""
    device, copies = device_of(model), 1 + settings.samples
    rows = Rows.of([request.ids for request in requests for _ in range(copies)], device=device)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    width = weight.shape[1]
    noise_RTO = torch.zeros(*rows.input_ids_BT.shape, width)
    for fact, request in enumerate(requests):
        corrupted = slice(fact * copies + 1, (fact + 1) * copies)
        subject = slice(request.subject_first, request.subject_last + 1)
        noise_RTO[corrupted, subject] = noise_of(request, settings, spread, width)
    noise_RTO = noise_RTO.to(device)
    # Not DynamicCache(config), which truncates sliding layers.
    inputs = rows.inputs() | {"past_key_values": DynamicCache(), "use_cache": True}
    every_R = torch.arange(len(rows.lengths_B))
    with (
        recorded_outputs(_parts_of(model, arch)) as seen,
        noisy_embeddings(model, noise_RTO),
        head_positions(arch.head(model), every_R, rows.lengths_B.cpu() - 1),
    ):
        logits_RV = model(**inputs).logits[0]
    targets_R = torch.tensor([r.target_id for r in requests for _ in range(copies)])
    probabilities = _probabilities(logits_RV, targets_R).view(len(requests), copies)
    layers: list[Any] = inputs["past_key_values"].layers
    # OPT flattens the batch before its rewrite module.
    outputs = {key: out.view(*noise_RTO.shape[:2], -1) for key, out in seen.items()}
    return _Runs(
        noise_RTO=noise_RTO,
        outputs=outputs,
        states=stacked(chain.from_iterable((at.keys, at.values) for at in layers)),
        clean_N=probabilities[:, 0],
        corrupted_N=probabilities[:, 1:].mean(1),
    )


def _probabilities(logits_BV: Tensor, targets_B: Tensor) -> Tensor:
    """The probability of one token each, [B], float64 on the CPU."""
    logits_BV = logits_BV.float()
    chosen_B = logits_BV.gather(1, targets_B.to(logits_BV.device).unsqueeze(1)).squeeze(1)
    found_B = (chosen_B - logits_BV.logsumexp(1)).double().exp().cpu()
    if not bool(found_B.isfinite().all()):
        raise NumericalError("the model's logits are not finite numbers")
    return found_B


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A position of a fact at which something is restored, and the tokens from there on."""

    fact: int
    position: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """The corrupted runs of some cells from their positions on, S rows a cell.

    A row's first token is the one at which something is restored. In `_Runs`, `corrupted_B` and
    `clean_B` are its rows, `places_BT` the positions of its tokens.
    """

    cells: Sequence[_Cell]
    rows: Rows
    corrupted_B: Tensor
    clean_B: Tensor
    places_BT: Tensor
    targets_B: Tensor


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """The forward passes over some facts whose runs are known."""

    model: PreTrainedModel
    arch: Architecture
    requests: Sequence[TraceRequest]
    runs: _Runs
    settings: TraceSettings

    def is_subject_last(self, cell: _Cell) -> bool:
        """Whether a cell is at the subject's last token."""
        return cell.position == self.requests[cell.fact].subject_last

    def batches(self, cells: Sequence[_Cell]) -> Iterator[_Batch]:
        """Cells of about the same length together, so that little is padded."""
        samples = self.settings.samples
        budget = self.settings.tokens_per_batch or default_tokens_per_batch(self.model.device)
        left = sorted(cells, key=lambda cell: (-cell.tokens, cell.fact))
        while left:
            widest, before, size = left[0].tokens, 1, 0
            for cell in left:
                # The keys and values of the tokens before are copied for each row.
                before = max(before, cell.position)
                if size and samples * (size + 1) * (before + widest) > budget:
                    break
                size += 1
            # Shorter ones would be padded; they have a batch of their own if there are enough.
            alike = sum(cell.tokens > 0.8 * widest for cell in left[:size])
            size = alike if 2 * alike >= size else size
            yield self._batch(left[:size])
            left = left[size:]

    def _batch(self, cells: Sequence[_Cell]) -> _Batch:
        samples, device = self.settings.samples, device_of(self.model)
        copies = 1 + samples
        each = [(cell, sample) for cell in cells for sample in range(samples)]
        corrupted = [cell.fact * copies + 1 + sample for cell, sample in each]
        prefix = Prefix.join(
            [
                tuple(run[:, row, :, : cell.position] for run in self.runs.states)
                for row, (cell, _) in zip(corrupted, each, strict=True)
            ]
        )
        ids = [self.requests[cell.fact].ids[cell.position :] for cell, _ in each]
        rows = Rows.of(ids, device=device, prefix=prefix)
        first_B1 = torch.tensor([[cell.position] for cell, _ in each], device=device)
        width = rows.input_ids_BT.shape[1]
        return _Batch(
            cells=cells,
            rows=rows,
            corrupted_B=torch.tensor(corrupted, device=device),
            clean_B=torch.tensor([cell.fact * copies for cell, _ in each], device=device),
            # Padding is never read; its place is any that exists.
            places_BT=(first_B1 + torch.arange(width, device=device)).clamp(
                max=self.runs.noise_RTO.shape[1] - 1
            ),
            targets_B=torch.tensor([self.requests[cell.fact].target_id for cell, _ in each]),
        )

    def restored(self, batch: _Batch, kind: Kind) -> Iterator[Tensor]:
        """The indirect effect of restoring a kind of state, for each cell, layer by layer."""
        if kind == "hidden":
            for layer in range(self.arch.n_layers):
                yield self._effect(batch, layer + 1, self._restored(batch, layer))
            return
        n_layers = self.arch.n_layers
        size = self.settings.window_of(n_layers)
        done, hidden_BTO = 0, None
        for layer in range(n_layers):
            window = window_around(layer, size, n_layers)
            if window.start > 0:
                hidden_BTO = self._tails(self.runs.outputs["hidden", window.start - 1], batch)
                with self._kept(batch, kind, window, batch.clean_B):
                    yield self._effect(batch, window.start, hidden_BTO)
                continue
            # Each window that begins at the first block goes on where the one before it ends.
            if done < window.stop:
                more = range(done, window.stop)
                with self._kept(batch, kind, more, batch.clean_B), self._noise(batch, done):
                    hidden_BTO = run_to_block(
                        self.model,
                        self.arch,
                        batch.rows,
                        first=done,
                        last=window.stop - 1,
                        hidden_BTO=hidden_BTO,
                    )
                done = window.stop
            assert hidden_BTO is not None
            yield self._effect(batch, done, hidden_BTO)

    def severed(self, batch: _Batch, part: Part) -> Iterator[Tensor]:
        """The effect of restoring the hidden state with a part above severed, layer by layer."""
        for layer in range(self.arch.n_layers):
            above = range(layer + 1, self.arch.n_layers)
            with self._kept(batch, part, above, batch.corrupted_B):
                yield self._effect(batch, layer + 1, self._restored(batch, layer))

    def _effect(self, batch: _Batch, first: int, hidden_BTO: Tensor) -> Tensor:
        """P(object) if block `first` receives these states, less P(object) as it is corrupted."""
        last_B = batch.rows.lengths_B.cpu() - 1
        with (
            skipped_blocks(self.model, self.arch, first) as entry,
            head_positions(self.arch.head(self.model), torch.arange(len(last_B)), last_B),
        ):
            entry.value = hidden_BTO
            logits_BV = run(self.model, batch.rows)[0]
        found_B = _probabilities(logits_BV, batch.targets_B)
        facts = torch.tensor([cell.fact for cell in batch.cells])
        return found_B.view(len(facts), -1).mean(1) - self.runs.corrupted_N[facts]

    def _restored(self, batch: _Batch, layer: int) -> Tensor:
        """The corrupted states at the output of a block, clean at the first position, [B, T, O]."""
        hidden_BTO = self._tails(self.runs.outputs["hidden", layer], batch)
        hidden_BTO[:, 0] = self._firsts("hidden", layer, batch, batch.clean_B)
        return hidden_BTO

    def _kept(
        self, batch: _Batch, part: Part, layers: range, rows_B: Tensor
    ) -> AbstractContextManager[None]:
        """Let a part of some layers give, at the first position, what it gave in other rows."""
        return first_output_replaced(
            (self._module(part, layer), self._firsts(part, layer, batch, rows_B))
            for layer in layers
        )

    def _noise(self, batch: _Batch, first: int) -> AbstractContextManager[None]:
        """The noise of the batch's tokens, where a pass begins at the embeddings."""
        if first > 0:
            return nullcontext()
        return noisy_embeddings(self.model, self._tails(self.runs.noise_RTO, batch))

    def _module(self, part: Part, layer: int) -> nn.Module:
        of = {"mlp": self.arch.rewrite_module, "attention": self.arch.attention_output}[part]
        return of(self.model, layer)

    def _tails(self, states_RTO: Tensor, batch: _Batch) -> Tensor:
        """The states of each row's tokens in its corrupted run, [B, T, O]."""
        rows_B, places_BT = (x.to(states_RTO.device) for x in (batch.corrupted_B, batch.places_BT))
        return states_RTO[rows_B.unsqueeze(1), places_BT]

    def _firsts(self, kind: Kind, layer: int, batch: _Batch, rows_B: Tensor) -> Tensor:
        """A kind of state at each row's first token, in some rows of the runs, [B, O]."""
        states_RTO = self.runs.outputs[kind, layer]
        return states_RTO[rows_B.to(states_RTO.device), batch.places_BT[:, 0].to(states_RTO.device)]
