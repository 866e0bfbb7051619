"""The table of model families: where each keeps its parts, and why one is refused.

A new family is a row here. Knows module names only; `memedit.architecture` resolves them on a
config and a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

POST_NORM = (
    "a norm stands between the rewrite module's output and the residual stream (post-norm), so an "
    "update of the weight does not add what was solved for"
)
MIXTURE = (
    "its MLPs are mixtures of experts: there is no single rewrite module whose input is the key"
)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A config of an otherwise editable family that cannot be edited."""

    when: Callable[[PretrainedConfig], bool]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one model family needs; paths are module names in the causal language model."""

    model_types: tuple[str, ...]
    """`config.model_type` of the models that this row describes."""
    blocks: str
    """The list of blocks."""
    rewrite: str
    """The rewrite module inside a block."""
    final_norm: str
    attention: str = "self_attn.o_proj"
    """The attention's output projection inside a block: its output goes to the residual stream."""
    head: str = "lm_head"
    conv1d: bool = False
    """The weight is stored [in, out] (transformers' Conv1D), not [out, in]."""
    returns_tuple: bool = False
    """A block returns a tuple whose first element is the hidden state."""
    clone_output: bool = False
    """The block changes the rewrite module's output in place: a hook that keeps it must clone."""
    scale: float | str = 1.0
    """What the output is multiplied by on its way into the residual stream, or the config's field
    that says so."""
    refusal: str | None = None
    """Why no model of the family can be edited."""
    refused_when: tuple[Refusal, ...] = ()


def _opt_is_post_norm(config: PretrainedConfig) -> bool:
    return not config.do_layer_norm_before


def _bloom_bypasses_rewrite(config: PretrainedConfig) -> bool:
    return bool(config.slow_but_exact and config.pretraining_tp > 1)


_LLAMA: dict[str, Any] = {
    "blocks": "model.layers",
    "rewrite": "mlp.down_proj",
    "final_norm": "model.norm",
}
_GPT: dict[str, Any] = {"blocks": "transformer.h", "final_norm": "transformer.ln_f"}

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("gpt2",),
        rewrite="mlp.c_proj",
        attention="attn.c_proj",
        conv1d=True,
        **_GPT,
    ),
    Family(
        model_types=("gptj",),
        rewrite="mlp.fc_out",
        attention="attn.out_proj",
        returns_tuple=True,
        **_GPT,
    ),
    Family(
        model_types=("gpt_neo",),
        rewrite="mlp.c_proj",
        attention="attn.attention.out_proj",
        returns_tuple=True,
        **_GPT,
    ),
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        rewrite="mlp.dense_4h_to_h",
        attention="attention.dense",
        final_norm="gpt_neox.final_layer_norm",
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        rewrite="fc2",
        attention="self_attn.out_proj",
        final_norm="model.decoder.final_layer_norm",
        refused_when=(Refusal(when=_opt_is_post_norm, reason=POST_NORM),),
    ),
    Family(
        model_types=("bloom",),
        rewrite="mlp.dense_4h_to_h",
        attention="self_attention.dense",
        returns_tuple=True,
        refused_when=(
            Refusal(
                when=_bloom_bypasses_rewrite,
                reason="with slow_but_exact and pretraining_tp > 1 its blocks read the rewrite "
                "module's weight without calling it; set slow_but_exact to false in config.json",
            ),
        ),
        **_GPT,
    ),
    Family(
        model_types=("falcon",),
        rewrite="mlp.dense_4h_to_h",
        attention="self_attention.dense",
        returns_tuple=True,
        clone_output=True,
        **_GPT,
    ),
    Family(
        model_types=(
            *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "phi3", "stablelm"),
            "cohere",
        ),
        **_LLAMA,
    ),
    Family(model_types=("granite",), scale="residual_multiplier", **_LLAMA),
    Family(model_types=("starcoder2",), **_LLAMA | {"rewrite": "mlp.c_proj"}),
    Family(
        model_types=("phi",),
        attention="self_attn.dense",
        **_LLAMA | {"rewrite": "mlp.fc2", "final_norm": "model.final_layernorm"},
    ),
    Family(
        model_types=("gemma2", "gemma3_text", "gemma3", "olmo2", "olmo3", "glm4", "exaone4"),
        refusal=POST_NORM,
        **_LLAMA,
    ),
    Family(
        model_types=("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe"),
        refusal=MIXTURE,
        **_LLAMA,
    ),
)
BY_MODEL_TYPE = {name: family for family in FAMILIES for name in family.model_types}
