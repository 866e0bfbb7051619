"""z vectors: what the rewrite band has to say at a subject's last token, for many facts at once.

Implements the optimisation of z_i = h_i + δ_i (MEMIT, Eq. 16) with everything that does not depend
on δ taken out of the loop: the blocks up to the edited layer and the tokens before the subject's
last one run once, the head runs where a target is read only, and a fact that has converged makes
room for the next. Facts do not influence each other; batching changes the last bits only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from memedit.architecture import Architecture
from memedit.config import TargetSettings
from memedit.errors import NumericalError
from memedit.prompts import EncodedRequest, Located
from memedit.segments import (
    Prefix,
    Rows,
    States,
    Stub,
    device_of,
    head_positions,
    run,
    run_prefix,
    run_to_block,
    skipped_blocks,
)

# A fact narrower than this share of its batch would be padding for the most part.
_NARROW = 0.7
# Each row also holds the states before its positions, and logits: as much as some positions more.
_POSITIONS_BESIDE = 4


def default_tokens_per_batch(device: torch.device) -> int:
    """Positions optimised at once where the settings leave it open; a GPU wants thousands."""
    return 256 if device.type == "cpu" else 8192


@dataclass(frozen=True, kw_only=True)
class Target:
    """The z vector of one fact and how it was found.

    z_O float32 [hidden], on the CPU. `losses` are those before each update; `converged` says
    whether the last of them was below the threshold.
    """

    case_id: str
    z_O: Tensor
    h_norm: float
    delta_norm: float
    losses: tuple[float, ...]
    converged: bool


@dataclass(kw_only=True)
class _Row:
    """One text of a fact from the subject's last token on, with the states of what is before.

    `reads` are (position, token, weight) of the target in this row. `states` are those of the
    blocks after the edited layer, each tensor [K, h, P, d].
    """

    suffix_ids: list[int]
    reads: list[tuple[int, int, float]]
    hidden_SO: Tensor
    states: States


@dataclass(kw_only=True)
class _Fact:
    """A fact under way: its rows and the state of its optimiser.

    The next-token distribution that must not move is read at the first position of `kl_row`.
    """

    case_id: str
    rows: list[_Row]
    kl_row: int
    h_O: Tensor
    delta_O: Tensor
    mean_O: Tensor
    variance_O: Tensor
    kl_before_V: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    converged: bool = False
    finished: bool = False

    def target(self) -> Target:
        return Target(
            case_id=self.case_id,
            z_O=(self.h_O + self.delta_O).cpu(),
            h_norm=float(self.h_O.norm()),
            delta_norm=float(self.delta_O.norm()),
            losses=tuple(self.losses),
            converged=self.converged,
        )


def optimise_targets(
    model: PreTrainedModel,
    arch: Architecture,
    requests: Sequence[EncodedRequest],
    *,
    layer: int,
    settings: TargetSettings,
) -> Iterator[Target]:
    """Find z at the output of block `layer` for each request (MEMIT, Eq. 16).

    Yields the targets as they are found, which is not the order of the requests.

    For each fact, Adam from δ = 0 on
    mean over contexts and target tokens of −log P(target | context + prompt)
    + kl_factor · KL(P_after ‖ P_before) at the subject in "{subject} is a"
    + v_weight_decay · ‖δ‖ / ‖h‖², clamped to ‖δ‖ ≤ clamp_norm_factor · ‖h‖ after each step.
    As in the reference, `steps` counts forward passes and the last one makes no update (it is
    therefore not run), and a fact stops once its loss is below `loss_threshold`.

    Args:
        model: In evaluation mode, any dtype and device. No parameter changes or gets a gradient.
        arch: Where the model keeps things.
        requests: Encoded facts.
        layer: The last edited layer.
        settings: See `TargetSettings`.

    Raises:
        NumericalError: A loss is not finite.
    """
    budget = settings.tokens_per_batch or default_tokens_per_batch(model.device)
    # Neighbours in length share a batch with little padding; the longest come first.
    waiting = deque(sorted(requests, key=width, reverse=True))
    active: list[_Fact] = []
    with _no_parameter_gradients(model):
        shared = _SharedContexts(model, arch, requests)
        while waiting or active:
            # Refilling at half keeps a batch large without preparing facts one by one.
            rows = [row for fact in active for row in fact.rows]
            widest = max((len(row.suffix_ids) for row in rows), default=0)
            if waiting and _weight(len(rows), widest) <= budget / 2:
                shapes = ((rows_of(request), width(request)) for request in waiting)
                joining = fitting(shapes, budget=budget, rows=len(rows), widest=widest)
                taken = [waiting.popleft() for _ in range(joining)]
                if taken:
                    active += _prepare(model, arch, taken, layer, shared)
            with skipped_blocks(model, arch, layer + 1) as entry:
                batch = _Batch(model, arch, active, entry, layer)
                while not any(fact.finished for fact in active):
                    batch.step(settings)
            yield from (fact.target() for fact in active if fact.finished)
            active = [fact for fact in active if not fact.finished]


def fitting(
    shapes: Iterable[tuple[int, int]], *, budget: int, rows: int = 0, widest: int = 0
) -> int:
    """How many facts may join a batch that has `rows` rows of `widest` positions, padded.

    Args:
        shapes: Rows and width of the facts that wait, the widest first.
        budget: Positions that the batch may have, padding and some more for each row counted; a
            single fact may have more.
        rows: Rows in the batch already.
        widest: Their width.
    """
    joining = 0
    for more, wide in shapes:
        widest = max(widest, wide)
        # Much narrower facts wait for a batch of their own, unless this one would be small.
        ragged = wide < _NARROW * widest and _weight(rows, widest) >= budget / 2
        if rows and (ragged or _weight(rows + more, widest) > budget):
            break
        rows += more
        joining += 1
    return joining


def _weight(rows: int, widest: int) -> int:
    return rows * (widest + _POSITIONS_BESIDE)


def whole_batches(requests: Sequence[EncodedRequest], *, budget: int) -> list[list[EncodedRequest]]:
    """Cut facts, the widest first, into batches as large as `budget` positions allow."""
    waiting = deque(sorted(requests, key=width, reverse=True))
    batches = []
    while waiting:
        shapes = ((rows_of(request), width(request)) for request in waiting)
        batches.append([waiting.popleft() for _ in range(fitting(shapes, budget=budget))])
    return batches


def width(request: EncodedRequest) -> int:
    """Positions from the subject's last token on, in the widest context."""
    longest = max(len(text.ids) - text.subject_last for text in request.contexts)
    return longest + len(request.target_ids) - 1


def rows_of(request: EncodedRequest) -> int:
    """Rows that a fact takes in a batch: one a context, and mostly one for the KL term."""
    return len(request.contexts) + needs_kl_row(request)


def needs_kl_row(request: EncodedRequest) -> bool:
    """Whether the KL term is read on a row of its own.

    By causality only the tokens up to the subject matter to it; a prompt that begins like
    "{subject} is a" has computed the same state already.
    """
    bare, kl = request.contexts[0], request.kl
    return kl.ids[: kl.subject_last + 1] != bare.ids[: bare.subject_last + 1]


class _SharedContexts:
    """The states of what all facts begin with, context by context: it runs once for all of them.

    `ids[j]` are the tokens that the j-th context of every fact begins with; the last entry is that
    of the KL prompt.
    """

    def __init__(
        self, model: PreTrainedModel, arch: Architecture, requests: Sequence[EncodedRequest]
    ) -> None:
        texts = [[*request.contexts, request.kl] for request in requests]
        self.ids = [
            _common([t.ids[: t.subject_last] for t in column])
            for column in zip(*texts, strict=True)
        ]
        self.states = run_prefix(model, arch, self.ids, device=device_of(model)).rows()


def _common(rows: Sequence[Sequence[int]]) -> list[int]:
    """The longest beginning that all rows share."""
    agreeing = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in agreeing]


@contextmanager
def _no_parameter_gradients(model: PreTrainedModel) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def _prepare(
    model: PreTrainedModel,
    arch: Architecture,
    requests: Sequence[EncodedRequest],
    layer: int,
    shared: _SharedContexts,
) -> list[_Fact]:
    """Run once what δ cannot change: what is before the subject, and the rest up to `layer`."""
    texts: list[Located] = []
    shares: list[int] = []  # which of the shared beginnings
    suffixes: list[list[int]] = []
    reads: list[list[tuple[int, int, float]]] = []
    spans: list[tuple[int, int, int]] = []  # first row, end, row of the KL term
    for request in requests:
        first = len(texts)
        weight = 1 / (len(request.contexts) * len(request.target_ids))
        for j, text in enumerate(request.contexts):
            texts.append(text)
            shares.append(j)
            suffixes.append([*text.ids[text.subject_last :], *request.target_ids[:-1]])
            start = len(text.ids) - text.subject_last - 1
            reads.append([(start + i, t, weight) for i, t in enumerate(request.target_ids)])
        kl_row = first
        if needs_kl_row(request):
            kl_row = len(texts)
            texts.append(request.kl)
            shares.append(-1)
            suffixes.append([request.kl.ids[request.kl.subject_last]])
            reads.append([])
        spans.append((first, len(texts), kl_row))

    device = device_of(model)
    prefix = run_prefix(
        model,
        arch,
        [t.ids[len(shared.ids[j]) : t.subject_last] for t, j in zip(texts, shares, strict=True)],
        device=device,
        before=Prefix.join([shared.states[j] for j in shares]),
    )
    hidden_BSO = run_to_block(
        model, arch, Rows.of(suffixes, device=device, prefix=prefix), last=layer
    )
    rows = [
        _Row(
            suffix_ids=suffixes[b],
            reads=reads[b],
            hidden_SO=hidden_BSO[b, : len(suffixes[b])].clone(),
            states=tuple(run.clone() for run in states),
        )
        for b, states in enumerate(prefix.rows(first=layer + 1))
    ]
    facts = []
    for request, (first, end, kl_row) in zip(requests, spans, strict=True):
        h_O = rows[first].hidden_SO[0].float()
        facts.append(
            _Fact(
                case_id=request.request.case_id,
                rows=rows[first:end],
                kl_row=kl_row - first,
                h_O=h_O,
                delta_O=torch.zeros_like(h_O),
                mean_O=torch.zeros_like(h_O),
                variance_O=torch.zeros_like(h_O),
            )
        )
    return facts


class _Batch:
    """The rows of several facts as tensors for the tail run; lives until a fact leaves or joins."""

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Architecture,
        facts: Sequence[_Fact],
        entry: Stub,
        layer: int,
    ) -> None:
        self.model, self.head, self.facts, self.entry = model, arch.head(model), facts, entry
        # That of the edited block, where δ is; token ids and logits go through it too.
        device = facts[0].h_O.device
        rows = [row for fact in facts for row in fact.rows]
        self.h_norm_N = torch.stack([fact.h_O.norm() for fact in facts])
        self.delta_NO = torch.stack([fact.delta_O for fact in facts])
        self.mean_NO = torch.stack([fact.mean_O for fact in facts])
        self.variance_NO = torch.stack([fact.variance_O for fact in facts])
        self.slot_B = torch.tensor(
            [slot for slot, fact in enumerate(facts) for _ in fact.rows], device=device
        )
        self.rows = Rows.of(
            [row.suffix_ids for row in rows],
            device=device,
            prefix=Prefix.join([row.states for row in rows], first=layer + 1),
        )
        self.hidden_BSO = nn.utils.rnn.pad_sequence(
            [row.hidden_SO for row in rows], batch_first=True
        )
        # Logits are computed at the targets' positions, then at one position a fact for the KL.
        read = [(b, *r) for b, row in enumerate(rows) for r in row.reads]
        starts = [0, *accumulate(len(fact.rows) for fact in facts)]
        kl = [(start + fact.kl_row, 0) for start, fact in zip(starts, facts, strict=False)]
        self.at_rows = torch.tensor([r[0] for r in read] + [b for b, _ in kl], device=device)
        self.at_cols = torch.tensor([r[1] for r in read] + [c for _, c in kl], device=device)
        self.tokens = torch.tensor([r[2] for r in read], device=device)
        self.weights = torch.tensor([r[3] for r in read], device=device)
        self.read_slots = self.slot_B[self.at_rows[: len(read)]]
        self.kl_before_NV: Tensor | None = None

    def losses(self, delta_NO: Tensor, settings: TargetSettings) -> Tensor:
        """The objective of each fact at δ, [N] (MEMIT, Eq. 16)."""
        at_subject = self.hidden_BSO[:, :1] + delta_NO[self.slot_B, None].to(self.hidden_BSO.dtype)
        self.entry.value = torch.cat([at_subject, self.hidden_BSO[:, 1:]], dim=1)
        with head_positions(self.head, self.at_rows, self.at_cols):
            logits = run(self.model, self.rows)[0].float()
        reads = len(self.tokens)
        nll = F.cross_entropy(logits[:reads], self.tokens, reduction="none")
        loss_N = torch.zeros_like(self.h_norm_N).index_add(0, self.read_slots, nll * self.weights)

        after_NV = logits[reads:].log_softmax(-1)
        before_NV = self._kl_before(after_NV)
        kl_N = (after_NV.exp() * (after_NV - before_NV)).sum(-1)
        decay_N = torch.linalg.vector_norm(delta_NO, dim=1) / self.h_norm_N**2
        total_N: Tensor = loss_N + settings.kl_factor * kl_N + settings.v_weight_decay * decay_N
        return total_N

    def _kl_before(self, after_NV: Tensor) -> Tensor:
        """The distributions that must not move: those of each fact's first pass, where δ is 0."""
        if self.kl_before_NV is None:
            kept = [fact.kl_before_V for fact in self.facts]
            first = after_NV.detach()
            self.kl_before_NV = torch.stack(
                [first[slot] if row is None else row for slot, row in enumerate(kept)]
            )
            for fact, row_V in zip(self.facts, self.kl_before_NV, strict=True):
                fact.kl_before_V = row_V
        return self.kl_before_NV

    def step(self, settings: TargetSettings) -> None:
        """One forward pass, and an Adam update of every fact that has not converged."""
        delta_NO = self.delta_NO.detach().requires_grad_()
        with torch.enable_grad():
            loss_N = self.losses(delta_NO, settings)
            (gradient_NO,) = torch.autograd.grad(loss_N.sum(), delta_NO)
        for fact, loss in zip(self.facts, loss_N.tolist(), strict=True):
            if not math.isfinite(loss):
                raise NumericalError(f"the z loss of fact {fact.case_id} is {loss}")
            fact.losses.append(loss)
            fact.converged = loss < settings.loss_threshold
            # The reference's last forward pass makes no update, so it need not run.
            fact.finished = fact.converged or len(fact.losses) >= settings.steps - 1
        self._adam(gradient_NO, settings)
        for slot, fact in enumerate(self.facts):
            if not fact.converged:
                fact.delta_O = self.delta_NO[slot]
                fact.mean_O, fact.variance_O = self.mean_NO[slot], self.variance_NO[slot]

    def _adam(self, gradient_NO: Tensor, settings: TargetSettings) -> None:
        """Adam (Kingma and Ba) with torch's defaults, then the clamp of the norm."""
        steps = [len(fact.losses) for fact in self.facts]
        # In Python's float64: 1 - 0.999 loses four digits in float32.
        first_N1, second_N1 = (
            self.h_norm_N.new_tensor([[1 - beta**step] for step in steps]) for beta in (0.9, 0.999)
        )
        self.mean_NO = torch.lerp(self.mean_NO, gradient_NO, 1 - 0.9)
        self.variance_NO = 0.999 * self.variance_NO + (1 - 0.999) * gradient_NO**2
        mean_NO = self.mean_NO / first_N1
        scale_NO = (self.variance_NO / second_N1).sqrt() + 1e-8
        delta_NO = self.delta_NO - settings.lr * mean_NO / scale_NO
        limit_N1 = settings.clamp_norm_factor * self.h_norm_N[:, None]
        norm_N1 = torch.linalg.vector_norm(delta_NO, dim=1, keepdim=True)
        self.delta_NO = delta_NO * (limit_N1 / norm_N1).clamp(max=1.0)
