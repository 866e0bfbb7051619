"""Loading: what is not whole is refused, never filled in."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from memedit.errors import InputError
from memedit.model import ModelSpec, load_model, load_tokenizer
from tests.tiny import save_tiny, tiny_tokenizer


def test_a_missing_tensor_is_refused_and_not_made_up(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", max_shard_size="10MB")
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(ModelSpec(folder=folder))


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", max_shard_size="10MB")
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match="could not be loaded"):
        load_model(ModelSpec(folder=folder))


def test_a_tokenizer_that_ends_every_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"][-1])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="end-of-text"):
        load_tokenizer(tmp_path)
