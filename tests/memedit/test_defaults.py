"""Settings by model: found by its type and size, as published, and a fair guess for the others."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from memedit.defaults import defaults_for
from tests.tiny import tiny_config


def config_of(model_type: str, **settings: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **settings)


SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32}

# As in the hparams files of the MEMIT reference and of EasyEdit.
PUBLISHED = {
    "GPT-2 XL": (
        config_of("gpt2", n_embd=1600, n_layer=48, n_head=25),
        (range(13, 18), 20_000, 0.5, 20, 0.75),
    ),
    "GPT-J 6B": (
        config_of("gptj", n_embd=4096, n_layer=28),
        (range(3, 9), 15_000, 0.5, 25, 0.75),
    ),
    "GPT-NeoX 20B": (
        config_of("gpt_neox", hidden_size=6144, num_hidden_layers=44),
        (range(6, 11), 20_000, 0.5, 20, 0.3),
    ),
    "Llama-2 7B": (
        config_of("llama", vocab_size=32_000, **LLAMA_7B),
        (range(4, 9), 15_000, 0.5, 25, 4),
    ),
    "Llama-3 8B": (
        config_of("llama", vocab_size=128_256, **LLAMA_7B),
        (range(4, 9), 15_000, 0.1, 25, 0.75),
    ),
    "Qwen2.5 7B": (
        config_of("qwen2", hidden_size=3584, num_hidden_layers=28, num_attention_heads=28),
        (range(7, 12), 15_000, 0.1, 25, 0.75),
    ),
    "Mistral 7B": (config_of("mistral", **LLAMA_7B), (range(4, 9), 15_000, 0.5, 25, 4)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    config, (layers, lam, lr, steps, clamp) = PUBLISHED[name]
    found = defaults_for(config, 100)
    assert found.known and found.source.startswith(name)
    assert found.told.startswith(f"published: {name}: ")
    settings = found.settings
    assert settings.layers == tuple(layers)
    assert settings.solve.lam == lam
    targets = settings.targets
    assert (targets.lr, targets.steps, targets.clamp_norm_factor) == (lr, steps, clamp)
    # λ grows with the number of facts only where that was measured.
    assert defaults_for(config, 10_000).settings == settings


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("memedit", "for memit; protected keys and repair were measured on SmolLM2 only"),
        ("alphaedit", "for memit; λ 10 of AlphaEdit's code"),
        ("rome", "not measured for rome"),
    ],
)
def test_what_is_published_for_memit_is_not_claimed_for_others(method: Any, says: str) -> None:
    config, _ = PUBLISHED["GPT-J 6B"]
    assert "for memit" not in defaults_for(config, 100).told
    assert says in defaults_for(config, 100, method=method).told
    smollm2 = defaults_for(config_of("llama", **SMOLLM2), 100, method=method).told
    assert (says in smollm2) is (method != "memedit")


def test_smollm2_is_known_and_its_lambda_grows_with_the_facts() -> None:
    config = config_of("llama", **SMOLLM2)
    counts = (1, 5, 10, 30, 100, 300, 1000, 5000)
    found = [defaults_for(config, n) for n in counts]
    assert all(each.known for each in found)
    assert {each.origin for each in found} == {"tuned here"}
    assert {each.settings.layers for each in found} == {found[0].settings.layers}
    lams = [each.settings.solve.lam or 0 for each in found]
    assert all(lam > 0 for lam in lams)
    assert lams == sorted(lams)
    assert lams[0] < lams[4] < lams[6]
    # With protected keys and repair the rest can be spared more, of not too many facts.
    protected = [defaults_for(config, n, method="memedit").settings.solve.lam or 0 for n in counts]
    assert all(more > 2 * lam for more, lam in zip(protected[:5], lams[:5], strict=True))
    assert protected[6] == protected[7] < lams[6]


def test_a_model_of_another_size_is_not_taken_for_a_published_one() -> None:
    found = defaults_for(config_of("gpt2", n_embd=1280, n_layer=36, n_head=20), 1)
    assert not found.known and found.origin == "guessed"
    assert "gpt2 36 1280" in found.source


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 12, 24, 80])
def test_a_guess_lies_inside_the_model(blocks: int) -> None:
    found = defaults_for(tiny_config("llama", num_hidden_layers=blocks), 1)
    layers = found.settings.layers
    assert not found.known
    assert 1 <= len(layers) <= 5
    assert layers == tuple(range(layers[0], layers[-1] + 1))
    assert 0 <= layers[0] <= layers[-1] < max(1, blocks / 2)
    assert found.settings.solve.lam is not None
