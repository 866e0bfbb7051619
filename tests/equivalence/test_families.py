"""Every dense family, on a tiny random model of its real class: parts of the model equal the whole.

What the method relies on: the rewrite module is where the table says, its output reaches the
residual stream, running some blocks only gives what the whole model gives, and an update of the
weight is there after saving and loading.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from memedit.architecture import (
    Architecture,
    architecture_of,
    check_additivity,
    probe_additivity,
    truncated,
)
from memedit.errors import UnsupportedModelError
from memedit.families import BY_MODEL_TYPE
from memedit.prompts import encode_completion, locate_subject
from memedit.segments import (
    Rows,
    head_positions,
    run,
    run_prefix,
    run_to_block,
    run_to_rewrite,
    skipped_blocks,
)
from tests.tiny import (
    DENSE,
    HIDDEN,
    LAYERS,
    MOE,
    POST_NORM,
    save_tiny,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

CPU = torch.device("cpu")
LAST = 1  # the last edited layer: two blocks below and with it, two above
# Longer than the sliding windows of the tiny models (16), so that a wrong mask shows.
IDS = (
    [5 + 3 * i for i in range(24)],
    [300 - 7 * i for i in range(19)],
    [40, 8, 90, 17, 33],
)
SPLIT = 2  # tokens that all rows share with their prefix


@pytest.fixture(params=DENSE)
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Architecture]:
    model = tiny_model(request.param)
    return model, architecture_of(model.config)


def _rows(ids: tuple[list[int], ...] = IDS) -> Rows:
    return Rows.of(ids, device=CPU)


def _real(values_BTx: Tensor, lengths: list[int]) -> list[Tensor]:
    """Rows without their padding."""
    return [values[:length] for values, length in zip(values_BTx, lengths, strict=True)]


LENGTHS = [len(row) for row in IDS]


@torch.no_grad()
def test_rewrite_module_maps_keys_to_its_output(
    family: tuple[PreTrainedModel, Architecture],
) -> None:
    model, arch = family
    module = arch.rewrite_module(model, LAST)
    weight_OI = arch.oriented(module.weight)
    assert weight_OI.shape[0] == HIDDEN
    assert weight_OI.shape[1] == arch.input_width(model.config) != HIDDEN
    assert dict(model.named_parameters())[arch.weight_name(LAST)] is module.weight
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _m, args, output: seen.extend((args[0].clone(), output.clone()))
    )
    run(model, _rows())
    handle.remove()
    keys, output = (tensor.reshape(-1, tensor.shape[-1]) for tensor in seen)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(keys @ weight_OI.T + bias, output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_families_that_overwrite_the_output_say_so(
    family: tuple[PreTrainedModel, Architecture],
) -> None:
    model, arch = family
    kept: list[Tensor] = []
    handle = arch.rewrite_module(model, LAST).register_forward_hook(
        lambda _m, _args, output: kept.extend((output, output.clone()))
    )
    run(model, _rows())
    handle.remove()
    assert torch.equal(*kept) or arch.family.clone_output


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(
    family: tuple[PreTrainedModel, Architecture],
) -> None:
    model, _arch = family
    batched = _real(run(model, _rows()), LENGTHS)
    for row, logits_TV in zip(IDS, batched, strict=True):
        alone_TV = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        torch.testing.assert_close(logits_TV, alone_TV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tail_run_is_bit_equal_in_logits_and_gradients(
    family: tuple[PreTrainedModel, Architecture], dtype: torch.dtype
) -> None:
    model, arch = family
    model, rows = model.to(dtype), _rows()
    hidden_BTO = run_to_block(model, arch, rows, last=LAST)
    whole_delta = torch.full_like(hidden_BTO, 0.01).requires_grad_()
    tail_delta = whole_delta.detach().clone().requires_grad_()

    def add(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            return (output[0] + whole_delta, *output[1:])
        return output + whole_delta

    handle = arch.block(model, LAST).register_forward_hook(add)
    whole = run(model, rows)
    handle.remove()
    with skipped_blocks(model, arch, LAST + 1) as entry:
        entry.value = hidden_BTO + tail_delta
        tail = run(model, rows)
    assert torch.equal(whole, tail)
    readout = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (whole * readout).sum().backward()
    (tail * readout).sum().backward()
    assert whole_delta.grad is not None and tail_delta.grad is not None
    assert whole_delta.grad.abs().max() > 0
    assert torch.equal(whole_delta.grad, tail_delta.grad)
    assert torch.equal(run(model, rows), model(**rows.inputs()).logits)  # blocks are back


@torch.no_grad()
def test_advancing_block_by_block_is_bit_equal(
    family: tuple[PreTrainedModel, Architecture],
) -> None:
    model, arch = family
    rows = _rows()
    keys = run_to_rewrite(model, arch, rows, layers=range(LAYERS))
    hidden = run_to_block(model, arch, rows, last=0)
    for layer in range(1, LAYERS):
        step = run_to_rewrite(model, arch, rows, layers=[layer], first=layer, hidden_BTO=hidden)
        assert torch.equal(step[layer], keys[layer])
        hidden = run_to_block(model, arch, rows, last=layer, first=layer, hidden_BTO=hidden)
    assert torch.equal(hidden, run_to_block(model, arch, rows, last=LAYERS - 1))


def test_prefix_cache_in_a_tail_run_is_close_to_the_whole(
    family: tuple[PreTrainedModel, Architecture],
) -> None:
    """Left-padded prefixes of different lengths, one of them empty, run once; the rest from them.

    Held against each row alone, without padding or cache.
    """
    model, arch = family
    splits = (20, 7, 0)
    prefix = run_prefix(
        model, arch, [row[:cut] for row, cut in zip(IDS, splits, strict=True)], device=CPU
    )
    suffixes = [row[cut:] for row, cut in zip(IDS, splits, strict=True)]
    rows = Rows.of(suffixes, device=CPU, prefix=prefix)
    with torch.no_grad():
        hidden_BTO = run_to_block(model, arch, rows, last=LAST)
        keys_BTI = run_to_rewrite(model, arch, rows, layers=[LAST])[LAST]
    delta = torch.zeros(len(IDS), HIDDEN, requires_grad=True)
    with skipped_blocks(model, arch, LAST + 1) as entry:
        entry.value = torch.cat([hidden_BTO[:, :1] + delta[:, None], hidden_BTO[:, 1:]], dim=1)
        repeated = [run(model, rows) for _ in range(2)]
    assert torch.equal(*repeated)  # the frozen prefix does not grow
    readouts = [torch.linspace(-1, 1, len(row) * 384).reshape(len(row), 384) for row in suffixes]
    sum(
        (logits[: len(r)] * r).sum() for logits, r in zip(repeated[0], readouts, strict=True)
    ).backward()
    for i, (row, cut) in enumerate(zip(IDS, splits, strict=True)):
        alone = _rows((row,))
        alone_delta = torch.zeros(HIDDEN, requires_grad=True)
        hidden = run_to_block(model, arch, alone, last=LAST)
        with skipped_blocks(model, arch, LAST + 1) as entry:
            changed = hidden[:, cut : cut + 1] + alone_delta
            entry.value = torch.cat([hidden[:, :cut], changed, hidden[:, cut + 1 :]], dim=1)
            logits = run(model, alone)[0, cut:]
        (logits * readouts[i]).sum().backward()
        keys = run_to_rewrite(model, arch, alone, layers=[LAST])[LAST][0, cut:]
        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(repeated[0][i, : len(suffixes[i])], logits, **close)
        torch.testing.assert_close(keys_BTI[i, : len(suffixes[i])], keys, **close)
        assert alone_delta.grad is not None and delta.grad is not None
        error = (delta.grad[i] - alone_delta.grad).norm() / alone_delta.grad.norm()
        assert error < 1e-4


@torch.no_grad()
def test_logits_at_some_positions_only(family: tuple[PreTrainedModel, Architecture]) -> None:
    model, arch = family
    rows = _rows()
    batch, cols = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 23, 18, 4])
    whole = run(model, rows)
    with head_positions(arch.head(model), batch, cols):
        some = run(model, rows)
    assert some.shape == (1, 4, whole.shape[-1])
    torch.testing.assert_close(some[0], whole[batch, cols], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE)
def test_only_the_lower_blocks_are_loaded(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "whole", name)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    config = truncated(whole.config, LAST + 1)
    lower = AutoModel.from_pretrained(folder, config=config)
    arch = architecture_of(lower.config)
    assert arch.n_layers == len(arch.blocks(lower)) == LAST + 1
    layers = range(LAST + 1)
    expected = run_to_rewrite(whole, architecture_of(whole.config), _rows(), layers=layers)
    found = run_to_rewrite(lower, arch, _rows(), layers=layers)
    for layer in layers:
        assert torch.equal(found[layer], expected[layer])
    lower.save_pretrained(tmp_path / "lower")  # the config is whole in itself
    names = _tensor_names(tmp_path / "lower")
    assert arch.checkpoint_key(LAST, names) in names  # saved without the base model's prefix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewrite_output_reaches_the_residual_stream(
    family: tuple[PreTrainedModel, Architecture], dtype: torch.dtype
) -> None:
    model, arch = family
    found = check_additivity(model.to(dtype), arch, LAST)
    assert found.scale == pytest.approx(arch.residual_scale, rel=5e-3)
    assert arch.residual_scale == (0.22 if model.config.model_type == "granite" else 1.0)


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE)
def test_update_is_there_after_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    arch = architecture_of(model.config)
    key_I = run_to_rewrite(model, arch, _rows(), layers=[LAST])[LAST][1, 18]
    block_before_O = run_to_block(model, arch, _rows(), last=LAST)[1, 18]
    residual_O = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))
    # The smallest change of the weight that moves the block's output by the residual at this key.
    delta_OI = torch.outer(residual_O / arch.residual_scale, key_I) / key_I.square().sum()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arch.oriented(arch.rewrite_module(model, LAST).weight).add_(delta_OI)
    model.save_pretrained(tmp_path, max_shard_size="40KB")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    edited = arch.weight_name(LAST)
    for tensor_name, tensor in loaded.state_dict().items():
        if tensor_name == edited:
            found_OI = arch.oriented(tensor - before[tensor_name])
            torch.testing.assert_close(found_OI, delta_OI, atol=1e-6, rtol=0)
        else:
            assert torch.equal(tensor, before[tensor_name]), tensor_name
    moved_O = run_to_block(loaded, arch, _rows(), last=LAST)[1, 18] - block_before_O
    torch.testing.assert_close(moved_O, residual_O, atol=1e-4, rtol=1e-4)
    names = _tensor_names(tmp_path)
    assert arch.checkpoint_key(LAST, names) in names


def _tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    return names


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("template", "subject"),
    [
        ("{} is located in the city of", "Eiffel Tower"),
        ("The mother tongue of {} is", "Danielle Darrieux"),
        ("I saw “{}”, the painting", "Bühne Ω"),
        ("We like {}", "東京タワー"),
        ("{}'s capital is", "New Zealand"),
    ],
)
@torch.no_grad()
def test_key_of_the_last_subject_token_with_any_padding(
    kind: str, bos: bool, template: str, subject: str
) -> None:
    tokenizer = tiny_tokenizer(kind, bos)  # type: ignore[arg-type]
    located = locate_subject(tokenizer, template, subject)
    text = template.replace("{}", subject)
    ids, last = list(located.ids), located.subject_last
    assert ids == tokenizer(text)["input_ids"]
    # Independent of offsets: the tokens up to the position spell the subject's last character, and
    # those before it do not.
    end = template.index("{}") + len(subject)
    assert tokenizer.decode(ids[: last + 1], skip_special_tokens=True).startswith(text[:end])
    assert not tokenizer.decode(ids[:last], skip_special_tokens=True).startswith(text[:end])

    model = tiny_model("gpt2")  # learned positions: the most easily hurt by padding
    arch = architecture_of(model.config)
    expected = run_to_rewrite(model, arch, _rows((ids,)), layers=[LAST])[LAST][0, last]
    padded = _rows((ids, IDS[0] * 2))
    right = run_to_rewrite(model, arch, padded, layers=[LAST])[LAST][0, last]
    torch.testing.assert_close(right, expected, atol=1e-5, rtol=1e-5)
    prefix = run_prefix(model, arch, [ids[:last], IDS[0]], device=CPU)
    rows = Rows.of([ids[last:], IDS[1]], device=CPU, prefix=prefix)
    left = run_to_rewrite(model, arch, rows, layers=[LAST])[LAST][0, 0]
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
@pytest.mark.parametrize("bos", [False, True])
def test_completion_is_spelt_as_the_tokenizer_spells_it(kind: str, bos: bool) -> None:
    tokenizer = tiny_tokenizer(kind, bos)  # type: ignore[arg-type]
    prompt_ids, target_ids = encode_completion(tokenizer, "The capital of Italy is", "Rome")
    assert tokenizer.decode(prompt_ids + target_ids, skip_special_tokens=True) == (
        "The capital of Italy is Rome"
    )
    assert prompt_ids == tokenizer("The capital of Italy is")["input_ids"]
    assert not set(target_ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("name", POST_NORM)
def test_post_norm_is_refused_because_it_is_not_additive(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(UnsupportedModelError, match="post-norm"):
        architecture_of(model.config)
    # The refusal is true: with the table's row, the probe finds the same at run time.
    arch = Architecture(
        family=BY_MODEL_TYPE[model.config.model_type], n_layers=LAYERS, residual_scale=1.0
    )
    assert probe_additivity(model, arch, LAST).remainder > 0.3
    with pytest.raises(UnsupportedModelError, match="post-norm"):
        check_additivity(model, arch, LAST)


@pytest.mark.parametrize("name", MOE)
def test_mixtures_of_experts_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="mixtures of experts"):
        architecture_of(tiny_config(name))
