"""Running parts of a model through its own modules.

A decoder's forward pass embeds, runs its blocks and applies a head. Here blocks are replaced by
stubs, stopped after, or asked for logits at some positions only, without re-implementing any
family's attention: the model's own `forward` always does the work. Knows blocks and caches; does
not know facts or losses.

Blocks may lie on several devices. accelerate's hooks then move what goes into a block, and bring
logits back to where the token ids were; all else that a block gives stays on its device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from memedit.architecture import Architecture

States: TypeAlias = tuple[Tensor, ...]
"""Keys and values of some blocks, alternating, stacked on the first axis: one tensor for each
device in turn, so a single one where the model is on one device."""


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go in."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.device


class _Stop(Exception):
    """Raised by a hook to end a forward pass once everything wanted was seen."""


class Stub(nn.Module):
    """Stands in for a skipped block: hands its input (or a given value) on.

    Attributes that the model reads from its blocks (`attention_type`, …) come from the original.
    """

    def __init__(self, original: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_original", original)
        self.returns_tuple = returns_tuple
        self.value: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_original"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hand the hidden states on, in the form that the original block returns."""
        hidden = hidden_states if self.value is None else self.value
        return (hidden, None) if self.returns_tuple else hidden


@contextmanager
def skipped_blocks(model: PreTrainedModel, arch: Architecture, until: int) -> Iterator[Stub]:
    """Replace blocks 0 … until-1 by stubs; the last stub's `value` is what block `until` receives.

    The original blocks come back whatever happens.
    """
    blocks = arch.blocks(model)
    originals = [blocks[i] for i in range(until)]
    stubs = [Stub(block, arch.family.returns_tuple) for block in originals]
    try:
        for i, stub in enumerate(stubs):
            blocks[i] = stub
        yield stubs[-1] if stubs else Stub(nn.Identity(), False)
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block


@contextmanager
def captured_inputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Record the first positional input of each module during the forward passes inside."""
    seen: dict[int, Tensor] = {}

    def hook(key: int) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[key] = args[0]

        return record

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(_handle(module.register_forward_pre_hook(hook(key))))
        yield seen


@contextmanager
def _handle(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_positions(head: nn.Module, rows: Tensor, cols: Tensor) -> Iterator[None]:
    """Compute logits only at positions (rows[i], cols[i]): logits come out as [1, n, V].

    The rows of the final hidden state are gathered before the head, so whatever the family does to
    logits afterwards (scaling, soft-capping) still happens.
    """

    def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTO = args[0]
        at = rows.to(hidden_BTO.device), cols.to(hidden_BTO.device)
        return (hidden_BTO[at].unsqueeze(0), *args[1:])

    with _handle(head.register_forward_pre_hook(gather)):
        yield


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token rows for one forward pass, right-padded behind an optional left-padded prefix.

    input_ids_BT int64; lengths_B true lengths; `prefix` None or the frozen keys and values of the
    tokens before, with their true lengths.
    """

    input_ids_BT: Tensor
    lengths_B: Tensor
    prefix: Prefix | None = None

    @classmethod
    def of(
        cls, ids: Sequence[Sequence[int]], *, device: torch.device, prefix: Prefix | None = None
    ) -> Rows:
        """Right-pad rows of token ids with zeros (a causal model never looks at them)."""
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.zeros(len(ids), max(1, int(lengths.max())), dtype=torch.long)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = torch.tensor(row)
        return cls(input_ids_BT=padded.to(device), lengths_B=lengths.to(device), prefix=prefix)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass."""
        batch, width = self.input_ids_BT.shape
        device = self.input_ids_BT.device
        positions = torch.arange(width, device=device).expand(batch, width)
        if self.prefix is None:
            # All ones: right padding is behind everything that is read.
            mask = torch.ones(batch, width, dtype=torch.long, device=device)
            return {
                "input_ids": self.input_ids_BT,
                "attention_mask": mask,
                "position_ids": positions,
                "use_cache": False,
            }
        before = self.prefix.mask_BP.to(device)
        return {
            "input_ids": self.input_ids_BT,
            "attention_mask": torch.cat([before, before.new_ones(batch, width)], dim=1),
            "position_ids": positions + before.sum(1, keepdim=True),
            "past_key_values": self.prefix.cache(),
            "use_cache": True,
        }


class FrozenLayer(DynamicLayer):
    """Keys and values of a prefix that a forward pass reads and never changes.

    `new` holds those of the tokens that the last forward pass added.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frozen = keys, values
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefix and new states together; the prefix itself stays as it was."""
        self.new = key_states.detach(), value_states.detach()
        keys, values = self.frozen
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Frozen keys and values of the tokens before some rows, left-padded to one width P.

    mask_BP is 0 where there is padding. `states` are those of the blocks from `first` on, each
    tensor [K, B, h, P, d]; the blocks before have none and must be skipped.
    """

    mask_BP: Tensor
    states: States
    first: int = 0

    @classmethod
    def join(cls, rows: Sequence[States], *, first: int = 0) -> Prefix:
        """Pad the states of single rows, each tensor [K, h, P_row, d], to one width."""
        lengths = [row[0].shape[2] for row in rows]
        # At least one column, so that rows without any prefix need no special case anywhere.
        width = max(1, *lengths)
        mask_BP = torch.zeros(len(rows), width, dtype=torch.long, device=rows[0][0].device)
        for b, length in enumerate(lengths):
            mask_BP[b, width - length :] = 1
        states = tuple(_padded(run, width) for run in zip(*rows, strict=True))
        return cls(mask_BP=mask_BP, states=states, first=first)

    def rows(self, *, first: int = 0) -> list[States]:
        """The states of each row without padding, [K, h, P_row, d], of the blocks from `first`."""
        lengths = self.mask_BP.sum(1).tolist()
        width, skipped = self.mask_BP.shape[1], 2 * (first - self.first)
        kept = []
        for states_KBhPd in self.states:
            if skipped < len(states_KBhPd):
                kept.append(states_KBhPd[skipped:])
            skipped = max(0, skipped - len(states_KBhPd))
        kept = kept or [self.states[-1][:0]]  # behind the last block there is nothing
        return [
            tuple(states[:, b, :, width - length :] for states in kept)
            for b, length in enumerate(lengths)
        ]

    def cache(self) -> Cache:
        """A fresh cache object over the same frozen tensors."""
        batch, width = self.mask_BP.shape
        # A placeholder keeps the length right where a block is skipped.
        empty = self.states[0].new_zeros(batch, 1, width, 1)
        pairs = [(empty, empty)] * self.first
        for states_KBhPd in self.states:
            pairs += zip(states_KBhPd[::2], states_KBhPd[1::2], strict=True)
        return Cache(layers=[FrozenLayer(keys, values) for keys, values in pairs])


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """Rows of states [K, h, P_row, d] as one tensor [K, B, h, P, d], zeros on the left."""
    blocks, heads, _, size = rows[0].shape
    states_KBhPd = rows[0].new_zeros(blocks, len(rows), heads, width, size)
    for b, row in enumerate(rows):
        states_KBhPd[:, b, :, width - row.shape[2] :] = row
    return states_KBhPd


def stacked(states: Iterable[Tensor]) -> States:
    """Keys and values of blocks on their devices as `States`; each of one shape."""
    return tuple(
        torch.stack(list(run)) for _, run in groupby(states, key=lambda state: state.device)
    )


def run(model: PreTrainedModel, rows: Rows) -> Tensor:
    """A forward pass to the logits, [B, T, V] or what `head_positions` selects."""
    logits: Tensor = model(**rows.inputs()).logits
    return logits


def run_to_block(
    model: PreTrainedModel,
    arch: Architecture,
    rows: Rows,
    *,
    last: int,
    first: int = 0,
    hidden_BTO: Tensor | None = None,
) -> Tensor:
    """Hidden state at the output of block `last`, [B, T, hidden]; stops there.

    With `first` > 0 the blocks before are skipped and block `first` receives `hidden_BTO`.
    """
    out: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        out.append(output[0] if isinstance(output, tuple) else output)
        raise _Stop

    block = arch.block(model, last)
    with skipped_blocks(model, arch, first) as entry, _handle(block.register_forward_hook(record)):
        entry.value = hidden_BTO
        _run_stopped(model, rows)
    return out[0]


def run_to_rewrite(
    model: PreTrainedModel,
    arch: Architecture,
    rows: Rows,
    *,
    layers: Sequence[int],
    first: int = 0,
    hidden_BTO: Tensor | None = None,
) -> dict[int, Tensor]:
    """Inputs of the rewrite modules of `layers` (the keys of all tokens), each [B, T, I].

    Stops at the last of them, before its rewrite module runs.
    """
    last = max(layers)
    modules = {layer: arch.rewrite_module(model, layer) for layer in layers}

    def stop(_module: nn.Module, _args: Any) -> None:
        raise _Stop

    with (
        skipped_blocks(model, arch, first) as entry,
        captured_inputs(modules) as seen,
        _handle(modules[last].register_forward_pre_hook(stop)),
    ):
        entry.value = hidden_BTO
        _run_stopped(model, rows)
    shape = rows.input_ids_BT.shape
    # OPT flattens the batch before its rewrite module.
    return {layer: keys.reshape(*shape, keys.shape[-1]) for layer, keys in seen.items()}


def _run_stopped(model: PreTrainedModel, rows: Rows) -> None:
    try:
        model(**rows.inputs())
    except _Stop:
        return
    raise RuntimeError("the forward pass ended without reaching the block it was to stop at")


@torch.no_grad()
def run_prefix(
    model: PreTrainedModel,
    arch: Architecture,
    ids: Sequence[Sequence[int]],
    *,
    device: torch.device,
    before: Prefix | None = None,
) -> Prefix:
    """Run tokens once through all blocks and keep their keys and values.

    Args:
        model: The model.
        arch: Where it keeps things.
        ids: The tokens of each row; a row may be empty.
        device: Where the model takes its input.
        before: What lies before each row already; it becomes part of the result.
    """
    rows = Rows.of(ids, device=device, prefix=before)
    inputs = rows.inputs()
    if before is None:
        # Not DynamicCache(config), which truncates sliding layers.
        inputs |= {"past_key_values": DynamicCache(), "use_cache": True}

    def stop(_module: nn.Module, _args: Any) -> None:
        raise _Stop

    head = arch.head(model)  # not needed: the pass ends when it is called
    with _handle(head.register_forward_pre_hook(stop)), suppress(_Stop):
        model(**inputs)
    layers: list[Any] = inputs["past_key_values"].layers
    pairs = [(at.keys, at.values) if before is None else at.new for at in layers]
    new = stacked(chain.from_iterable(pairs))
    found = [tuple(run[:, b, :, : len(row)] for run in new) for b, row in enumerate(ids)]
    if before is not None:
        found = [
            tuple(torch.cat(both, dim=2) for both in zip(old, added, strict=True))
            for old, added in zip(before.rows(), found, strict=True)
        ]
    return Prefix.join(found)
