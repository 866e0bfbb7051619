"""Keys and current values of many facts, advanced layer by layer through the model.

A layer's keys depend on the updates below it. The residual stream of every text is therefore kept
at the entry of the layer at hand and moved forward once that layer has its update: each block runs
a few times in all, not once for every layer above it. Knows the model and encoded facts; does not
know how updates are solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memedit.architecture import Architecture
from memedit.prompts import EncodedRequest
from memedit.segments import Rows, device_of, run_to_block, run_to_rewrite


def default_tokens_per_chunk(device: torch.device) -> int:
    """Positions run at once; a GPU wants many."""
    return 1024 if device.type == "cpu" else 16384


def case_ids_of(requests: Sequence[EncodedRequest]) -> tuple[str, ...]:
    """Which facts these are."""
    return tuple(request.request.case_id for request in requests)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Keys and current values at one layer, one fact a row, float32 on the CPU.

    keys_NI are the inputs of the rewrite module; current_NO is h^L, the state at the output of the
    last edited block, which z asks to become z_i. Both at the subject's last token.
    """

    layer: int
    keys_NI: Tensor
    current_NO: Tensor


@dataclass(kw_only=True)
class _Chunk:
    """Texts of similar length up to the subject's last token; states at the entry of a layer."""

    rows: Rows
    texts: Tensor
    """For each row, which text it is."""
    hidden_BTO: Tensor | None = None


class KeyPass:
    """Walks a set of facts upwards through the edited layers.

    Call `at(layer)` in ascending order, applying a layer's update before asking for the next.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Architecture,
        requests: Sequence[EncodedRequest],
        *,
        last_layer: int,
        tokens_per_chunk: int | None = None,
    ) -> None:
        self.model, self.arch, self.last_layer = model, arch, last_layer
        self.device = device_of(model)
        self.tokens_per_chunk = tokens_per_chunk or default_tokens_per_chunk(self.device)
        self.case_ids = case_ids_of(requests)
        self.edits, self.contexts = len(requests), len(requests[0].contexts)
        # Only what is up to the subject matters to a causal model. Bare prompts are apart: h^L is
        # read on them alone.
        bare = [r.contexts[0] for r in requests]
        prefixed = [text for r in requests for text in r.contexts[1:]]
        self._bare = self._chunks([t.ids[: t.subject_last + 1] for t in bare])
        self._prefixed = self._chunks([t.ids[: t.subject_last + 1] for t in prefixed])
        self.entry = 0

    def _chunks(self, texts: Sequence[Sequence[int]]) -> list[_Chunk]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        most = self.tokens_per_chunk
        chunks: list[_Chunk] = []
        while order:
            # Ascending lengths: the last one taken decides the width.
            size = 1
            while size < len(order) and (size + 1) * len(texts[order[size]]) <= most:
                size += 1
            taken, order = order[:size], order[size:]
            rows = Rows.of([texts[i] for i in taken], device=self.device)
            chunks.append(_Chunk(rows=rows, texts=torch.tensor(taken)))
        return chunks

    @torch.no_grad()
    def at(self, layer: int) -> Keys:
        """Keys of `layer` and h^L with the weights as they are now (MEMIT, Eq. 19).

        The key is the mean of the bare prompt's and of the mean over the prefixed prompts'.
        """
        self._advance(layer)
        keys_NI = self._keys(self._bare, self.edits, layer)
        if self.contexts > 1:
            prefixed_NI = self._keys(self._prefixed, self.edits * (self.contexts - 1), layer)
            mean_NI = prefixed_NI.view(self.edits, self.contexts - 1, -1).mean(1)
            keys_NI = (keys_NI + mean_NI) / 2
        current_NO: Tensor | None = None
        for chunk in self._bare:
            hidden_BTO = run_to_block(
                self.model,
                self.arch,
                chunk.rows,
                first=layer,
                last=self.last_layer,
                hidden_BTO=chunk.hidden_BTO,
            )
            current_NO = _scatter(current_NO, self.edits, chunk, hidden_BTO)
        assert current_NO is not None
        return Keys(layer=layer, keys_NI=keys_NI, current_NO=current_NO)

    def _keys(self, chunks: Sequence[_Chunk], texts: int, layer: int) -> Tensor:
        out: Tensor | None = None
        for chunk in chunks:
            keys = run_to_rewrite(
                self.model,
                self.arch,
                chunk.rows,
                layers=[layer],
                first=layer,
                hidden_BTO=chunk.hidden_BTO,
            )
            out = _scatter(out, texts, chunk, keys[layer])
        assert out is not None
        return out

    def _advance(self, layer: int) -> None:
        """Move every text's state to the entry of `layer`."""
        if layer < self.entry:
            raise ValueError(f"layer {layer} is below layer {self.entry}, which was passed")
        if layer == self.entry:
            return
        for chunk in (*self._bare, *self._prefixed):
            chunk.hidden_BTO = run_to_block(
                self.model,
                self.arch,
                chunk.rows,
                first=self.entry,
                last=layer - 1,
                hidden_BTO=chunk.hidden_BTO,
            )
        self.entry = layer


def _scatter(out: Tensor | None, texts: int, chunk: _Chunk, states_BTX: Tensor) -> Tensor:
    """Put the states at each row's last token where the row's text belongs, [texts, X]."""
    last_B = (chunk.rows.lengths_B - 1).to(states_BTX.device)
    last_BX = states_BTX[torch.arange(len(chunk.texts)), last_B].float().cpu()
    if out is None:
        out = torch.empty(texts, last_BX.shape[1])
    out[chunk.texts] = last_BX
    return out
