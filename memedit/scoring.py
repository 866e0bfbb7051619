"""How probable a model finds completions: many at once, and each forward pass used fully.

A question is "log P(token | context)". All questions are collected first; a context that is the
beginning of another one is answered by the other's row, so a prompt with two one-token candidates
is one row, and a prompt that many facts share runs once. Rows are sorted by length into batches,
padded on the right, where a causal model does not look; logits exist only at the asked positions.

Knows token ids and log-probabilities. Does not know texts, facts or metrics (`memedit.evaluate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memedit.architecture import Architecture
from memedit.errors import InputError, NumericalError
from memedit.segments import head_positions

Ids: TypeAlias = tuple[int, ...]

# Logits of one batch, and the part of them that is turned into float32 log-probabilities at once.
_LOGITS_BYTES_CPU, _LOGITS_BYTES_GPU = 24 * 2**20, 512 * 2**20
_CHUNK_BYTES = 16 * 2**20
_WINDOWS_PER_CALL = 16


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Token ids of a prompt and of one candidate for what follows it.

    Raises:
        InputError: One of the two is empty, so that there is nothing to ask.
    """

    prompt_ids: Ids
    target_ids: Ids

    def __post_init__(self) -> None:
        for field, ids in (("prompt", self.prompt_ids), ("target", self.target_ids)):
            if not ids:
                raise InputError(f"a completion needs a {field} of at least one token", field=field)


@dataclass(frozen=True, kw_only=True)
class CompletionScore:
    """How probable a completion is, and how much of it the model would say by itself."""

    logprob: float
    """Mean log-probability per target token, in nats."""
    accuracy: float
    """The share of target tokens that are the argmax after those before them, 0 to 1."""

    @property
    def exact(self) -> bool:
        """Each is."""
        return self.accuracy == 1.0


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """The rows to run, and for each context the (row, column) whose logits answer it."""

    rows: tuple[Ids, ...]
    places: tuple[tuple[int, int], ...]


def plan_rows(contexts: Sequence[Ids]) -> RowPlan:
    """The fewest rows that contain every context as a beginning.

    In lexicographic order all continuations of a context follow it directly. Going backwards, the
    row opened last therefore contains the context if any row does.
    """
    rows: list[Ids] = []
    places = [(0, 0)] * len(contexts)
    for i in sorted(range(len(contexts)), key=contexts.__getitem__, reverse=True):
        context = contexts[i]
        if not rows or rows[-1][: len(context)] != context:
            rows.append(context)
        places[i] = (len(rows) - 1, len(context) - 1)
    return RowPlan(rows=tuple(rows), places=tuple(places))


@torch.inference_mode()
def next_token_logprobs(
    model: PreTrainedModel,
    arch: Architecture | None,
    contexts: Sequence[Ids],
    *,
    tokens_per_batch: int | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Log-probabilities of the token after each context, a chunk of contexts at a time.

    Args:
        model: On any device, any dtype; the log-softmax is in float32.
        arch: Where the model keeps its head; None asks the model itself, so that families which
            cannot be edited can still be measured.
        contexts: Non-empty token ids.
        tokens_per_batch: Rows times columns of one forward pass; None for what suits the device.

    Yields:
        Indices into `contexts`, in no particular order, and their `logprobs_QV` in nats, float32,
        on the model's device, valid until the next chunk.

    Raises:
        NumericalError: The model gives NaN or an infinity.
    """
    plan = plan_rows(contexts)
    asked: list[list[int]] = [[] for _ in plan.rows]
    for i, (row, _) in enumerate(plan.places):
        asked[row].append(i)
    head = arch.head(model) if arch else model.get_output_embeddings()
    device = model.device
    # On a CPU, activations that stay in each core's cache are worth more than large products.
    fitting = 256 * torch.get_num_threads() if device.type == "cpu" else 32768
    limit = tokens_per_batch or fitting
    vocab = int(model.config.get_text_config().vocab_size)
    logits_bytes = _LOGITS_BYTES_CPU if device.type == "cpu" else _LOGITS_BYTES_GPU
    positions = max(1, logits_bytes // (4 * vocab))
    chunk = max(1, _CHUNK_BYTES // (4 * vocab))

    for batch in _batches(plan.rows, [len(a) for a in asked], limit, positions):
        # Padding repeats each row's last token: nothing that is read lies to the right of it.
        width = len(plan.rows[batch[0]])
        ids_BT = [(*row, *row[-1:] * (width - len(row))) for row in (plan.rows[b] for b in batch)]
        wanted = [i for b in batch for i in asked[b]]
        rows = torch.tensor([r for r, b in enumerate(batch) for _ in asked[b]], device=device)
        cols = torch.tensor([plan.places[i][1] for i in wanted], device=device)
        with head_positions(head, rows, cols):
            logits_QV = model(
                input_ids=torch.tensor(ids_BT, device=device), use_cache=False
            ).logits[0]
        for start in range(0, len(wanted), chunk):
            logprobs_QV = logits_QV[start : start + chunk].float().log_softmax(-1)
            # One NaN or +inf among the logits makes its whole row NaN.
            if logprobs_QV[:, 0].isnan().any():
                raise NumericalError("the model's logits are not finite numbers")
            yield wanted[start : start + chunk], logprobs_QV


def _batches(
    rows: Sequence[Ids], weights: Sequence[int], tokens: int, positions: int
) -> Iterator[list[int]]:
    """Rows, longest first, in batches within `tokens` (padded) and `positions` (asked)."""
    batch: list[int] = []
    weight = 0
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), rows[i])):
        if batch and (
            (len(batch) + 1) * len(rows[batch[0]]) > tokens or weight + weights[i] > positions
        ):
            yield batch
            batch, weight = [], 0
        batch.append(i)
        weight += weights[i]
    if batch:
        yield batch


def score_completions(
    model: PreTrainedModel,
    arch: Architecture | None,
    completions: Sequence[Completion],
    *,
    tokens_per_batch: int | None = None,
) -> list[CompletionScore]:
    """Score each completion; the result does not depend on the others, up to float noise.

    Arguments and errors are those of `next_token_logprobs`.
    """
    asked: dict[Ids, list[tuple[int, int]]] = {}
    for i, completion in enumerate(completions):
        context = completion.prompt_ids
        for token in completion.target_ids:
            asked.setdefault(context, []).append((i, token))
            context = (*context, token)
    contexts = list(asked)
    logprobs: list[list[float]] = [[] for _ in completions]
    hits = [0] * len(completions)
    for places, logprobs_QV in next_token_logprobs(
        model, arch, contexts, tokens_per_batch=tokens_per_batch
    ):
        picks = [(q, i, t) for q, place in enumerate(places) for i, t in asked[contexts[place]]]
        queries, owners, tokens = zip(*picks, strict=True)
        rows = torch.tensor(queries, device=logprobs_QV.device)
        candidates = torch.tensor(tokens, device=logprobs_QV.device)
        values = logprobs_QV[rows, candidates].tolist()
        said = (logprobs_QV.argmax(-1)[rows] == candidates).tolist()
        for i, value, hit in zip(owners, values, said, strict=True):
            logprobs[i].append(value)
            hits[i] += hit
    return [
        CompletionScore(logprob=math.fsum(values) / len(values), accuracy=hit / len(values))
        for values, hit in zip(logprobs, hits, strict=True)
    ]


def heldout_windows(
    documents: Sequence[Sequence[int]], *, window: int = 256, max_tokens: int = 2048
) -> list[Ids]:
    """Windows of held-out text, each of which starts without memory of the one before.

    Args:
        documents: Token ids.
        window: Tokens per window; one of a single token predicts nothing and is left out.
        max_tokens: Stop reading after this many tokens.
    """
    windows: list[Ids] = []
    left = max_tokens
    for document in documents:
        for start in range(0, min(len(document), left), window):
            piece = tuple(document[start : min(start + window, left)])
            if len(piece) > 1:
                windows.append(piece)
        left = max(0, left - len(document))
    return windows


def log_likelihoods(
    model: PreTrainedModel,
    arch: Architecture | None,
    windows: Sequence[Ids],
    *,
    tokens_per_batch: int | None = None,
) -> list[tuple[float, int]]:
    """Σ log P(token | those before it) of each window, in nats, and over how many tokens.

    The first token of a window is given, not predicted. Arguments and errors are those of
    `next_token_logprobs`.
    """
    found: list[tuple[float, int]] = []
    # A few windows at a time: each position is a context of its own here, written out in full.
    for first in range(0, len(windows), _WINDOWS_PER_CALL):
        part = [
            Completion(prompt_ids=w[:1], target_ids=w[1:])
            for w in windows[first : first + _WINDOWS_PER_CALL]
        ]
        scores = score_completions(model, arch, part, tokens_per_batch=tokens_per_batch)
        for completion, score in zip(part, scores, strict=True):
            count = len(completion.target_ids)
            found.append((score.logprob * count, count))
    return found


def perplexity_of(likelihoods: Sequence[tuple[float, int]]) -> float | None:
    """exp(-Σ log P / tokens) over what `log_likelihoods` gives.

    None without a token; infinite where it overflows.
    """
    count = sum(tokens for _, tokens in likelihoods)
    if not count:
        return None
    try:
        return math.exp(-math.fsum(total for total, _ in likelihoods) / count)
    except OverflowError:
        return math.inf
