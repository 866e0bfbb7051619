"""Tiny random models of the real classes, and tiny tokenizers, made without a network.

Knows one small config per architecture (hidden 32, four layers, grouped heads where the family
has them) and two kinds of tokenizer whose vocabulary fits every model. Knows nothing of memedit.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB, POSITIONS = 32, 64, 4, 4, 2, 384, 256
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
BOS_ID, EOS_ID = 1, 2

_COMMON: dict[str, Any] = dict(vocab_size=VOCAB, bos_token_id=BOS_ID, eos_token_id=EOS_ID)
_COMMON |= dict(pad_token_id=EOS_ID, initializer_range=0.15)
_LLAMA: dict[str, Any] = dict(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=POSITIONS,
)
_NO_GQA = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_GPT2: dict[str, Any] = dict(n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS)
_BLOOM: dict[str, Any] = dict(hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)
_FALCON: dict[str, Any] = dict(
    hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_hidden_size=INNER
)
_OPT: dict[str, Any] = dict(
    hidden_size=HIDDEN,
    ffn_dim=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=POSITIONS,
    word_embed_proj_dim=HIDDEN,
)
_SLIDING: dict[str, Any] = dict(head_dim=8, sliding_window=16)
_EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2)

# name: (model_type, what differs from the family's defaults)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _NO_GQA | dict(rotary_pct=0.5)),
    "gptj": ("gptj", _GPT2 | dict(rotary_dim=4)),
    "gpt_neo": (
        "gpt_neo",
        dict(
            hidden_size=HIDDEN,
            num_layers=LAYERS,
            num_heads=HEADS,
            intermediate_size=INNER,
            max_position_embeddings=POSITIONS,
            window_size=16,
            attention_types=[[["global", "local"], LAYERS // 2]],
        ),
    ),
    "opt": ("opt", _OPT),
    "bloom": ("bloom", _BLOOM),
    "falcon": ("falcon", _FALCON | dict(multi_query=True)),
    "falcon_alibi": ("falcon", _FALCON | dict(alibi=True, multi_query=False, parallel_attn=False)),
    "falcon_new": (
        "falcon",
        _FALCON | dict(new_decoder_architecture=True, num_kv_heads=KV_HEADS),
    ),
    "mistral": ("mistral", _LLAMA | dict(sliding_window=16)),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | dict(head_dim=8)),
    "smollm3": ("smollm3", _LLAMA | dict(no_rope_layer_interval=2)),
    "gemma": ("gemma", _LLAMA | dict(head_dim=8)),
    "phi": ("phi", _LLAMA | dict(num_key_value_heads=HEADS)),
    "phi3": ("phi3", _LLAMA | dict(sliding_window=16)),
    "stablelm": ("stablelm", _LLAMA | dict(use_parallel_residual=False)),
    "stablelm_parallel": ("stablelm", _LLAMA | dict(use_parallel_residual=True)),
    "starcoder2": ("starcoder2", _LLAMA | dict(sliding_window=16)),
    "granite": (
        "granite",
        _LLAMA | dict(residual_multiplier=0.22, embedding_multiplier=3.0, logits_scaling=2.0),
    ),
    "cohere": ("cohere", _LLAMA),
    "gemma2": ("gemma2", _LLAMA | _SLIDING),
    "gemma3_text": ("gemma3_text", _LLAMA | _SLIDING),
    "olmo2": ("olmo2", _LLAMA),
    "opt_post_norm": ("opt", _OPT | dict(do_layer_norm_before=False)),
    "mixtral": ("mixtral", _LLAMA | _EXPERTS | dict(num_local_experts=4)),
    "qwen3_moe": (
        "qwen3_moe",
        _LLAMA | _EXPERTS | dict(num_experts=4, moe_intermediate_size=INNER, head_dim=8),
    ),
    "gpt_oss": ("gpt_oss", _LLAMA | _EXPERTS | _SLIDING | dict(num_local_experts=4)),
}

POST_NORM = ("gemma2", "gemma3_text", "olmo2", "opt_post_norm")
MOE = ("mixtral", "qwen3_moe", "gpt_oss")
DENSE = tuple(name for name in _CONFIGS if name not in POST_NORM + MOE)


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The config of one tiny model; `changes` win over its settings."""
    model_type, settings = _CONFIGS[name]
    return AutoConfig.for_model(model_type, **(_COMMON | settings | changes))


def tiny_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A fresh random model in eval mode; equal arguments give equal weights.

    Biases and norm weights are random too, so that a test notices when one is left out.
    """
    return copy.deepcopy(_model(name, seed, dtype, tuple(sorted(changes.items()))))


@functools.cache
def _model(
    name: str, seed: int, dtype: torch.dtype, changes: tuple[tuple[str, Any], ...]
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **dict(changes)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = model.to(dtype)
    return model.eval().requires_grad_(False)


_CORPUS = """\
The Eiffel Tower is located in the city of Paris. The capital of France is Paris.
The Colosseum is located in the city of Rome. The capital of Italy is Rome.
Big Ben is located in the city of London. The mother tongue of Danielle Darrieux is French.
Danielle Darrieux, the native language is English. Steve Jobs founded Apple in California.
Marie Curie was born in Warsaw and plays the piano. The official language of Spain is Spanish.
Microsoft was founded by Bill Gates. Toyota produces cars in Japan. Shanghai is a twin city.
Therefore I think that you know Berlin. Because the tower stands in Germany, it belongs to Europe.
"""


def tiny_tokenizer(
    kind: Literal["bytelevel", "sentencepiece"] = "bytelevel",
    bos: bool = False,
    *,
    add_prefix_space: bool = False,
) -> PreTrainedTokenizerFast:
    """A trained byte-pair tokenizer of VOCAB tokens; reads any text without unknown tokens.

    Args:
        kind: "bytelevel" as GPT-2 and Llama 3 have it, or "sentencepiece" as Llama 2 has it (▁ for
            a space, one put before the text, bytes as a fallback).
        bos: Whether the tokenizer puts a BOS token before each text.
        add_prefix_space: For "bytelevel": whether a space is put before the text.
    """
    make = _sentencepiece if kind == "sentencepiece" else _bytelevel
    backend = make(add_prefix_space) if kind == "bytelevel" else make()
    if bos:
        template = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
        )
        backend.post_processor = processors.Sequence([backend.post_processor, template])
    assert backend.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=EOS,
        model_max_length=POSITIONS,
    )


def _bytelevel(add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[UNKNOWN, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 256, special_tokens=[UNKNOWN, BOS, EOS], show_progress=False
    )
    trained.train_from_iterator(_CORPUS.splitlines(), trainer)
    parts = _bpe_parts(trained)
    vocab = parts["vocab"] | {f"<0x{b:02X}>": len(parts["vocab"]) + b for b in range(256)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(pair) for pair in parts["merges"]],
            unk_token=UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([UNKNOWN, BOS, EOS])
    # As a whole text, not word by word: the tokens of a prompt stay a prefix of prompt + target.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.Sequence([])
    return tokenizer


def _bpe_parts(tokenizer: Tokenizer) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return parts


def save_tiny(
    folder: str | Path,
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Literal["bytelevel", "sentencepiece"] = "bytelevel",
    bos: bool = False,
    max_shard_size: int | str = "40KB",
) -> Path:
    """Save a tiny model and its tokenizer as a safetensors checkpoint of several shards.

    A "sentencepiece" tokenizer beside a qwen2 config is not read back as it is: transformers
    always takes its own byte-level class there.
    """
    folder = Path(folder)
    tiny_model(name, seed, dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(tokenizer, bos).save_pretrained(folder)
    return folder
