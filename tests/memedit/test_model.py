"""Loading: nothing made up, nothing loaded that was changed, and from afar bit by bit the same."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memedit import shards
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError
from memedit.files import Files, LocalFiles
from memedit.manifest import MANIFEST_NAME, write_manifest
from memedit.model import LoadedModel, ModelSpec, check_loadable, load_model, load_tokenizer
from memedit.patching import LocalSink, write_patched
from tests.elsewhere import Elsewhere
from tests.memedit.test_manifest import manifest_of
from tests.patches import each_row
from tests.tiny import DENSE, MOE, POST_NORM, save_tiny, tiny_model, tiny_tokenizer

PLACES = (LocalFiles, Elsewhere)
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def test_a_tokenizer_that_ends_every_prompt_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"][-1])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="end-of-text"):
        load_tokenizer(tmp_path)


# --- From a place that is not here --------------------------------------------------------------


def load(files: Files, **options: Any) -> LoadedModel:
    return load_model(ModelSpec(files=files, editable=False, **options))


def weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """Parameters and buffers, those too that no checkpoint holds."""
    model = loaded.model
    return {**model.state_dict(keep_vars=True), **dict(model.named_buffers())}


def check_equal(found: LoadedModel, expected: LoadedModel) -> None:
    assert type(found.model) is type(expected.model)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert not any(module.training for module in found.model.modules())
    ids = found.tokenizer.encode("The Eiffel Tower is in Paris")
    assert ids == expected.tokenizer.encode("The Eiffel Tower is in Paris")
    with torch.no_grad():
        logits = (each.model(torch.tensor([ids])).logits for each in (found, expected))
        assert torch.equal(*logits)


@pytest.mark.parametrize("family", DENSE + POST_NORM + MOE)
def test_from_afar_it_is_the_same_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    far = Elsewhere(folder)
    found, expected = load(far), load(LocalFiles(folder))
    check_equal(found, expected)
    assert found.known_arch == expected.known_arch
    # Each byte is asked for once, and no weights are fetched as files.
    assert max(Counter(far.reads).values()) == 1
    assert not far.opened
    assert far.asked_for and not any("safetensors" in name for name in far.asked_for)


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_from_afar_in_another_dtype(stored: str, computed: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", dtype=getattr(torch, stored))
    found = load(Elsewhere(folder), dtype=computed)
    check_equal(found, load(LocalFiles(folder), dtype=computed))
    assert found.model.dtype == getattr(torch, computed)


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_from_afar_without_the_prefix_of_the_base_model(family: str, tmp_path: Path) -> None:
    """As the published GPT-2 has its names; the head is the embedding."""
    model = tiny_model(family)
    getattr(model, model.base_model_prefix).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).names
    check_equal(load(Elsewhere(tmp_path)), load(LocalFiles(tmp_path)))


def test_from_afar_a_text_ends_at_the_same_tokens(tmp_path: Path) -> None:
    """Chat models have a second one in generation_config.json, and `generate` stops there."""
    path = save_tiny(tmp_path / "model") / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 7]}))
    for place in PLACES:
        config: Any = load(place(path.parent)).model.generation_config
        assert config.eos_token_id == [2, 7], place


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
def test_from_afar_only_the_lower_blocks_are_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_FIRST_BYTES", 8)  # else a header brings some weights with it
    folder = save_tiny(tmp_path / "model", family)
    far = Elsewhere(folder)
    check_equal(load(far, until_layer=1), load(LocalFiles(folder), until_layer=1))
    read, above = set(), set()
    for name, info in Checkpoint.open(folder).tensors.items():
        if any(f".{block}.{layer}." in name for block in ("layers", "h") for layer in (2, 3)):
            above.add(name)
        for shard, start, size in far.reads:
            if shard == info.shard and info.offset <= start < info.offset + info.size_bytes:
                assert (start, size) == (info.offset, info.size_bytes)
                read.add(name)
    assert above and read == set(Checkpoint.open(folder).names) - above


# --- What is refused, wherever it lies ----------------------------------------------------------


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A tiny model in one file."""
    return save_tiny(tmp_path / "single", max_shard_size="1GB")


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    shard = folder / "model.safetensors"
    tensors = {n: t for n, t in load_file(shard).items() if n != name}
    tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_made_up(single: Path, place: type[LocalFiles]) -> None:
    files = place(single)
    check_loadable(files)
    change(single, UP, None)
    for attempt in (load, check_loadable):
        with pytest.raises(InputError, match=f"lacks 1 of the model's tensors, '{UP}'") as caught:
            attempt(files)
        assert caught.value.source == files.location
    change(single, UP, torch.ones(3, 3))
    for attempt in (load, check_loadable):
        with pytest.raises(InputError, match="could not be loaded"):
            attempt(files)


def test_whether_it_can_be_loaded_is_found_out_without_a_weight(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_FIRST_BYTES", 8)
    far = Elsewhere(single)
    check_loadable(far)
    first = min(info.offset for info in Checkpoint.open(single).tensors.values())
    weights = [(start, size) for name, start, size in far.reads if name == "model.safetensors"]
    assert weights and all(start + size <= first for start, size in weights)


@pytest.mark.parametrize(
    "wrong", ["model_type", "hidden_size", "num_attention_heads", "hidden_act"]
)
def test_a_config_that_makes_no_model_is_the_input_s_fault(single: Path, wrong: str) -> None:
    path = single / "config.json"
    config = json.loads(path.read_text())
    config[wrong] = {"num_attention_heads": 0, "hidden_size": "many"}.get(wrong, "unheard-of")
    path.write_text(json.dumps(config))
    for attempt in (load, check_loadable):
        with pytest.raises(InputError) as caught:
            attempt(LocalFiles(single))
        assert caught.value.source == str(single)


@pytest.mark.parametrize("content", ["", "[]", '{"model": {"type": "unheard-of"}}'])
def test_a_damaged_tokenizer_is_the_input_s_fault(single: Path, content: str) -> None:
    (single / "tokenizer.json").write_text(content)
    for attempt in (load, check_loadable):
        with pytest.raises(InputError, match="no tokenizer could be loaded") as caught:
            attempt(LocalFiles(single))
        assert caught.value.source == str(single)


@pytest.mark.parametrize("place", PLACES)
def test_a_version_whose_edited_tensor_was_changed_is_refused(
    tmp_path: Path, place: type[LocalFiles]
) -> None:
    base = Checkpoint.open(save_tiny(tmp_path / "base"))
    out = tmp_path / "out"
    out.mkdir()
    patched = write_patched(base, LocalSink(out), {DOWN: each_row(torch.neg)})
    write_manifest(out, manifest_of(files=patched.files, tensors=patched.tensors))
    expected = -base.read(DOWN)
    assert torch.equal(weights(load(place(out)))[DOWN], expected)

    info = base.info(DOWN)
    with (out / info.shard).open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\x01")
    with pytest.raises(
        InputError, match="edited tensor that is not the one that was published"
    ) as caught:
        load(place(out))
    assert caught.value.field == DOWN and str(caught.value.source).endswith(f"/{info.shard}")
    # What says otherwise can be taken away, but for whoever wrote it a moment ago.
    (out / MANIFEST_NAME).rename(tmp_path / MANIFEST_NAME)
    load(place(out))
    written = {name: record.sha256 for name, record in patched.tensors.items()}
    with pytest.raises(InputError, match="edited tensor that is not the one that was published"):
        load(place(out), published=written)
    # A manifest of another format lists tensors that are not in the folder.
    manifest = manifest_of(tensors=patched.tensors)
    write_manifest(out, replace(manifest, format="delta"))
    load(place(out))
    shutil.rmtree(out)
    with pytest.raises(InputError):
        load(place(out))
