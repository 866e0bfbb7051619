"""What an edit costs, by arithmetic: operations and bytes of memory, each with its sum written out.

An operation is one multiplication or addition of a matrix product; a product of [a, b] and [b, c]
has 2·a·b·c. Attention counts with the full square of queries and keys, as the kernels compute it.
Everything smaller than a matrix product (norms, activations, softmax) is left out of operations.

Knows sizes of models and counts of tokens, and mirrors what `memedit.moments`, `memedit.targets`,
`memedit.keys` and `memedit.solve` do. Does not know machines, files or texts; allocates no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from memedit.architecture import Architecture, skeleton
from memedit.collect import TOKENS_PER_COUNT
from memedit.prompts import EncodedRequest
from memedit.solve import factors_are_cheaper
from memedit.targets import fitting, needs_kl_row

_SKETCH_WIDTH = 32  # of the convergence estimate of the second moments
_FLOAT64 = 8
_MOST_SAMPLED = 160


@dataclass(frozen=True, kw_only=True)
class Amount:
    """An amount and how it was worked out, for a person to check; units are those of the sum."""

    value: float
    how: str


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that decide what it costs. Weights are counts of elements.

    `block_weights` are those of a block's linear maps, `rewrite_weights` the part of them that is
    edited; `attention_width` is heads times head width, `state_width` what one token leaves in the
    key-value cache of one block.
    """

    blocks: int
    hidden: int
    inner: int
    vocab: int
    block_weights: int
    rewrite_weights: int
    head_weights: int
    parameters: int
    attention_width: int
    state_width: int


def shape_of(config: PretrainedConfig, arch: Architecture) -> ModelShape:
    """The sizes of a model, from its config alone (one block of it is built without memory)."""
    model, text = skeleton(config), config.get_text_config(decoder=True)
    inner, hidden = arch.widths(model)
    block = arch.block(model, 0)
    in_block = sum(p.numel() for p in block.parameters())
    head = arch.head(model).weight
    assert isinstance(head, Tensor)
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        blocks=arch.n_layers,
        hidden=hidden,
        inner=inner,
        vocab=head.shape[0],
        block_weights=sum(
            m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear | Conv1D)
        ),
        rewrite_weights=inner * hidden,
        head_weights=head.numel(),
        # The skeleton is one block deep; a tied head is counted once, as it is held once.
        parameters=sum(p.numel() for p in model.parameters()) + in_block * (arch.n_layers - 1),
        attention_width=heads * head_width,
        state_width=2 * _state_heads(text) * head_width,
    )


def _state_heads(config: PretrainedConfig) -> int:
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    for field in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, field, None):
            return int(getattr(config, field))
    return int(config.num_attention_heads)


# ------------------------------------------------------------------------------------- the texts


@dataclass(frozen=True, kw_only=True)
class TextCounts:
    """How many tokens the facts of a run have where they cost something.

    "Before" and "from" mean: before, and from the subject's last token on, the target included;
    padded as the batches of `memedit.targets` pad them. What all facts begin with counts once.
    Pairs are of a query with a key, over all rows. `batch_*` are of the batch with most tokens. The
    keys need each text up to the subject's last token: bare prompts apart from the others.
    """

    facts: int
    tokens_before: int
    pairs_before: int
    tokens_from: int
    pairs_from: int
    reads: int
    batch_states: int
    batch_from: int
    batch_reads: int
    bare_tokens: int
    bare_pairs: int
    context_tokens: int
    context_pairs: int
    from_subject_mean: float
    """Tokens of a fact from the subject on, over all its contexts, without padding."""
    from_subject_max: int


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Tokens of one text: shared with all facts, before the subject's last one, and from it on.

    `reads` are the positions of the target, whose logits are needed.
    """

    shared: int
    before: int
    after: int
    reads: int


@dataclass(frozen=True)
class _Batch:
    facts: Sequence[Sequence[_Row]]

    @property
    def rows(self) -> list[_Row]:
        return [row for fact in self.facts for row in fact]

    @property
    def reads(self) -> int:
        return sum(row.reads for row in self.rows) + len(self.facts)  # one each for the KL term

    @property
    def new_before(self) -> int:
        return max(1, *(row.before - row.shared for row in self.rows))

    @property
    def before(self) -> int:
        return max(1, *(row.before for row in self.rows))

    @property
    def after(self) -> int:
        return max(row.after for row in self.rows)


def count_texts(requests: Sequence[EncodedRequest], *, tokens_per_batch: int) -> TextCounts:
    """Count the tokens of encoded facts, at least one; see `TargetSettings.tokens_per_batch`."""
    columns = zip(*([*r.contexts, r.kl] for r in requests), strict=True)
    shared = [_common_length([t.ids[: t.subject_last] for t in column]) for column in columns]
    facts = [_rows(request, shared) for request in requests]
    batches = _batches(facts, tokens_per_batch)
    largest = max(batches, key=lambda b: len(b.rows) * b.after)
    bare = [r.contexts[0].subject_last + 1 for r in requests]
    prefixed = [text.subject_last + 1 for r in requests for text in r.contexts[1:]]
    each = [sum(row.after for row in rows) for rows in facts]
    width = max(shared)
    return TextCounts(
        facts=len(requests),
        tokens_before=len(shared) * width + sum(len(b.rows) * b.new_before for b in batches),
        pairs_before=len(shared) * width**2
        + sum(len(b.rows) * b.new_before * (width + b.new_before) for b in batches),
        tokens_from=sum(len(b.rows) * b.after for b in batches),
        pairs_from=sum(len(b.rows) * b.after * (b.before + b.after) for b in batches),
        reads=sum(b.reads for b in batches),
        batch_states=len(largest.rows) * (largest.before + largest.after),
        batch_from=len(largest.rows) * largest.after,
        batch_reads=max(b.reads for b in batches),
        bare_tokens=sum(bare),
        bare_pairs=sum(n**2 for n in bare),
        context_tokens=sum(prefixed),
        context_pairs=sum(n**2 for n in prefixed),
        from_subject_mean=sum(each) / len(each),
        from_subject_max=max(each),
    )


def _rows(request: EncodedRequest, shared: Sequence[int]) -> list[_Row]:
    reads = len(request.target_ids)
    rows = [
        _Row(
            shared=s,
            before=t.subject_last,
            after=len(t.ids) - t.subject_last + reads - 1,
            reads=reads,
        )
        for t, s in zip(request.contexts, shared, strict=False)
    ]
    if needs_kl_row(request):
        rows.append(_Row(shared=shared[-1], before=request.kl.subject_last, after=1, reads=0))
    return rows


def _batches(facts: Sequence[Sequence[_Row]], tokens_per_batch: int) -> list[_Batch]:
    """Facts as `optimise_targets` takes them together, as long as none of them stops early."""
    waiting = sorted(facts, key=_width, reverse=True)
    batches: list[_Batch] = []
    while waiting:
        shapes = ((len(fact), _width(fact)) for fact in waiting)
        size = fitting(shapes, budget=tokens_per_batch)
        batches.append(_Batch(waiting[:size]))
        waiting = waiting[size:]
    return batches


def _width(fact: Sequence[_Row]) -> int:
    return max(row.after for row in fact)


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, rows))
    same = (len({row[i] for row in rows}) == 1 for i in range(shortest))
    return next((i for i, agree in enumerate(same) if not agree), shortest)


# ------------------------------------------------------------------------------------ operations


def statistics_work(
    shape: ModelShape, *, layers: Sequence[int], tokens: int, window: int
) -> Amount:
    """Operations of the second moments: one pass up to the last layer's rewrite module.

    The symmetric product computes 5/8 of its blocks: 1.25·T·I² of 2·T·I².
    """
    last, m, width = max(layers), len(layers), shape.inner
    weights = shape.block_weights * (last + 1) - shape.rewrite_weights
    attention = 4 * shape.attention_width * window * (last + 1)
    moments = 1.25 * width**2 + 2 * (width + _SKETCH_WIDTH) * _SKETCH_WIDTH
    return Amount(
        value=tokens * (2 * weights + attention + m * moments),
        how=f"{tokens:,} tokens × (2 × {si(weights)} weights below the last rewrite module"
        f" + {si(attention)} attention + {m} layers × (1.25 × {width:,}² + 2 ×"
        f" {width + _SKETCH_WIDTH:,} × {_SKETCH_WIDTH}))",
    )


def sampling_work(shape: ModelShape, *, tokens: int, window: int) -> Amount:
    """Operations of sampling text from the model itself, token by token with a cache."""
    weights = shape.block_weights * shape.blocks + shape.head_weights
    attention = 2 * shape.attention_width * window * shape.blocks
    return Amount(
        value=tokens * (2 * weights + attention),
        how=f"{tokens:,} tokens × (2 × {si(weights)} weights + {si(attention)} attention)",
    )


def sampled_at_once(shape: ModelShape, *, window: int) -> int:
    """How many windows to sample at once: their states take at most half as much as the weights.

    The more, the larger the products; the fewer, the more workers can share them.
    """
    states = shape.blocks * shape.state_width * window
    return max(1, min(_MOST_SAMPLED, shape.parameters // 2 // states))


def targets_work(shape: ModelShape, *, layer: int, texts: TextCounts, steps: int) -> Amount:
    """Operations of the z vectors if no fact stops early.

    Once: what is before the subject through all blocks, the rest up to the layer. In each step: the
    rest through the blocks above, forward and backward to the activations; attention has twice
    the products backward. The last step makes no update and is not run.
    """
    below, above = layer + 1, shape.blocks - layer - 1
    run = max(1, steps - 1)
    per_pair = 4 * shape.attention_width
    once = (
        2 * shape.block_weights * (shape.blocks * texts.tokens_before + below * texts.tokens_from)
    )
    once += per_pair * (shape.blocks * texts.pairs_before + below * texts.pairs_from)
    linear = 4 * above * shape.block_weights * texts.tokens_from
    attention = 3 * per_pair * above * texts.pairs_from
    head = 4 * shape.head_weights * texts.reads
    return Amount(
        value=once + run * (linear + attention + head),
        how=f"{run} steps × (4 × {above} blocks above × {si(shape.block_weights)} weights"
        f" × {texts.tokens_from:,} tokens + {si(attention)} attention"
        f" + 4 × {si(shape.head_weights)} head × {texts.reads:,} positions)"
        f" + once {si(once)} for what the steps share",
    )


def keys_work(shape: ModelShape, *, layers: Sequence[int], texts: TextCounts) -> Amount:
    """Operations of keys and current values: each text advances block by block.

    Every text runs once through the blocks below the last layer, and once more to each edited
    layer's rewrite module; bare prompts run from each layer to the end of the last.
    """
    last, m = max(layers), len(layers)
    tokens = texts.bare_tokens + texts.context_tokens
    pairs = texts.bare_pairs + texts.context_pairs
    weights = last * shape.block_weights + m * (shape.block_weights - shape.rewrite_weights)
    again = sum(last - layer + 1 for layer in layers)
    attention = 4 * shape.attention_width * ((last + m) * pairs + again * texts.bare_pairs)
    return Amount(
        value=2 * weights * tokens
        + 2 * again * shape.block_weights * texts.bare_tokens
        + attention,
        how=f"2 × {si(weights)} weights × {tokens:,} tokens of all contexts + 2 × {again} ×"
        f" {si(shape.block_weights)} × {texts.bare_tokens:,} of bare prompts"
        f" + {si(attention)} attention",
    )


def from_factors(shape: ModelShape, *, edits: int) -> bool:
    """Whether `memedit.solve` takes the form with N right-hand sides (Woodbury), or the sums."""
    return factors_are_cheaper(edits, shape.inner, shape.hidden)


def solve_work(shape: ModelShape, *, layers: Sequence[int], edits: int) -> Amount:
    """Operations in float64 of the closed forms, and of adding each update to its weight."""
    m, n, i, o = len(layers), edits, shape.inner, shape.hidden
    if from_factors(shape, edits=edits):
        each = i**3 / 3 + 2 * n * i**2 + 4 * n**2 * i + n**3 / 3 + 2 * n * i * o
        form = (
            f"{i:,}³/3 + 2 × {n:,} × {i:,}² + 4 × {n:,}² × {i:,} + {n:,}³/3"
            f" + 2 × {n:,} × {i:,} × {o:,}), {n:,} right-hand sides (Woodbury"
        )
    else:
        each = i**3 / 3 + 2 * o * i**2 + 2 * n * i * (i + o)
        form = (
            f"{i:,}³/3 + 2 × {o:,} × {i:,}² + 2 × {n:,} × {i:,} × ({i:,} + {o:,})), sums over facts"
        )
    return Amount(value=m * each, how=f"{m} layers × ({form})")


def evaluation_work(shape: ModelShape, *, tokens: int, reads: int, generated: int) -> Amount:
    """Operations of judging two models: tokens in, positions read, tokens generated (of one)."""
    weights = shape.block_weights * shape.blocks
    value = 2 * (2 * weights * (tokens + generated) + 2 * shape.head_weights * (reads + generated))
    return Amount(
        value=value,
        how=f"before and after: 2 × (2 × {si(weights)} weights × ({tokens:,} tokens read +"
        f" {generated:,} generated) + 2 × {si(shape.head_weights)} head × {reads + generated:,})",
    )


# ---------------------------------------------------------------------------------------- memory


def worker_memory(
    shape: ModelShape,
    *,
    layers: Sequence[int],
    texts: TextCounts,
    itemsize: int,
    workers: int = 1,
    sweeps: int = 1,
) -> dict[str, Amount]:
    """Bytes in a worker: the model, and what each stage needs beside it, one after the other.

    What autograd keeps of a block is that of a gated MLP (three inner widths a token); other
    families keep about as much.
    """
    m, i, o, b = len(layers), shape.inner, shape.hidden, itemsize
    above = shape.blocks - max(layers) - 1
    batch = TOKENS_PER_COUNT
    per_token = 2 * o + 2 * shape.attention_width + 3 * i
    states = texts.batch_states
    kept = above * b * (texts.batch_from * per_token + states * 2 * shape.attention_width)
    # Of each row, and joined for the batch at hand.
    prefix = 2 * above * b * (states - texts.batch_from) * shape.state_width
    logits = 4 * 4 * texts.batch_reads * shape.vocab
    keys = -(-(texts.bare_tokens + texts.context_tokens) // workers)
    sums = 0 if from_factors(shape, edits=texts.facts) else _FLOAT64 * i * (i + o)
    weights = m * i * o * b if sweeps > 1 else 0
    return {
        "model": Amount(
            value=shape.parameters * b, how=f"{si(shape.parameters)} parameters × {b} bytes"
        ),
        "statistics": Amount(
            value=m * _FLOAT64 * i**2 + 4 * i**2 + batch * b * (m * i + 4 * o + 3 * i),
            how=f"{m} layers × {i:,}² × 8 + {i:,}² × 4 + {batch:,} tokens × {b} ×"
            f" ({m} × {i:,} keys + {4 * o + 3 * i:,} activations)",
        ),
        "targets": Amount(
            value=kept + prefix + logits,
            how=f"{above} blocks × {b} × ({texts.batch_from:,} tokens × {per_token:,}"
            f" + {states:,} states × 2 × {shape.attention_width:,}"
            f" + 2 × {states - texts.batch_from:,} × {shape.state_width:,} prefix)"
            f" + 16 × {texts.batch_reads:,} logits × {shape.vocab:,}",
        ),
        "keys": Amount(
            value=keys * o * b + sums + weights,
            how=f"{keys:,} tokens up to the subject × {o:,} × {b}"
            + (f" + 8 × {i:,} × ({i:,} + {o:,}) sums over facts" if sums else "")
            + (f" + {m} weights × {i:,} × {o:,} × {b} as they were" if weights else ""),
        ),
    }


def sampling_memory(shape: ModelShape, *, window: int, itemsize: int) -> Amount:
    """Bytes in a worker while it samples text: the states of the windows, and logits."""
    rows = sampled_at_once(shape, window=window)
    states = shape.blocks * shape.state_width
    return Amount(
        value=rows * (window * states * itemsize + 12 * shape.vocab),
        how=f"{rows} windows × ({window} × {si(states)} states × {itemsize}"
        f" + 12 × {shape.vocab:,} logits)",
    )


def evaluation_memory(shape: ModelShape, *, tokens: int, itemsize: int) -> Amount:
    """Bytes in a worker while it continues prompts: the states of `tokens` tokens of one batch."""
    states = shape.blocks * shape.state_width
    return Amount(
        value=tokens * states * itemsize,
        how=f"{tokens:,} tokens × {si(states)} states × {itemsize}",
    )


def driver_memory(
    shape: ModelShape, *, layers: Sequence[int], edits: int, itemsize: int, trials: int = 1
) -> dict[str, Amount]:
    """Bytes in the driver: one moment, one layer's system, updates, one tensor at a time.

    Moments are put together and written to disk one by one before the z vectors are sought, and
    come back one by one. Of many facts, workers add up the keys, and only the sums come here.

    Args:
        shape: The model.
        layers: The edited layers.
        edits: Facts.
        itemsize: Bytes of an element of an edited tensor as it is stored.
        trials: How many sets of updates there are at once: with repair, the best and the newest.
    """
    m, n, i, o = len(layers), edits, shape.inner, shape.hidden
    if from_factors(shape, edits=n):
        solve, update = 2 * i**2 + 2 * n * (i + o), n * (i + o)
        system = f"2 × {i:,}² + 2 × {n:,} × ({i:,} + {o:,}) keys and residuals"
        written = f"{n:,} × ({i:,} + {o:,})"
    else:
        solve, update = 4 * i**2 + 2 * i * o, i * o
        system = f"4 × {i:,}² + 2 × {i:,} × {o:,} sums and the update"
        written = f"{i:,} × {o:,}"
    return {
        "moments": Amount(value=_FLOAT64 * i**2, how=f"{i:,}² × 8, one layer at a time"),
        "solve": Amount(value=_FLOAT64 * solve, how=f"8 × ({system})"),
        "updates": Amount(
            value=trials * m * _FLOAT64 * update,
            how=(f"{trials} × " if trials > 1 else "") + f"{m} layers × {written} × 8",
        ),
        "publish": Amount(
            value=(3 * itemsize + 2 * _FLOAT64) * i * o,
            how=f"one tensor: {i:,} × {o:,} × (3 × {itemsize} + 2 × 8)",
        ),
    }


def si(value: float) -> str:
    """A number in three digits with its SI letter: 134515008 is 135M."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999,600 is 1.00M, not 1e+03k.
        if abs(value) >= 0.9995 * limit:
            scaled = value / limit
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{value:,.3g}"
