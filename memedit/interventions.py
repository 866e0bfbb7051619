"""Watching and changing what single modules of a model give, as context managers.

Knows modules and their outputs; does not know why somebody changes them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

K = TypeVar("K", bound=Hashable)


@contextmanager
def recorded_outputs(modules: Mapping[K, nn.Module]) -> Iterator[dict[K, Tensor]]:
    """Keep a copy of what each module gives during the forward passes inside."""
    seen: dict[K, Tensor] = {}

    def hook(key: K) -> Any:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen[key] = hidden.clone()  # some families go on with it in place

        return record

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_hook(hook(key)).remove)
        yield seen


@contextmanager
def noisy_embeddings(model: PreTrainedModel, noise_BTO: Tensor) -> Iterator[None]:
    """Add noise to the embeddings of the token ids of the forward passes inside."""

    def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + noise_BTO.to(output.device, output.dtype)

    with ExitStack() as stack:
        stack.callback(model.get_input_embeddings().register_forward_hook(add).remove)
        yield


@contextmanager
def first_output_replaced(changes: Iterable[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Let each module give a certain output [B, O] at the first position of every row."""

    def hook(value_BO: Tensor) -> Any:
        def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            # OPT flattens the batch before its rewrite module.
            rows_BTO = changed.view(len(value_BO), -1, changed.shape[-1])
            rows_BTO[:, 0] = value_BO.to(changed.device)
            return changed

        return replace

    with ExitStack() as stack:
        for module, value_BO in changes:
            stack.callback(module.register_forward_hook(hook(value_BO)).remove)
        yield
