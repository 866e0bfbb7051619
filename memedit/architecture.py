"""A model's blocks, rewrite modules, final norm and head, found by the table of families.

The rewrite module is the second linear map of a block's MLP: its input is the key, its output goes
to the residual stream. Knows names, weight orientation and refusals, and measures at run time
whether the table is right; does not know facts, tokenizers or files.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from memedit.errors import InputError, UnsupportedModelError
from memedit.families import BY_MODEL_TYPE, MIXTURE, POST_NORM, Family

# Fields of a config that count experts, in any family.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# What a job may set in its section `architecture`.
_OVERRIDES = ("blocks", "rewrite", "attention", "final_norm", "head", "block_output", "scale")
# Lists in a config with one entry a block.
_PER_LAYER = ("layer_types", "attention_layers", "no_rope_layers", "mlp_layer_types")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family resolved for one config.

    Every method that takes a model works on the causal language model, on its base model and on
    one of which only the lower blocks were loaded.
    """

    family: Family
    n_layers: int
    residual_scale: float
    """c in Δblock = c · Δrewrite: divide a wanted change of the residual stream by it."""

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The model's own list of blocks."""
        found = _module(model, self.family.blocks, "blocks")
        if not isinstance(found, nn.ModuleList):
            raise UnsupportedModelError(
                f"{self.family.blocks!r} is a {type(found).__name__}, not a list of blocks",
                field="architecture.blocks",
            )
        return found

    def block(self, model: nn.Module, layer: int) -> nn.Module:
        """The block of one layer."""
        return self.blocks(model)[layer]

    def rewrite_module(self, model: nn.Module, layer: int) -> nn.Module:
        """The module of one layer whose weight is edited."""
        return _module(self.block(model, layer), self.family.rewrite, "rewrite")

    def attention_output(self, model: nn.Module, layer: int) -> nn.Module:
        """The module of one layer whose output the attention adds to the residual stream."""
        return _module(self.block(model, layer), self.family.attention, "attention")

    def final_norm(self, model: nn.Module) -> nn.Module:
        """The norm after the last block."""
        return _module(model, self.family.final_norm, "final_norm")

    def head(self, model: nn.Module) -> nn.Module:
        """The linear map to the logits."""
        return _module(model, self.family.head, "head")

    def weight_name(self, layer: int) -> str:
        """The rewrite weight's key in the model's state dict."""
        return f"{self.family.blocks}.{layer}.{self.family.rewrite}.weight"

    def checkpoint_key(self, layer: int, available_names: Collection[str]) -> str:
        """The rewrite weight's name in a checkpoint, which may lack the base model's prefix.

        Raises:
            UnsupportedModelError: The checkpoint holds no tensor of either name.
        """
        name = self.weight_name(layer)
        candidates = (name, name.partition(".")[2])
        for candidate in candidates:
            if candidate in available_names:
                return candidate
        raise UnsupportedModelError(
            f"the checkpoint holds no rewrite weight of layer {layer}: looked for "
            + " and ".join(repr(c) for c in candidates)
            + f" among its {len(available_names)} tensors",
            field=name,
        )

    def oriented(self, weight: Tensor) -> Tensor:
        """The rewrite weight (or a change of it) as a view [O, I]; its own inverse."""
        return weight.T if self.family.conv1d else weight

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The layers in ascending order.

        Raises:
            InputError: There is none, one is named twice, or one is outside the model.
        """
        if not layers:
            raise InputError("no layer to edit; name at least one", field="layers")
        outside = [layer for layer in layers if not 0 <= layer < self.n_layers]
        if outside:
            raise InputError(
                f"{_listed(outside)} outside the model, whose layers are 0 to {self.n_layers - 1}",
                field="layers",
            )
        twice = sorted({layer for layer in layers if list(layers).count(layer) > 1})
        if twice:
            raise InputError(f"{_listed(twice)} named more than once", field="layers")
        return tuple(sorted(layers))

    def widths(self, model: nn.Module | PretrainedConfig) -> tuple[int, int]:
        """(I, O) of the rewrite weight; from a config alone nothing is loaded or allocated."""
        module = skeleton(model) if isinstance(model, PretrainedConfig) else model
        weight = self.rewrite_module(module, 0).weight
        assert isinstance(weight, Tensor)
        out_width, in_width = self.oriented(weight).shape
        return in_width, out_width

    def input_width(self, model: nn.Module | PretrainedConfig) -> int:
        """I, the length of a key."""
        return self.widths(model)[0]


def _listed(layers: Sequence[int]) -> str:
    numbers = ", ".join(str(layer) for layer in layers)
    return f"layer {numbers} is" if len(layers) == 1 else f"layers {numbers} are"


def _module(root: nn.Module, path: str, field: str) -> nn.Module:
    # The base model is the causal model's first component, without its head.
    for name in (path, path.partition(".")[2]):
        try:
            if name:
                return root.get_submodule(name)
        except AttributeError:
            continue
    children = ", ".join(name for name, _ in root.named_children())
    raise UnsupportedModelError(
        f"no module {path!r} in {type(root).__name__}, which holds {children}",
        field=f"architecture.{field}",
    )


def architecture_of(
    config: PretrainedConfig, overrides: Mapping[str, str] | None = None
) -> Architecture:
    """Find where a model keeps its parts.

    Args:
        config: The model's config.
        overrides: Module names that win over the table or stand in for it: `blocks`, `rewrite`,
            `attention`, `final_norm`, `head`; also `block_output` (`tensor` or `tuple`) and
            `scale` (a number or a field of the config).

    Raises:
        UnsupportedModelError: The family cannot be edited (with the reason), or is unknown (with
            the names to set), or a name that was set is not in the model.
        InputError: An override that does not exist or has an impossible value.
    """
    overrides = {key: value for key, value in (overrides or {}).items() if value}
    _check_overrides(overrides)
    text_config = config.get_text_config(decoder=True)
    family = BY_MODEL_TYPE.get(config.model_type)
    reason = _refusal(family, config)
    if reason is not None:
        raise UnsupportedModelError(f"{config.model_type} models cannot be edited: {reason}")
    if family is None and not {"blocks", "rewrite"} <= overrides.keys():
        raise UnsupportedModelError(_unknown(config), field="architecture")
    if overrides:
        family = _overridden(family, config, overrides)
    assert family is not None
    scale = family.scale
    return Architecture(
        family=family,
        n_layers=int(text_config.num_hidden_layers),
        residual_scale=float(getattr(text_config, scale) if isinstance(scale, str) else scale),
    )


def _refusal(family: Family | None, config: PretrainedConfig) -> str | None:
    if family is not None and family.refusal is not None:
        return family.refusal
    for case in family.refused_when if family is not None else ():
        if case.when(config):
            return case.reason
    counts = [getattr(config, field, None) for field in _EXPERT_COUNTS]
    if any(isinstance(count, int) and count > 1 for count in counts):
        return MIXTURE
    return None


def _check_overrides(overrides: Mapping[str, str]) -> None:
    unknown = sorted(overrides.keys() - set(_OVERRIDES))
    if unknown:
        raise InputError(
            f"no such setting; those of the architecture are {', '.join(_OVERRIDES)}",
            field=f"architecture.{unknown[0]}",
        )
    if overrides.get("block_output", "tensor") not in ("tensor", "tuple"):
        raise InputError("must be tensor or tuple", field="architecture.block_output")


def _overridden(
    family: Family | None, config: PretrainedConfig, overrides: Mapping[str, str]
) -> Family:
    """The family with what was set; of an unknown one, the rest as most families have it."""
    base = family or BY_MODEL_TYPE["llama"]
    scale: float | str = overrides.get("scale", base.scale)
    if isinstance(scale, str) and not hasattr(config.get_text_config(decoder=True), scale):
        try:
            scale = float(scale)
        except ValueError:
            raise InputError(
                f"{scale!r} is neither a number nor a field of the config",
                field="architecture.scale",
            ) from None
    returns_tuple = base.returns_tuple
    if "block_output" in overrides:
        returns_tuple = overrides["block_output"] == "tuple"
    named = replace(
        base,
        model_types=(config.model_type,),
        blocks=overrides.get("blocks", base.blocks),
        rewrite=overrides.get("rewrite", base.rewrite),
        attention=overrides.get("attention", base.attention),
        final_norm=overrides.get("final_norm", base.final_norm),
        head=overrides.get("head", base.head),
        returns_tuple=returns_tuple,
        scale=scale,
    )
    return replace(named, conv1d=_check_names(named, config))


def _check_names(family: Family, config: PretrainedConfig) -> bool:
    """Find what was named in the model itself; whether its rewrite weight is stored [in, out]."""
    model, hidden_size = skeleton(config), config.get_text_config(decoder=True).hidden_size
    architecture = Architecture(family=family, n_layers=1, residual_scale=1.0)
    module = architecture.rewrite_module(model, 0)
    weight = getattr(module, "weight", None)
    conv1d = isinstance(module, Conv1D)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnsupportedModelError(
            f"{family.rewrite!r} is a {type(module).__name__}, not a linear map with a weight",
            field="architecture.rewrite",
        )
    if weight.shape[1 if conv1d else 0] != hidden_size:
        raise UnsupportedModelError(
            f"the output of {family.rewrite!r} is not as wide as the residual stream "
            f"({hidden_size}); the rewrite module is the second linear map of the MLP",
            field="architecture.rewrite",
        )
    architecture.final_norm(model)
    architecture.head(model)
    return conv1d


def _unknown(config: PretrainedConfig) -> str:
    """What to set for a family that is not in the table, with what its modules suggest."""
    blocks, maps = "model.layers", ["mlp.down_proj"]
    try:
        found = _suggestion(skeleton(config), config.get_text_config(decoder=True).hidden_size)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):
        found = None  # not a causal language model, or one that cannot be built from its config
    if found is not None:
        blocks, maps = found
    return (
        f"model type {config.model_type!r} is not in memedit's table of families. Name its modules "
        f"to edit it all the same, for example --set architecture.blocks={blocks} "
        f"--set architecture.rewrite={maps[-1]}"
        + (f" (wide linear maps onto the residual stream: {', '.join(maps)}; " if found else " (")
        + "the rewrite module is the second linear map of the MLP); where they differ from "
        "model.norm and lm_head, also architecture.final_norm and architecture.head"
    )


def _suggestion(model: nn.Module, hidden_size: int) -> tuple[str, list[str]] | None:
    """The path of the list of blocks, and the linear maps of a block that look like the one."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == 1:
            shapes = {
                name: part.weight.T.shape if isinstance(part, Conv1D) else part.weight.shape
                for name, part in module[0].named_modules()
                if isinstance(part, nn.Linear | Conv1D)
            }
            # The MLP is wider than the residual stream in every family seen so far.
            maps = [name for name, (o, i) in shapes.items() if o == hidden_size and i > o]
            return (path, maps) if maps else None
    return None


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model's modules without any memory for weights (on the meta device), one block deep."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(truncated(config, 1))
    return model


def truncated(config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    """A copy of the config for the lowest `n_layers` blocks only.

    Loading a checkpoint with it leaves the other blocks on disk.
    """
    config = copy.deepcopy(config)
    text_config = config.get_text_config(decoder=True)
    text_config.num_hidden_layers = n_layers
    for field in _PER_LAYER:
        values = getattr(text_config, field, None)
        if isinstance(values, list):
            setattr(text_config, field, values[:n_layers])
    if hasattr(text_config, "attention_layers"):  # GPT-Neo says the same in two ways
        text_config.attention_types = [[[kind], 1] for kind in text_config.attention_layers]
    return config


class Additivity(NamedTuple):
    """How a change of the rewrite module's output shows in its block's output."""

    scale: float
    """c of the best fit Δblock = c · Δ."""
    remainder: float
    """‖Δblock - c · Δ‖ / ‖Δblock‖; 0 where the output enters the residual stream as it is."""


@torch.no_grad()
def probe_additivity(
    model: PreTrainedModel, architecture: Architecture, layer: int, *, tokens: int = 8
) -> Additivity:
    """Measure at run time whether the rewrite module's output is added to the residual stream.

    Two forward passes over a few tokens, one with a random change, as large at each position as the
    hidden state there (so that rounding in half precision does not look like a remainder).
    """
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    # Ids spread over the vocabulary; any will do.
    ids = (torch.arange(1, tokens + 1) * 7919 % embeddings.shape[0]).unsqueeze(0)
    if embeddings.device.type != "meta":  # offloaded weights: accelerate moves the inputs
        ids = ids.to(embeddings.device)
    before_TO = _block_output(model, architecture, layer, ids, None)
    noise_TO = torch.randn(before_TO.shape, generator=torch.Generator().manual_seed(0))
    norms_T1 = before_TO.float().norm(dim=1, keepdim=True).clamp(min=1e-6)
    noise_TO = noise_TO.to(before_TO.device)
    delta_TO = noise_TO / noise_TO.norm(dim=1, keepdim=True) * norms_T1
    delta_TO = delta_TO.to(before_TO.dtype)
    after_TO = _block_output(model, architecture, layer, ids, delta_TO)
    # Position by position on one scale: an attention sink must not drown the others.
    given = (delta_TO.double() / norms_T1).flatten()
    seen = ((after_TO.double() - before_TO.double()) / norms_T1).flatten()
    scale = float(given @ seen / (given @ given))
    remainder = float((seen - scale * given).norm() / seen.norm().clamp(min=1e-12))
    return Additivity(scale, remainder)


def check_additivity(
    model: PreTrainedModel, architecture: Architecture, layer: int, *, tolerance: float = 0.03
) -> Additivity:
    """Probe one layer before an edit; raises as `require_additive` does."""
    found = probe_additivity(model, architecture, layer)
    require_additive(architecture, layer, found, tolerance=tolerance)
    return found


def require_additive(
    architecture: Architecture, layer: int, found: Additivity, *, tolerance: float = 0.03
) -> None:
    """Judge what a probe (of this process or of another) has found.

    Raises:
        UnsupportedModelError: More than `tolerance` of the change is not what the table says.
    """
    if not found.remainder <= tolerance:
        raise UnsupportedModelError(
            f"a change of {architecture.weight_name(layer).removesuffix('.weight')}'s output does "
            f"not reach the residual stream as it is ({found.remainder:.0%} of it is something "
            f"else): {POST_NORM}",
            field="architecture.rewrite",
        )
    if not abs(found.scale - architecture.residual_scale) <= tolerance * abs(found.scale):
        raise UnsupportedModelError(
            f"the rewrite module's output is multiplied by {found.scale:.4g} on its way into the "
            f"residual stream, not by {architecture.residual_scale:.4g}; set architecture.scale",
            field="architecture.scale",
        )


def _block_output(
    model: PreTrainedModel,
    architecture: Architecture,
    layer: int,
    ids_1T: Tensor,
    delta_TO: Tensor | None,
) -> Tensor:
    """[T, O] at the output of a block, with `delta_TO` added to its rewrite module's output."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden[0].clone())

    def change(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        # OPT flattens the batch before its rewrite module.
        return output if delta_TO is None else output + delta_TO.reshape(output.shape)

    handles = (
        architecture.block(model, layer).register_forward_hook(keep),
        architecture.rewrite_module(model, layer).register_forward_hook(change),
    )
    try:
        model(input_ids=ids_1T, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs[0]
