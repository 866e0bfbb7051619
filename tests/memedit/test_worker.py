"""What a worker does to the weights it holds."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memedit.config import EvaluationSettings, TargetSettings, TraceSettings
from memedit.errors import NumericalError
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.prompts import encode_request
from memedit.requests import EditRequest, Neighbour
from memedit.solve import Update
from memedit.tracing import KINDS, TraceRequest
from memedit.worker import Worker
from tests.tiny import INNER, save_tiny

LAYER = 1
CONTEXTS = ("{}", "Therefore I think. {}", "Because the tower stands in Germany, it is. {}")
REQUESTS = [
    EditRequest(
        case_id=str(number),
        subject=subject,
        prompt="The {} is located in",
        target_new="Rome",
        target_true="Paris",
        neighbourhood=(Neighbour(prompt="Toyota produces cars in", target="Japan"),),
    )
    for number, subject in enumerate(("Eiffel Tower", "Microsoft", "Steve Jobs", "Big Ben"))
]


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # stored [out, in], and [in, out]
def test_an_update_is_rounded_as_it_will_be_stored(tmp_path: Path, name: str) -> None:
    worker = Worker(ModelSpec(files=LocalFiles(save_tiny(tmp_path, name, dtype=torch.bfloat16))))
    arch, model = worker.loaded.arch, worker.loaded.model
    weight = arch.rewrite_module(model, LAYER).weight
    assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float32
    before_OI = arch.oriented(weight.detach().clone())
    delta_OI = torch.randn(before_OI.shape, generator=torch.Generator().manual_seed(0)).double()
    exact_OI = before_OI.double() + delta_OI
    list(worker.apply(Update(layer=LAYER, left_NO=delta_OI.T, right_NI=None), torch.bfloat16))
    after_OI = arch.oriented(weight.detach())
    assert torch.equal(after_OI, exact_OI.bfloat16().float())
    assert not torch.equal(after_OI, exact_OI.float())


def test_a_sum_beyond_the_stored_dtype_is_named(tmp_path: Path) -> None:
    worker = Worker(ModelSpec(files=LocalFiles(save_tiny(tmp_path))))
    shape = worker.loaded.arch.rewrite_module(worker.loaded.model, LAYER).weight.shape
    delta_OI = torch.full(tuple(shape), 1e5, dtype=torch.float64)  # type: ignore[arg-type]
    with pytest.raises(NumericalError, match=r"layer 1 .*float16"):
        list(worker.apply(Update(layer=LAYER, left_NO=delta_OI.T, right_NI=None), torch.float16))


# --- A device without room for a whole batch ----------------------------------------------------


@pytest.fixture
def small_device(worker: Worker) -> Iterator[list[int]]:
    """The model runs out of memory when it is given more than `LIMIT` positions; their numbers."""
    seen: list[int] = []

    def refuse(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden_BTO = named.get("hidden_states", arguments[0] if arguments else None)
        assert isinstance(hidden_BTO, torch.Tensor)
        seen.append(hidden_BTO.shape[0] * hidden_BTO.shape[1])
        if seen[-1] > LIMIT:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    blocks = worker.loaded.arch.blocks(worker.loaded.model)
    hooks = [block.register_forward_pre_hook(refuse, with_kwargs=True) for block in blocks]
    yield seen
    for hook in hooks:
        hook.remove()


LIMIT = 160


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(ModelSpec(files=LocalFiles(save_tiny(tmp_path, bos=True))))


def test_work_is_halved_until_it_fits(
    worker: Worker, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    encoded = [encode_request(worker.loaded.tokenizer, r, CONTEXTS) for r in REQUESTS]
    settings = TargetSettings(steps=4, lr=0.2, tokens_per_batch=2000)
    windows = [[5 + i, *range(6, 15)] for i in range(24)]
    judgement = EvaluationSettings()

    def work() -> tuple[Any, ...]:
        list(worker.load(ModelSpec(files=LocalFiles(tmp_path))))
        targets = {t.case_id: t.z_O for t in worker.targets(encoded, LAYER, settings)}
        ((unit, tokens, _),) = worker.count(3, windows, (LAYER,), True)
        (held,) = worker.held("moments")
        moment = replace(held.facts[LAYER], sum_II=next(worker.rows("moments", LAYER, 0, INNER))[1])
        list(worker.forget("moments"))
        (keys,) = worker.keys(0, encoded, LAYER, LAYER)
        facts = list(worker.score(REQUESTS, judgement))
        return targets, (unit, tokens, held.units), moment, keys, facts

    targets, counted, moment, keys, facts = work()
    worker.load = lambda spec: iter([None])  # type: ignore[method-assign]  # the hooks stay
    seen: list[int] = request.getfixturevalue("small_device")
    again = work()
    assert max(seen) > LIMIT and seen.count(max(seen)) < 10  # what did not fit is remembered
    assert again[0].keys() == targets.keys()
    for case_id, z_O in targets.items():
        torch.testing.assert_close(again[0][case_id], z_O, rtol=1e-4, atol=1e-5)
    assert again[1] == counted == (3, 240, (3,))
    assert again[2].tokens == moment.tokens
    torch.testing.assert_close(again[2].sum_II, moment.sum_II, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again[3].keys_NI, keys.keys_NI, rtol=1e-4, atol=1e-5)
    assert [fact.case_id for fact in again[4]] == [fact.case_id for fact in facts]
    assert [fact.efficacy for fact in again[4]] == [fact.efficacy for fact in facts]


def test_fewer_facts_are_traced_at_once_until_their_runs_fit(
    worker: Worker, request: pytest.FixtureRequest
) -> None:
    facts = [
        TraceRequest(
            case_id=str(first),
            ids=tuple(range(first, first + 20)),
            subject_first=15,
            subject_last=16,
            target_id=7,
        )
        for first in (5, 30, 60, 90)
    ]
    settings = TraceSettings(samples=2, window=2, tokens_per_batch=100)
    expected = list(worker.trace(facts, settings, 0.2))
    seen: list[int] = request.getfixturevalue("small_device")
    traces = list(worker.trace(facts, settings, 0.2))
    assert seen[0] == 4 * 3 * 20 > LIMIT and 2 * 3 * 20 in seen
    assert [trace.case_id for trace in traces] == [fact.case_id for fact in facts]
    for found, trace in zip(traces, expected, strict=True):
        for kind in KINDS:
            torch.testing.assert_close(
                found.effects_LT[kind], trace.effects_LT[kind], atol=1e-6, rtol=1e-4
            )


def test_what_does_not_fit_alone_is_an_error(worker: Worker, small_device: list[int]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(worker.count(0, [list(range(5, 5 + LIMIT + 1))], (LAYER,), True))
    encoded = [encode_request(worker.loaded.tokenizer, r, ("{} " * 30 + "{}",)) for r in REQUESTS]
    with pytest.raises(torch.OutOfMemoryError):
        list(worker.targets(encoded, LAYER, TargetSettings(steps=4)))


def test_rows_and_facts_are_sent_without_the_rest(worker: Worker) -> None:
    list(worker.count(0, [[5, 6, 7, 8]], (LAYER,), True))
    (held,) = worker.held("moments")
    ((_, rows),) = worker.rows("moments", LAYER, 0, 2)
    assert rows is not None and rows.shape == (2, INNER)
    assert len(pickle.dumps(rows)) < 2 * INNER * 8 + 2000
    assert held.facts[LAYER].sum_II.shape == (0, INNER)
    assert held.facts[LAYER].sum_II.untyped_storage().nbytes() == 0
