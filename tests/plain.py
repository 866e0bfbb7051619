"""The plain oracle: MEMIT one fact at a time and one layer at a time, slow and easy to check.

Knows the equations and nothing of memedit's fast paths: whole forward passes with padding, hooks on
modules, `torch.optim.Adam`, logits at every position. memedit's z vectors and updates must equal
these, and its speed is measured against these. The order of operations is that of the published
research code (kmeng01/memit), with the deviations that `memedit` makes on purpose: ids are
concatenated instead of re-tokenised, the subject is found by character offsets, statistics are of
the unedited model, and the vocabulary head runs once a step (there twice), which favours this side
of a speed comparison.

Equation numbers are those of MEMIT, arXiv 2210.07229.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memedit.config import TargetSettings
from memedit.requests import EditRequest

KL_PROMPT = "{} is a"


@dataclass(frozen=True, kw_only=True)
class ModuleNames:
    """Where a model keeps its blocks and rewrite modules; the default is Llama's layout."""

    block: str = "model.layers.{}"
    rewrite: str = "model.layers.{}.mlp.down_proj"
    transposed: bool = False
    """Whether the rewrite weight is stored [in, out] (GPT-2's Conv1D)."""


LLAMA = ModuleNames()


# ---------------------------------------------------------------------------- text to token ids


def plain_tokens(tokenizer: Any, context: str, prompt: str, subject: str) -> tuple[list[int], int]:
    """Ids of the prompt inside its context, and the position of the subject's last token."""
    template = context.replace("{}", prompt)
    start = template.index("{}")
    end = start + len(subject)
    encoded = tokenizer(template.replace("{}", subject), return_offsets_mapping=True)
    last = max(
        position
        for position, (left, right) in enumerate(encoded["offset_mapping"])
        if left < right and left < end and right > start  # the token overlaps the subject
    )
    return list(encoded["input_ids"]), last


def plain_target_ids(tokenizer: Any, target: str) -> list[int]:
    """Ids of the object with its leading space."""
    return list(tokenizer(" " + target, add_special_tokens=False)["input_ids"])


def pad_right(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows of ids as a batch; the padding is on the right, where a causal model cannot see it."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


# ------------------------------------------------------------------------------------- hooks


class _Stop(Exception):
    """Ends a forward pass once the wanted activation is there."""


@contextmanager
def hooked(
    module: nn.Module, function: Callable[[Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `function(input, output)` after the module; what it returns replaces the output."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = function(args[0] if args else None, first)  # type: ignore[arg-type]
        if new is None:
            return output
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def forward_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, T, V] of a whole forward pass."""
    result: Tensor = model(**batch, use_cache=False).logits
    return result


# ------------------------------------------------------------------------- 1. second moments


def plain_moments(
    model: Any,
    tokenizer: Any,
    texts_or_windows: Sequence[str] | Sequence[Sequence[int]],
    layer: int,
    *,
    position_0: bool = True,
    names: ModuleNames = LLAMA,
) -> tuple[Tensor, int]:
    """C = E[k kᵀ] (Eq. 15) of one layer, one document at a time; float64 [I, I], and the tokens.

    The product is made in the model's dtype, the sum over documents in float64. The forward pass
    stops at the layer, as the reference's does; each layer needs passes of its own.
    """
    total: Tensor | None = None
    count = 0
    for document in texts_or_windows:
        ids = tokenizer(document)["input_ids"] if isinstance(document, str) else list(document)
        keys_TI = _rewrite_input(model, {"input_ids": torch.tensor([ids])}, layer, names)[0]
        keys_TI = keys_TI if position_0 else keys_TI[1:]
        product_II = (keys_TI.T @ keys_TI).double()
        total = product_II if total is None else total + product_II
        count += len(keys_TI)
    assert total is not None
    return total / count, count


def _rewrite_input(
    model: Any, batch: Mapping[str, Tensor], layer: int, names: ModuleNames
) -> Tensor:
    """Input [B, T, I] of the layer's rewrite module; the pass ends there."""
    seen: list[Tensor] = []

    def keep(inputs: Tensor, _: Tensor) -> None:
        seen.append(inputs)
        raise _Stop

    module = model.get_submodule(names.rewrite.format(layer))
    with torch.no_grad(), hooked(module, keep), suppress(_Stop):
        model(**batch, use_cache=False)
    return seen[0]


# ------------------------------------------------------------------------------ 2. targets z


def plain_target(
    model: Any,
    tokenizer: Any,
    request: EditRequest,
    contexts: Sequence[str],
    settings: TargetSettings,
    layer: int,
    *,
    names: ModuleNames = LLAMA,
    losses: list[float] | None = None,
) -> Tensor:
    """z = h + δ [O] of one fact (Eq. 16), in the model's dtype.

    With `steps` 20 there are 20 forward passes and 19 updates. `losses` receives the total loss of
    each forward pass. `contexts[0]` is the bare "{}".
    """
    target = plain_target_ids(tokenizer, request.target_new)
    prompts = [plain_tokens(tokenizer, c, request.prompt, request.subject) for c in contexts]
    kl_ids, kl_position = plain_tokens(tokenizer, "{}", KL_PROMPT, request.subject)

    # The last target token is predicted, never read.
    rows = [ids + target[:-1] for ids, _ in prompts] + [kl_ids]
    lookups = [position for _, position in prompts] + [kl_position]
    batch = pad_right(rows)

    model.requires_grad_(False)
    width = model.config.get_text_config().hidden_size
    delta_O = torch.zeros(width, dtype=next(model.parameters()).dtype, requires_grad=True)
    optimiser = torch.optim.Adam([delta_O], lr=settings.lr)
    h_O: Tensor | None = None
    kl_before_V: Tensor | None = None

    def add_delta(_: Tensor, output: Tensor) -> Tensor:
        nonlocal h_O
        if h_O is None:  # the state at the subject's last token of the bare prompt, δ still 0
            h_O = output[0, lookups[0]].detach().clone()
        output = output.clone()
        for row, position in enumerate(lookups):
            output[row, position] += delta_O
        return output

    for step in range(settings.steps):
        optimiser.zero_grad()
        with hooked(model.get_submodule(names.block.format(layer)), add_delta):
            log_probs = torch.log_softmax(forward_logits(model, batch), dim=-1)
        assert h_O is not None

        # −log P(target | context + prompt): mean over target tokens, then mean over contexts.
        nll = torch.stack(
            [
                -log_probs[row, range(len(ids) - 1, len(ids) - 1 + len(target)), target].mean()
                for row, (ids, _) in enumerate(prompts)
            ]
        ).mean()

        # The reference calls kl_div(input=before, target=after): the sum over the vocabulary of
        # P_after · (log P_after − log P_before), that is KL(P_after ‖ P_before).
        kl_after_V = log_probs[-1, kl_position]
        if kl_before_V is None:
            kl_before_V = kl_after_V.detach().clone()
        kl = (kl_after_V.exp() * (kl_after_V - kl_before_V)).sum()

        decay = settings.v_weight_decay * delta_O.norm() / h_O.norm() ** 2
        loss = nll + settings.kl_factor * kl + decay
        if losses is not None:
            losses.append(loss.item())
        if loss < settings.loss_threshold or step == settings.steps - 1:
            break

        loss.backward()
        optimiser.step()
        with torch.no_grad():  # project onto the ball ‖δ‖ ≤ factor · ‖h‖
            largest = settings.clamp_norm_factor * h_O.norm()
            if delta_O.norm() > largest:
                delta_O.mul_(largest / delta_O.norm())

    assert h_O is not None
    return (h_O + delta_O).detach()


# ------------------------------------------------------------ 3. keys, current states, updates


def _whole_pass(
    model: Any, module: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Input and output of a module in a forward pass of the whole model."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(inputs: Tensor, output: Tensor) -> None:
        seen.append((inputs, output))

    with torch.no_grad(), hooked(module, keep):
        forward_logits(model, batch)
    return seen[0]


def plain_keys(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    layer: int,
    *,
    names: ModuleNames = LLAMA,
) -> Tensor:
    """Keys [N, I] (Eq. 19): mean over [bare prompt, mean over the prefixed prompts]."""
    keys = []
    for request in requests:
        prompts = [plain_tokens(tokenizer, c, request.prompt, request.subject) for c in contexts]
        module = model.get_submodule(names.rewrite.format(layer))
        inputs_BTI, _ = _whole_pass(model, module, pad_right([ids for ids, _ in prompts]))
        rows = [inputs_BTI[row, position] for row, (_, position) in enumerate(prompts)]
        groups = [rows[0]] if len(rows) == 1 else [rows[0], torch.stack(rows[1:]).mean(0)]
        keys.append(torch.stack(groups).mean(0))
    return torch.stack(keys)


def plain_current(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    layer: int,
    *,
    names: ModuleNames = LLAMA,
) -> Tensor:
    """States h [N, O] at block `layer`'s output now, at the subject's last token, bare prompts."""
    states = []
    for request in requests:
        ids, position = plain_tokens(tokenizer, "{}", request.prompt, request.subject)
        module = model.get_submodule(names.block.format(layer))
        _, output_BTO = _whole_pass(model, module, {"input_ids": torch.tensor([ids])})
        states.append(output_BTO[0, position])
    return torch.stack(states)


def plain_edit(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    zs_NO: Tensor,
    moments: Mapping[int, Tensor],
    lam: float,
    layers: Sequence[int],
    *,
    names: ModuleNames = LLAMA,
) -> dict[int, Tensor]:
    """Edit the weights in place, layer by layer (Algorithm 1); the float64 Δ [O, I] of each layer.

    Δ = R Kᵀ (λ C + K Kᵀ)⁻¹ (Eq. 14) with facts as columns of K and R; here they are rows.
    """
    layers = sorted(layers)
    deltas: dict[int, Tensor] = {}
    for done, layer in enumerate(layers):
        keys_NI = plain_keys(model, tokenizer, requests, contexts, layer, names=names).double()
        now_NO = plain_current(model, tokenizer, requests, layers[-1], names=names).double()
        residual_NO = (zs_NO.double() - now_NO) / (len(layers) - done)  # Eq. 20
        system_II = lam * moments[layer].double() + keys_NI.T @ keys_NI
        delta_OI = residual_NO.T @ torch.linalg.solve(system_II, keys_NI.T).T
        weight = model.get_submodule(names.rewrite.format(layer)).weight
        with torch.no_grad():
            change = delta_OI.T if names.transposed else delta_OI
            weight.copy_(weight + change.to(weight.dtype))
        deltas[layer] = delta_OI
    return deltas
