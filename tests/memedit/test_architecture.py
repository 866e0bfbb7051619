"""Families found, refused, named by hand; layers checked; weights and checkpoint keys located."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memedit.architecture import (
    Architecture,
    architecture_of,
    check_additivity,
    probe_additivity,
    skeleton,
    truncated,
)
from memedit.errors import InputError, UnsupportedModelError
from memedit.families import FAMILIES
from tests.tiny import HIDDEN, INNER, LAYERS, tiny_config, tiny_model

ISSUE_FAMILIES = (
    "gpt2 gptj gpt_neox gpt_neo opt bloom falcon llama mistral qwen2 qwen3 smollm3 gemma phi phi3 "
    "stablelm starcoder2 granite cohere"
)


@pytest.fixture
def llama() -> Architecture:
    return architecture_of(tiny_config("llama"))


def test_every_model_type_has_one_row() -> None:
    listed = [name for family in FAMILIES for name in family.model_types]
    assert len(listed) == len(set(listed))
    editable = {n for f in FAMILIES if f.refusal is None for n in f.model_types}
    assert set(ISSUE_FAMILIES.split()) <= editable


def test_an_architecture_is_data(llama: Architecture) -> None:
    assert pickle.loads(pickle.dumps(llama)) == llama
    with pytest.raises(FrozenInstanceError):
        llama.family.blocks = "other"  # type: ignore[misc]


def test_parts_are_the_models_own(llama: Architecture) -> None:
    model = tiny_model("llama")
    assert llama.n_layers == LAYERS
    assert llama.blocks(model) is model.model.layers
    assert llama.block(model, 2) is model.model.layers[2]
    assert llama.rewrite_module(model, 2) is model.model.layers[2].mlp.down_proj
    assert llama.final_norm(model) is model.model.norm
    assert llama.head(model) is model.lm_head
    assert llama.weight_name(2) == "model.layers.2.mlp.down_proj.weight"
    assert llama.rewrite_module(model.model, 2) is llama.rewrite_module(model, 2)
    with pytest.raises(UnsupportedModelError, match=r"no module 'lm_head' in LlamaModel"):
        llama.head(model.model)


def test_widths_need_no_weights(llama: Architecture) -> None:
    big = AutoConfig.for_model("llama", hidden_size=8192, intermediate_size=28672)
    assert llama.widths(big) == (28672, 8192)
    assert {parameter.device.type for parameter in skeleton(big).parameters()} == {"meta"}
    assert architecture_of(tiny_config("gpt2")).widths(tiny_model("gpt2")) == (4 * HIDDEN, HIDDEN)
    assert llama.input_width(tiny_config("llama")) == INNER


def test_orientation_is_a_view_and_its_own_inverse() -> None:
    gpt2 = architecture_of(tiny_config("gpt2"))
    stored_IO = torch.randn(6, 4)
    oriented_OI = gpt2.oriented(stored_IO)
    assert oriented_OI.shape == (4, 6)
    assert oriented_OI.data_ptr() == stored_IO.data_ptr()
    assert torch.equal(gpt2.oriented(oriented_OI), stored_IO)
    assert architecture_of(tiny_config("llama")).oriented(stored_IO) is stored_IO


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "at least one"),
        ((1, 4), r"layer 4 is outside the model, whose layers are 0 to 3"),
        ((-1, 9), r"layers -1, 9 are outside"),
        ((2, 1, 2), "layer 2 is named more than once"),
    ],
)
def test_wrong_layers(llama: Architecture, layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        llama.check_layers(layers)
    assert caught.value.field == "layers"


def test_right_layers_come_sorted(llama: Architecture) -> None:
    assert llama.check_layers([3, 0]) == (0, 3)


def test_checkpoint_key_with_and_without_the_base_models_prefix() -> None:
    gpt2 = architecture_of(tiny_config("gpt2"))
    full, short = "transformer.h.1.mlp.c_proj.weight", "h.1.mlp.c_proj.weight"
    assert gpt2.checkpoint_key(1, {full, short}) == full
    assert gpt2.checkpoint_key(1, [short, "wte.weight"]) == short
    with pytest.raises(UnsupportedModelError, match="looked for") as caught:
        gpt2.checkpoint_key(1, ["h.10.mlp.c_proj.weight"])
    assert full in str(caught.value) and short in str(caught.value)


def test_bloom_that_bypasses_its_rewrite_module_is_refused() -> None:
    architecture_of(tiny_config("bloom", slow_but_exact=True))
    architecture_of(tiny_config("bloom", pretraining_tp=2))
    with pytest.raises(UnsupportedModelError, match="slow_but_exact"):
        architecture_of(tiny_config("bloom", slow_but_exact=True, pretraining_tp=2))


def test_an_unlisted_mixture_of_experts_is_refused_by_its_config() -> None:
    with pytest.raises(UnsupportedModelError, match=r"deepseek_v3 .* mixtures of experts"):
        architecture_of(
            AutoConfig.for_model("deepseek_v3"),
            {"blocks": "model.layers", "rewrite": "mlp.down_proj"},
        )


def _olmo() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "olmo", vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_an_unknown_family_is_told_the_names_and_they_work() -> None:
    model = _olmo()
    with pytest.raises(UnsupportedModelError, match="'olmo' is not in memedit's table") as caught:
        architecture_of(model.config)
    words = str(caught.value).split()
    settings = dict(word.removeprefix("architecture.").split("=") for word in words if "=" in word)
    assert settings == {"blocks": "model.layers", "rewrite": "mlp.down_proj"}
    arch = architecture_of(model.config, settings)
    assert arch.rewrite_module(model, 1) is model.model.layers[1].mlp.down_proj
    check_additivity(model, arch, 1)


def test_an_unknown_family_with_other_names() -> None:
    config = AutoConfig.for_model("mpt", vocab_size=64, d_model=16, n_heads=2, n_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    names = {"blocks": "transformer.blocks", "rewrite": "ffn.down_proj"}
    with pytest.raises(UnsupportedModelError, match=r"no module 'model.norm' in MptForCausalLM"):
        architecture_of(config, names)
    with pytest.raises(UnsupportedModelError, match=r"blocks=transformer\.blocks .*ffn\.down_proj"):
        architecture_of(config, {"blocks": "transformer.blocks"})
    arch = architecture_of(config, names | {"final_norm": "transformer.norm_f"})
    assert arch.weight_name(1) == "transformer.blocks.1.ffn.down_proj.weight"
    assert arch.head(model) is model.lm_head
    check_additivity(model, arch, 1)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"blocks": "model.blocks"}, "blocks"),
        ({"blocks": "model.norm"}, "blocks"),
        ({"rewrite": "mlp.c_proj"}, "rewrite"),
        ({"rewrite": "mlp.up_proj"}, "rewrite"),
        ({"rewrite": "mlp"}, "rewrite"),
        ({"head": "embed_out"}, "head"),
        ({"scale": "no_such_field"}, "scale"),
        ({"block_output": "list"}, "block_output"),
        ({"block": "model.layers"}, "block"),
    ],
)
def test_a_wrong_name_is_refused_before_any_weight_is_read(
    overrides: dict[str, str], field: str
) -> None:
    with pytest.raises(InputError) as caught:
        architecture_of(tiny_config("llama"), overrides)
    assert caught.value.field == f"architecture.{field}"


def test_orientation_of_a_named_module_is_seen() -> None:
    arch = architecture_of(tiny_config("gpt2"), {"rewrite": "mlp.c_proj"})
    assert arch == architecture_of(tiny_config("gpt2")) and arch.family.conv1d
    with pytest.raises(UnsupportedModelError, match="not as wide as the residual stream"):
        architecture_of(tiny_config("gpt2"), {"rewrite": "mlp.c_fc"})


def test_a_wrong_scale_is_measured() -> None:
    model = tiny_model("granite")
    right = architecture_of(model.config, {"scale": "residual_multiplier"})
    assert right.residual_scale == architecture_of(model.config).residual_scale == 0.22
    assert probe_additivity(model, right, 2).scale == pytest.approx(0.22, rel=1e-5)
    with pytest.raises(UnsupportedModelError, match=r"multiplied by 0\.22 .* not by 1;"):
        check_additivity(model, architecture_of(model.config, {"scale": "1"}), 2)


def test_truncated_config_leaves_the_original_alone() -> None:
    config = tiny_config("gpt_neo")
    short = truncated(config, 3)
    assert short.attention_layers == ["global", "local", "global"]
    assert short.num_hidden_layers == 3
    assert config.num_hidden_layers == len(config.attention_layers) == LAYERS
    assert type(short).from_dict(short.to_dict()).attention_layers == short.attention_layers
