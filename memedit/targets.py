"""z vectors: what the rewrite band has to say at a subject's last token, for many facts at once.

Implements the optimisation of z_i = h_i + δ_i (MEMIT, Eq. 16) with everything that does not depend
on δ taken out of the loop: the blocks up to the edited layer and the tokens before the subject's
last one run once, the head runs where a target is read only, and a fact that has converged makes
room for the next. Facts do not influence each other; batching changes the last bits only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from memedit.architecture import Architecture
from memedit.config import TargetSettings
from memedit.errors import NumericalError
from memedit.prompts import EncodedRequest
from memedit.segments import (
    Prefix,
    Rows,
    Stub,
    device_of,
    head_positions,
    run,
    run_prefix,
    run_to_block,
    skipped_blocks,
)


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

    `reads` are (position, token, weight) of the target in this row. states_KhPd stacks the keys and
    values of the blocks after the edited layer, alternating, on its first axis.
    """

    suffix_ids: list[int]
    reads: list[tuple[int, int, float]]
    hidden_SO: Tensor
    states_KhPd: Tensor


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
    # Neighbours in length share a batch with little padding.
    order = sorted(range(len(requests)), key=lambda i: _width(requests[i]), reverse=True)
    waiting = deque(order)
    active: list[_Fact] = []
    with _no_parameter_gradients(model):
        while waiting or active:
            # Refilling at half keeps a batch large without preparing facts one by one.
            if waiting and len(active) <= settings.facts_per_batch // 2:
                room = min(settings.facts_per_batch - len(active), len(waiting))
                taken = [waiting.popleft() for _ in range(room)]
                active += _prepare(model, arch, taken, requests, layer)
            with skipped_blocks(model, arch, layer + 1) as entry:
                batch = _Batch(model, arch, active, entry, layer)
                while not any(fact.finished for fact in active):
                    batch.step(settings)
            yield from (fact.target() for fact in active if fact.finished)
            active = [fact for fact in active if not fact.finished]


def _width(request: EncodedRequest) -> int:
    """Positions from the subject's last token on, in the widest context."""
    longest = max(len(text.ids) - text.subject_last for text in request.contexts)
    return longest + len(request.target_ids) - 1


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
    indices: Sequence[int],
    requests: Sequence[EncodedRequest],
    layer: int,
) -> list[_Fact]:
    """Run once what δ cannot change: the prefixes through all blocks, the rest up to `layer`."""
    device = device_of(model)
    prefixes: list[tuple[int, ...]] = []
    suffixes: list[list[int]] = []
    reads: list[list[tuple[int, int, float]]] = []
    spans: list[tuple[int, int, int]] = []  # first row, end, row of the KL term
    for index in indices:
        request, first = requests[index], len(prefixes)
        weight = 1 / (len(request.contexts) * len(request.target_ids))
        for text in request.contexts:
            at = text.subject_last
            prefixes.append(text.ids[:at])
            suffixes.append([*text.ids[at:], *request.target_ids[:-1]])
            start = len(text.ids) - at - 1
            reads.append([(start + i, t, weight) for i, t in enumerate(request.target_ids)])
        bare, kl = request.contexts[0], request.kl
        kl_row = first
        # By causality only the tokens up to the subject matter to the KL term; a prompt that
        # begins like "{subject} is a" has computed it already.
        if kl.ids[: kl.subject_last + 1] != bare.ids[: bare.subject_last + 1]:
            kl_row = len(prefixes)
            prefixes.append(kl.ids[: kl.subject_last])
            suffixes.append([kl.ids[kl.subject_last]])
            reads.append([])
        spans.append((first, len(prefixes), kl_row))

    prefix = run_prefix(model, arch, prefixes, device=device)
    hidden_BSO = run_to_block(
        model, arch, Rows.of(suffixes, device=device, prefix=prefix), last=layer
    )
    tail = [state for pair in prefix.layers[layer + 1 :] if pair is not None for state in pair]
    states_KBhPd = torch.stack(tail) if tail else hidden_BSO.new_zeros(0, len(prefixes), 1, 1, 1)
    width = states_KBhPd.shape[3]
    rows = [
        _Row(
            suffix_ids=suffixes[b],
            reads=reads[b],
            hidden_SO=hidden_BSO[b, : len(suffixes[b])].clone(),
            states_KhPd=states_KBhPd[:, b, :, width - len(prefixes[b]) :].clone(),
        )
        for b in range(len(prefixes))
    ]
    facts = []
    for index, (first, end, kl_row) in zip(indices, spans, strict=True):
        h_O = rows[first].hidden_SO[0].float()
        facts.append(
            _Fact(
                case_id=requests[index].request.case_id,
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
        device = facts[0].h_O.device
        rows = [row for fact in facts for row in fact.rows]
        self.h_norm_N = torch.stack([fact.h_O.norm() for fact in facts])
        self.slot_B = torch.tensor(
            [slot for slot, fact in enumerate(facts) for _ in fact.rows], device=device
        )
        self.rows = Rows.of(
            [row.suffix_ids for row in rows],
            device=device,
            prefix=_join_prefixes([row.states_KhPd for row in rows], skipped=layer + 1),
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
        for slot, fact in enumerate(self.facts):
            if fact.kl_before_V is None:  # the first step has δ = 0
                fact.kl_before_V = after_NV[slot].detach()
        before_NV = torch.stack([f.kl_before_V for f in self.facts if f.kl_before_V is not None])
        kl_N = (after_NV.exp() * (after_NV - before_NV)).sum(-1)
        decay_N = torch.linalg.vector_norm(delta_NO, dim=1) / self.h_norm_N**2
        total_N: Tensor = loss_N + settings.kl_factor * kl_N + settings.v_weight_decay * decay_N
        return total_N

    def step(self, settings: TargetSettings) -> None:
        """One forward pass, and an Adam update of every fact that has not converged."""
        delta_NO = torch.stack([fact.delta_O for fact in self.facts]).requires_grad_()
        with torch.enable_grad():
            loss_N = self.losses(delta_NO, settings)
            (gradient_NO,) = torch.autograd.grad(loss_N.sum(), delta_NO)
        for slot, (fact, loss) in enumerate(zip(self.facts, loss_N.tolist(), strict=True)):
            if not math.isfinite(loss):
                raise NumericalError(f"the z loss of fact {fact.case_id} is {loss}")
            fact.losses.append(loss)
            if loss < settings.loss_threshold:
                fact.converged = fact.finished = True
                continue
            _adam(fact, gradient_NO[slot], settings)
            # The reference's last forward pass makes no update, so it need not run.
            fact.finished = len(fact.losses) >= settings.steps - 1


def _adam(fact: _Fact, gradient_O: Tensor, settings: TargetSettings) -> None:
    """Adam (Kingma and Ba) with torch's defaults, then the clamp of the norm; changes `fact`."""
    step = len(fact.losses)
    fact.mean_O = torch.lerp(fact.mean_O, gradient_O, 1 - 0.9)
    fact.variance_O = 0.999 * fact.variance_O + (1 - 0.999) * gradient_O**2
    mean_O = fact.mean_O / (1 - 0.9**step)
    scale_O = (fact.variance_O / (1 - 0.999**step)).sqrt() + 1e-8
    delta_O = fact.delta_O - settings.lr * mean_O / scale_O
    limit = settings.clamp_norm_factor * fact.h_O.norm()
    norm = delta_O.norm()
    fact.delta_O = delta_O * (limit / norm) if norm > limit else delta_O


def _join_prefixes(states: Sequence[Tensor], *, skipped: int) -> Prefix:
    """Left-pad the rows' prefix states to one width; the skipped blocks have none."""
    first, width = states[0], max(state.shape[2] for state in states)
    joined = first.new_zeros(first.shape[0], len(states), first.shape[1], width, first.shape[3])
    mask_BP = torch.zeros(len(states), width, dtype=torch.long, device=first.device)
    for b, state in enumerate(states):
        start = width - state.shape[2]
        joined[:, b, :, start:] = state
        mask_BP[b, start:] = 1
    pairs = [(joined[i], joined[i + 1]) for i in range(0, len(joined), 2)]
    return Prefix(mask_BP=mask_BP, layers=(*[None] * skipped, *pairs))
