"""Rounds of units over workers, and the bytes between them, by hand."""

from __future__ import annotations

import pytest

from memedit.cost import ModelShape
from workflows.schedule import Cut, moved, schedule

SHAPE = ModelShape(
    blocks=4,
    hidden=16,
    inner=40,
    vocab=100,
    block_weights=2000,
    rewrite_weights=640,
    head_weights=1600,
    parameters=10_000,
    attention_width=16,
    state_width=32,
)


def test_rounds_are_counted_and_the_driver_works_alone() -> None:
    stages = {"targets": {"seconds": 100.0}, "keys": {"seconds": 30.0}, "solve": {"seconds": 5.0}}
    cut = {"targets": Cut(10), "keys": Cut(3, passes=5)}
    told = schedule(stages, cut, workers=4)
    # 3 rounds of 10 s; in each of 5 passes one round of 2 s; 5 s alone.
    assert told["seconds"] == 30 + 10 + 5
    assert told["targets"] == "30 s: 10 units over 4 workers: 3 rounds of 10 s"
    assert told["keys"].endswith("1 round of 2 s, 5 times one after the other")
    assert told["workers_busy"] == pytest.approx(130 / (4 * 45), rel=0.01)


def test_one_worker_takes_as_long_as_the_work() -> None:
    stages = {"targets": {"seconds": 100.0}, "solve": {"seconds": 5.0}}
    assert schedule(stages, {"targets": Cut(7)}, workers=1)["seconds"] == 105
    # More workers than units help nobody.
    many = [schedule(stages, {"targets": Cut(7)}, workers=n)["seconds"] for n in (7, 700)]
    assert many[0] == many[1] == pytest.approx(100 / 7 + 5, rel=0.01)


@pytest.mark.parametrize(
    ("facts", "counted", "sweeps", "repairs"),
    [(3, 1, 1, 0), (100_000, 1, 1, 0), (3, 2, 2, 0), (100_000, 0, 2, 3)],
)
def test_what_moves(facts: int, counted: int, sweeps: int, repairs: int) -> None:
    i, o = SHAPE.inner, SHAPE.hidden
    told = moved(
        SHAPE,
        layers=(1, 2),
        facts=facts,
        workers=3,
        model_bytes=1000,
        moments_per_layer=counted,
        sweeps=sweeps,
        repairs=repairs,
    )
    moments, model, z = counted * 2 * 3 * i * i * 8, (2 + repairs) * 3 * 1000, facts * o * 4
    sought = (1 + repairs) * z
    solved = 2 * sweeps * (1 + repairs)
    if facts == 3:  # factors: the keys and residuals of the facts
        keys, residuals, update = solved * facts * (i + o) * 4, 0, facts * (i + o)
    else:  # sums, whatever the number of facts
        keys, residuals, update = solved * 3 * i * (i + o) * 8, solved * z, i * o
    assert told["bytes"] == moments + model + sought + keys + residuals + solved * 3 * update * 8
    assert ("by rows" in told["keys"]) == (facts > 3)
