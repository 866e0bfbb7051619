"""What drift is measured on, and that it is none where nothing has moved.

Against KL by hand on a changed model it is measured in `test_evaluate.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memedit.drift import drift_prompts, drift_reference, measure_drift
from memedit.protection import is_for_measuring
from memedit.requests import EditRequest, Neighbour
from tests.tiny import tiny_model

FACT = EditRequest(
    case_id="tower",
    subject="Eiffel Tower",
    prompt="The {} is located in the city of",
    target_new="Rome",
)


def near(*prompts: str) -> tuple[Neighbour, ...]:
    return tuple(Neighbour(prompt=prompt, target="old") for prompt in prompts)


def test_drift_prompts_are_unique_spread_and_not_edited() -> None:
    facts = [
        EditRequest(
            case_id=str(i),
            subject=f"{i}",
            prompt="the number {} is",
            target_new="new",
            neighbourhood=near(
                "shared prompt", f"number {i} a", f"number {i} b", "the number 3 is"
            ),
        )
        for i in range(10)
    ]
    texts = drift_prompts(facts, 1000)
    assert len(texts) == len(set(texts)) and 5 < len(texts) < 16  # about half of 21
    assert "the number 3 is" not in texts
    few = drift_prompts(facts, 4)
    assert len(set(few)) == 4 and set(few) <= set(texts)
    assert [texts.index(text) for text in few] == [i * len(texts) // 4 for i in range(4)]


def test_drift_is_measured_elsewhere_only_without_neighbours() -> None:
    some = replace(FACT, neighbourhood=near(*(f"number {i} is" for i in range(9))))
    none = replace(FACT, neighbourhood=())
    others = ["in Kiel is", "in Ulm is"]
    assert drift_prompts([some], 99, others) == drift_prompts([some], 99) != []
    assert drift_prompts([none], 99, others) == others
    assert drift_prompts([none], 1, others) == others[:1]
    texts = [f"number {i} is" for i in range(9)]
    protectable = replace(none, neighbourhood=near(*(t for t in texts if not is_for_measuring(t))))
    assert protectable.neighbourhood and drift_prompts([protectable], 99, others) == others
    single = replace(none, neighbourhood=near(next(t for t in texts if is_for_measuring(t))))
    assert drift_prompts([single], 99, others) == [single.neighbourhood[0].prompt]


def test_drift_against_a_reference_in_bfloat16_and_back() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    reference = drift_reference(model, None, [(3, 4, 5), (9,)])
    assert reference.logprobs_NV.dtype == torch.float32
    assert measure_drift(model, None, reference) == pytest.approx((0.0, 100.0), abs=1e-6)
