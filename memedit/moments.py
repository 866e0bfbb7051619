"""Second moments of the MLP keys, C_l = E[k kᵀ] (MEMIT, Eq. 15), of all edited layers in one pass.

Sums are additive, so windows of tokens can be counted anywhere and merged. Knows windows of token
ids; does not know where a corpus comes from or where sums are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from memedit.architecture import Architecture
from memedit.errors import InputError, NumericalError
from memedit.memory import release_memory
from memedit.outcome import MomentSummary
from memedit.segments import Rows, device_of, run_to_rewrite
from memedit.writing import whole_file

_PROBES = 32
_ROW_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How much small random projections of E[k kᵀ] differ from batch to batch.

    Position 0 is left out: as an attention sink it would hide everything else. mean_SS and
    squares_SS (sum of squared deviations from it), float64 [S, S], over `batches` batches.
    """

    batches: int
    mean_SS: Tensor
    squares_SS: Tensor

    @property
    def error(self) -> float:
        """Estimated relative error of C in the Frobenius norm (one standard error).

        For Gaussian vectors g, h: E[(gᵀ M h)²] = ‖M‖²_F, so the off-diagonal of a projection
        carries the Frobenius norm of a matrix that need not be kept. Infinite before two batches.
        """
        if self.batches < 2:
            return math.inf
        off = ~torch.eye(len(self.mean_SS), dtype=torch.bool)
        variance = self.squares_SS[off].sum() / (self.batches - 1) / self.batches
        return float((variance / (self.mean_SS[off] ** 2).sum()).sqrt())

    def merge(self, other: Spread) -> Spread:
        """The spread over both sets of batches (Chan's formula)."""
        batches = self.batches + other.batches
        step_SS = other.mean_SS - self.mean_SS
        share = other.batches / batches
        return Spread(
            batches=batches,
            mean_SS=self.mean_SS + step_SS * share,
            squares_SS=self.squares_SS + other.squares_SS + step_SS**2 * (self.batches * share),
        )


@dataclass(frozen=True, kw_only=True)
class SecondMoment:
    """Sum of k kᵀ over tokens at one layer, with what is needed to judge how exact it is.

    sum_II float64 [I, I] over `tokens` counted tokens; trace_0 is the part of its trace that
    position 0 contributes.
    """

    layer: int
    sum_II: Tensor
    tokens: int
    trace_0: float
    spread: Spread

    @property
    def value_II(self) -> Tensor:
        """C = E[k kᵀ], float64 [I, I]."""
        return self.sum_II / self.tokens

    @property
    def trace(self) -> float:
        """Trace of C: the mean squared norm of a key."""
        return float(self.sum_II.trace()) / self.tokens

    @property
    def trace_without_position_0(self) -> float:
        """The part of the trace that is not the first position's."""
        return self.trace - self.trace_0 / self.tokens

    @property
    def summary(self) -> MomentSummary:
        """What a record says of it."""
        error = self.spread.error
        return MomentSummary(
            layer=self.layer,
            tokens=self.tokens,
            error=error if math.isfinite(error) else None,
            trace=self.trace,
            trace_without_position_0=self.trace_without_position_0,
        )

    def merge(self, other: SecondMoment) -> SecondMoment:
        """The moment over both sets of tokens."""
        if self.layer != other.layer:
            raise ValueError(f"layers {self.layer} and {other.layer} cannot be merged")
        return SecondMoment(
            layer=self.layer,
            sum_II=self.sum_II + other.sum_II,
            tokens=self.tokens + other.tokens,
            trace_0=self.trace_0 + other.trace_0,
            spread=self.spread.merge(other.spread),
        )


def windows_of(
    documents: Iterable[Sequence[int]],
    *,
    window: int,
    tokens: int,
    seed: int,
    separator: int | None = None,
) -> Iterator[list[int]]:
    """Cut documents (token ids) into windows, spread over the documents, without padding waste.

    Round r takes the r-th piece of each document, so that few tokens from many documents come
    before many from few. Within a round the order is shuffled by `seed`. Pieces shorter than a
    window are joined into full ones, with the token `separator` between them if it is given. What
    is left of them at the end is dropped if it is shorter than half a window, unless it is all
    there is. Ends after at least `tokens` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = [[list(ids[i : i + window]) for i in range(0, len(ids), window)] for ids in documents]
    between = [] if separator is None else [separator]
    given, turn, joined = 0, 0, list[int]()
    while pieces := [parts for parts in pieces if len(parts) > turn]:
        for i in torch.randperm(len(pieces), generator=generator).tolist():
            piece = pieces[i][turn]
            if len(piece) < window:
                joined += [*between, *piece] if joined else piece
                if len(joined) < window:
                    continue
                piece, joined = joined[:window], joined[window:]
            yield piece
            given += window
            if given >= tokens:
                return
        turn += 1
    if len(joined) >= window / 2 or (not given and len(joined) > 1):
        yield joined


class MomentAccumulator:
    """Adds windows to the second moments of several layers, in one forward pass for all layers."""

    def __init__(
        self, model: PreTrainedModel, arch: Architecture, *, layers: Sequence[int], count_0: bool
    ) -> None:
        self.model, self.arch, self.layers, self.count_0 = model, arch, tuple(layers), count_0
        self.device = device_of(model)
        self._moments: dict[int, SecondMoment] = {}

    @torch.no_grad()
    def add(self, windows: Sequence[Sequence[int]]) -> dict[int, Spread]:
        """Count one batch of windows of token ids, of similar length; gives its spread by layer.

        Raises:
            NumericalError: The keys are not finite.
        """
        rows = Rows.of(windows, device=self.device)
        keys: dict[int, Tensor] | None = None
        try:
            keys = run_to_rewrite(self.model, self.arch, rows, layers=self.layers)
        except torch.OutOfMemoryError:  # nothing has been counted yet
            if len(windows) == 1:
                raise
        if keys is None:
            release_memory()
            half = len(windows) // 2
            first, second = self.add(windows[:half]), self.add(windows[half:])
            return {layer: first[layer].merge(second[layer]) for layer in self.layers}
        positions = torch.arange(rows.input_ids_BT.shape[1], device=self.device)
        real_BT = positions < rows.lengths_B[:, None]
        spreads = {}
        for layer in self.layers:
            spreads[layer] = self._count(layer, keys.pop(layer).float(), real_BT)
        return spreads

    def _count(self, layer: int, keys_BTI: Tensor, real_BT: Tensor) -> Spread:
        real_BT = real_BT.to(keys_BTI.device)  # a layer's sums stay on its own device
        later_BT = real_BT.clone()
        later_BT[:, 0] = False
        counted_BT = real_BT if self.count_0 else later_BT
        # Selecting copies, which is a fiftieth of all work: not where all positions count.
        keys_TI = keys_BTI.flatten(0, 1) if counted_BT.all() else keys_BTI[counted_BT]
        sketch_TS = (keys_BTI @ _probes(keys_BTI.shape[-1], keys_BTI.device))[later_BT]
        mean_SS = (sketch_TS.T @ sketch_TS).double().cpu() / len(sketch_TS)
        spread = Spread(batches=1, mean_SS=mean_SS, squares_SS=torch.zeros_like(mean_SS))
        if not bool(mean_SS.isfinite().all()):
            raise NumericalError(f"the keys of layer {layer} are not finite")
        first = float((keys_BTI[:, 0].double() ** 2).sum()) if self.count_0 else 0.0
        sum_II, tokens = symmetric_product(keys_TI), len(keys_TI)
        known = self._moments.get(layer)
        if known is None:
            known = SecondMoment(
                layer=layer, sum_II=sum_II.double(), tokens=tokens, trace_0=first, spread=spread
            )
        else:  # in place: a sum is the largest thing that this process holds beside the model
            known = replace(
                known,
                sum_II=known.sum_II.add_(sum_II),
                tokens=known.tokens + tokens,
                trace_0=known.trace_0 + first,
                spread=known.spread.merge(spread),
            )
        self._moments[layer] = known
        return spread

    @property
    def moments(self) -> dict[int, SecondMoment]:
        """The moments so far, by layer."""
        return dict(self._moments)


def symmetric_product(keys_TI: Tensor) -> Tensor:
    """Kᵀ K [I, I], computing the blocks on and above the diagonal only (5/8 of the work)."""
    size = keys_TI.shape[1]
    edges = [size * i // _ROW_BLOCKS for i in range(_ROW_BLOCKS + 1)]
    out_II = keys_TI.new_empty(size, size)
    for start, end in pairwise(edges):
        torch.mm(keys_TI[:, start:end].T, keys_TI[:, start:], out=out_II[start:end, start:])
        out_II[end:, start:end] = out_II[start:end, end:].T
    return out_II


def _probes(width: int, device: torch.device) -> Tensor:
    """The same Gaussian probes [I, S] everywhere, so that sketches can be merged."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, _PROBES, generator=generator).to(device)


def save_moment(path: Path, moment: SecondMoment, *, metadata: dict[str, str]) -> None:
    """Write a moment to a safetensors file, whole or not at all."""
    counts = [moment.layer, moment.tokens, moment.trace_0, moment.spread.batches]
    tensors = {
        "sum_II": moment.sum_II.cpu(),
        "mean_SS": moment.spread.mean_SS,
        "squares_SS": moment.spread.squares_SS,
        "counts": torch.tensor(counts, dtype=torch.float64),
    }
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def check_moment(path: Path) -> dict[str, str]:
    """The metadata of a file that `save_moment` wrote; it is whole, and its matrices are not read.

    Raises:
        InputError: The file is not such a file, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            whole = {"sum_II", "mean_SS", "squares_SS"} <= set(file.keys())
            if not whole or file.get_tensor("counts").numel() != 4:
                raise InputError("not a second moment: it lacks a part", source=path)
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"not a second moment: {error}", source=path) from error


def load_moment(path: Path) -> SecondMoment:
    """Read what `save_moment` wrote.

    Raises:
        InputError: The file is not such a file, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            layer, tokens, trace_0, batches = file.get_tensor("counts").tolist()
            return SecondMoment(
                layer=int(layer),
                sum_II=file.get_tensor("sum_II"),
                tokens=int(tokens),
                trace_0=trace_0,
                spread=Spread(
                    batches=int(batches),
                    mean_SS=file.get_tensor("mean_SS"),
                    squares_SS=file.get_tensor("squares_SS"),
                ),
            )
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"not a second moment: {error}", source=path) from error
