"""The arithmetic against what torch counts when the real code runs on tiny models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from memedit.architecture import Architecture, architecture_of
from memedit.config import TargetSettings
from memedit.cost import (
    count_texts,
    driver_memory,
    evaluation_work,
    from_factors,
    keys_work,
    sampled_at_once,
    sampling_memory,
    sampling_work,
    shape_of,
    si,
    solve_work,
    statistics_work,
    targets_work,
    worker_memory,
)
from memedit.keys import KeyPass
from memedit.moments import MomentAccumulator
from memedit.prompts import EncodedRequest, encode_request
from memedit.requests import EditRequest
from memedit.solve import (
    LayerProblem,
    MomentFactor,
    SummedProblem,
    factors_are_cheaper,
    solve_from_factors,
    solve_from_sums,
)
from memedit.targets import optimise_targets
from tests.tiny import DENSE, HIDDEN, INNER, LAYERS, VOCAB, tiny_config, tiny_model, tiny_tokenizer

LAYERS_EDITED = (0, 1)
CONTEXTS = ("{}", "Therefore I think. {}", "Because the tower stands in Germany, it is. {}")
FACTS = [
    ("Eiffel Tower", "The {} is located in the city of", "Rome"),
    ("Danielle Darrieux", "{}'s mother tongue is", "English words"),
    ("Steve", "I know that {} founded", "Microsoft"),
    ("Toyota", "Cars of {} are made in", "Italy"),
    ("Marie Curie", "{} is a", "player of the piano"),
]
# What is left out (a norm that is a product of matrices in some family) is within this.
TOLERANCE = 0.01


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make products this small slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def eager(name: str) -> tuple[PreTrainedModel, Architecture]:
    """torch counts no operation of the CPU's fused attention, so attention is written out."""
    model = tiny_model(name, attn_implementation="eager")
    return model, architecture_of(model.config)


@pytest.fixture(scope="module")
def encoded() -> list[EncodedRequest]:
    tokenizer = tiny_tokenizer(bos=True)
    return [
        encode_request(
            tokenizer,
            EditRequest(case_id=str(i), subject=subject, prompt=prompt, target_new=target),
            CONTEXTS,
        )
        for i, (subject, prompt, target) in enumerate(FACTS)
    ]


def counted(counter: FlopCounterMode) -> int:
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", DENSE)
def test_the_sizes_are_those_of_the_model(name: str) -> None:
    model = tiny_model(name)
    arch = architecture_of(model.config)
    shape = shape_of(model.config, arch)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.blocks, shape.hidden, shape.vocab) == (LAYERS, HIDDEN, VOCAB)
    assert shape.inner == arch.input_width(model)
    cache = model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    states = cache.layers[0].keys, cache.layers[0].values
    # Some families repeat shared heads before they cache them; never is more kept than counted.
    assert shape.state_width * 3 <= sum(s.numel() for s in states) <= 2 * shape.attention_width * 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon_new", "opt"])
def test_statistics_cost_what_torch_counts(name: str) -> None:
    model, arch = eager(name)
    window, rows = 32, 4
    ids = torch.randint(3, VOCAB, (rows, window), generator=torch.Generator().manual_seed(0))
    accumulator = MomentAccumulator(model, arch, layers=LAYERS_EDITED, count_0=True)
    with FlopCounterMode(display=False) as counter:
        accumulator.add(ids.tolist())
    shape = shape_of(model.config, arch)
    work = statistics_work(shape, layers=LAYERS_EDITED, tokens=rows * window, window=window)
    assert work.value == pytest.approx(counted(counter), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon_new", "opt"])
@pytest.mark.parametrize("tokens_per_batch", [60, 400])
def test_targets_cost_what_torch_counts(
    name: str, tokens_per_batch: int, encoded: list[EncodedRequest]
) -> None:
    model, arch = eager(name)
    # No fact reaches this loss, so every one takes all steps.
    settings = TargetSettings(
        steps=4, lr=0.01, tokens_per_batch=tokens_per_batch, loss_threshold=0.0
    )
    with FlopCounterMode(display=False) as counter:
        found = list(optimise_targets(model, arch, encoded, layer=1, settings=settings))
    assert {len(target.losses) for target in found} == {3}
    texts = count_texts(encoded, tokens_per_batch=tokens_per_batch)
    work = targets_work(shape_of(model.config, arch), layer=1, texts=texts, steps=4)
    assert work.value == pytest.approx(counted(counter), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_keys_cost_what_torch_counts(name: str, encoded: list[EncodedRequest]) -> None:
    model, arch = eager(name)
    layers = (0, 2, 3)
    with FlopCounterMode(display=False) as counter:
        walk = KeyPass(model, arch, encoded, last_layer=3)
        for layer in layers:
            walk.at(layer)
    texts = count_texts(encoded, tokens_per_batch=400)
    work = keys_work(shape_of(model.config, arch), layers=layers, texts=texts)
    # The texts of this test are short and of different lengths: padding is what is missing.
    assert 0.6 * counted(counter) < work.value < 1.02 * counted(counter)


@pytest.mark.parametrize("edits", [1, 10, 40, 300])
def test_the_solve_takes_the_form_that_is_counted(edits: int) -> None:
    shape = shape_of(tiny_config("llama"), architecture_of(tiny_config("llama")))
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    samples = random(4 * INNER, INNER)
    problem = LayerProblem(
        layer=0,
        keys_NI=random(edits, INNER),
        residuals_NO=random(edits, HIDDEN),
        moment=MomentFactor(samples.T @ samples / len(samples), layer=0),
        lam=1.0,
    )
    with FlopCounterMode(display=False) as counter:
        if factors_are_cheaper(edits, INNER, HIDDEN):
            update = solve_from_factors(problem)
        else:
            summed = SummedProblem(
                layer=0,
                keys_II=problem.keys_NI.T @ problem.keys_NI,
                residual_keys_OI=problem.residuals_NO.T @ problem.keys_NI,
                moment_II=problem.moment.moment_II,
                lam=problem.lam,
            )
            update = solve_from_sums(summed)
        delta_OI = update.delta_OI
    assert delta_OI.shape == (HIDDEN, INNER)
    assert (update.right_NI is not None) == from_factors(shape, edits=edits)
    # torch counts the products, not the factors and triangular solves that are added to them.
    i, o, n = INNER, HIDDEN, edits
    if update.right_NI is None:
        uncounted = i**3 / 3 + 2 * o * i**2
    else:
        uncounted = i**3 / 3 + 2 * n * i**2 + n**3 / 3 + 2 * n**2 * i
    work = solve_work(shape, layers=(0,), edits=edits).value
    assert work == pytest.approx(counted(counter) + uncounted)
    held = update.left_NO.numel() + (0 if update.right_NI is None else update.right_NI.numel())
    memory = driver_memory(shape, layers=(0,), edits=edits, itemsize=4)
    assert memory["updates"].value == 8 * held


def test_sampling_and_evaluation_cost_forward_passes() -> None:
    model, arch = eager("llama")
    shape = shape_of(model.config, arch)
    tokens, reads, generated = 40, 40, 0
    ids = torch.arange(3, 3 + tokens).unsqueeze(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    attention = 4 * shape.attention_width * tokens**2 * LAYERS
    work = evaluation_work(shape, tokens=tokens, reads=reads, generated=generated)
    assert work.value == 2 * (counted(counter) - attention)
    # Sampling looks at half of the square, since later tokens are not there yet.
    assert sampling_work(shape, tokens=tokens, window=tokens).value == (
        counted(counter) - attention / 2
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "phi3"])
def test_the_memory_of_a_batch_of_targets_is_about_what_autograd_keeps(
    name: str, encoded: list[EncodedRequest]
) -> None:
    model = tiny_model(name)
    arch = architecture_of(model.config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    peak = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        peak = max(peak, sum(kept.values()))
        return tensor

    settings = TargetSettings(steps=2, tokens_per_batch=400)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        list(optimise_targets(model, arch, encoded, layer=1, settings=settings))
    texts = count_texts(encoded, tokens_per_batch=400)
    memory = worker_memory(shape_of(model.config, arch), layers=(0, 1), texts=texts, itemsize=4)
    assert peak / 2 < memory["targets"].value < peak * 3


def test_counts_are_of_the_texts(encoded: Sequence[EncodedRequest]) -> None:
    texts = count_texts(encoded, tokens_per_batch=10_000)
    lengths = [
        [len(t.ids) - t.subject_last + len(e.target_ids) - 1 for t in e.contexts] for e in encoded
    ]
    # A prompt that begins with its subject answers the KL term, which else takes a row of its own.
    own = [prompt.startswith("{}") for _, prompt, _ in FACTS]
    per_fact = [sum(each) + (not begins) for each, begins in zip(lengths, own, strict=True)]
    rows = len(FACTS) * len(CONTEXTS) + own.count(False)
    assert texts.from_subject_max == max(per_fact)
    assert texts.from_subject_mean == pytest.approx(sum(per_fact) / len(per_fact))
    assert texts.tokens_from == rows * max(map(max, lengths)) == texts.batch_from
    assert texts.bare_tokens == sum(e.contexts[0].subject_last + 1 for e in encoded)
    assert count_texts(encoded, tokens_per_batch=1).tokens_from < texts.tokens_from


def test_sampled_windows_take_at_most_half_as_much_as_the_weights() -> None:
    config = tiny_config("llama")
    tiny = shape_of(config, architecture_of(config))
    neox = replace(tiny, blocks=44, state_width=2 * 6144, parameters=20_554_567_680, vocab=50_432)
    rows = sampled_at_once(neox, window=256)
    assert rows == 74
    states = rows * 256 * 44 * 2 * 6144
    assert states <= neox.parameters / 2 < states * (rows + 1) / rows
    memory = sampling_memory(neox, window=256, itemsize=2)
    assert memory.value == pytest.approx(2 * states + 12 * 74 * 50_432)
    assert sampled_at_once(neox, window=8) == 160  # larger products gain nothing more
    assert sampled_at_once(tiny, window=10**6) == 1


def test_workers_share_the_keys_and_nothing_else(encoded: list[EncodedRequest]) -> None:
    config = tiny_config("llama")
    shape = shape_of(config, architecture_of(config))
    texts = count_texts(encoded, tokens_per_batch=400)
    alone = worker_memory(shape, layers=(0, 1), texts=texts, itemsize=4)
    shared = worker_memory(shape, layers=(0, 1), texts=texts, itemsize=4, workers=4)
    assert shared["keys"].value == pytest.approx(alone["keys"].value / 4, rel=0.05)
    assert shared["model"] == alone["model"]
    half = worker_memory(shape, layers=(0, 1), texts=texts, itemsize=2)
    assert half["model"].value == alone["model"].value / 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1536, "1.54k"), (134_515_008, "135M"), (999_600, "1.00M"),
     (20.55e9, "20.6G"), (2.5e15, "2.50P")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert si(value) == text
    if value >= 1000:
        digits, letter = float(text[:-1]), text[-1]
        scale = 10 ** (3 * ("kMGTP".index(letter) + 1))
        assert math.isclose(digits * scale, value, rel_tol=0.005)
