"""The plain oracle of causal tracing: one restored state per forward pass.

A fact's clean run and its corrupted runs are the rows of one batch, as in the published research
code (kmeng01/rome, `trace_with_patch`): whole forward passes, hooks, logits at every position, and
row 0 is where clean states are read. Knows nothing of memedit's fast paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[str, int, int]
"""(kind, layer, position)."""


@torch.no_grad()
def plain_probability(
    model: Any,
    module_of: Callable[[str, int], nn.Module],
    ids: Sequence[int],
    target_id: int,
    *,
    noise_SNO: Tensor,
    subject: slice,
    restored: Iterable[Place] = (),
    severed: Mapping[Place, Tensor] | None = None,
    kept: dict[tuple[str, int], Tensor] | None = None,
) -> tuple[float, float]:
    """P(target) of the clean run, and its mean over the corrupted runs with some states restored.

    Args:
        model: A causal language model.
        module_of: The module that gives a kind of state at a layer.
        ids: Of the prompt.
        target_id: What is to follow it.
        noise_SNO: For each corrupted run, what is added to the embeddings of the subject.
        subject: Where that is.
        restored: What gets the clean run's value in all the corrupted runs.
        severed: What gets a given value [S, O] in them, after the restored.
        kept: Receives all that the modules named by it as keys give, [1 + S, T, O].
    """
    places = list(restored)
    watched = {(kind, layer) for kind, layer, _ in [*places, *(severed or {})]} | set(kept or {})
    handles = []

    def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, subject] += noise_SNO.to(output.dtype)
        return output

    def watch(key: tuple[str, int]) -> Any:
        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            # OPT flattens the batch before its second MLP layer.
            rows = whole.clone().view(1 + len(noise_SNO), len(ids), -1)
            for kind, layer, position in places:
                if (kind, layer) == key:
                    rows[1:, position] = rows[0, position]
            for (kind, layer, position), value_SO in (severed or {}).items():
                if (kind, layer) == key:
                    rows[1:, position] = value_SO
            if kept is not None and key in kept:
                kept[key] = rows.clone()
            changed = rows.view(whole.shape)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return change

    handles.append(model.get_input_embeddings().register_forward_hook(corrupt))
    handles += [module_of(*key).register_forward_hook(watch(key)) for key in watched]
    try:
        rows = torch.tensor([list(ids)] * (1 + len(noise_SNO)))
        logits = model(input_ids=rows, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    found = logits[:, -1].float().softmax(-1)[:, target_id].double()
    return float(found[0]), float(found[1:].mean())


def plain_window(layer: int, window: int, n_layers: int) -> range:
    """The layers whose outputs are restored together (as in the published code)."""
    return range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))
