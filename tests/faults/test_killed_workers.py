"""Workers that are killed at random moments of every stage: the update is that of a quiet run.

What kills them is here, wrapped around an executor; the product knows nothing of it.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.dispatch import Rules
from cluster.executors import open_executor
from cluster.ray_crew import Slot
from cluster.ray_executor import RayExecutor
from memedit import stages
from memedit.executor import Executor, InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec, load_model
from memedit.moments import SecondMoment
from memedit.outcome import Evaluation
from memedit.progress import Silent
from memedit.prompts import EncodedRequest, encode_request
from memedit.targets import Target
from tests.integration.test_ray_equals_inline import (
    CONTEXTS,
    JUDGEMENT,
    LAYERS,
    REQUESTS,
    TARGETS,
    moments_of,
    small_units,
    solved_by,
    windows,
)
from tests.tiny import save_tiny

pytestmark = [pytest.mark.ray, pytest.mark.slow]
__all__ = ["small_units"]  # its fixture makes several units of few facts


SUMS = ("count", "sum_keys")
COPIED = ("targets", "score")
AT_A_TIME = 2
"""Units that a worker has at most: one in hand and one ahead."""


class Killing(Executor):
    """An executor whose workers are killed while it works: one in each call, some before it."""

    def __init__(self, executor: Any, seed: int) -> None:
        self.executor, self.chance = executor, random.Random(seed)
        self.n_workers = executor.n_workers
        self.kills: Counter[str] = Counter()
        self.killed: set[int] = set()
        self.largest: Counter[str] = Counter()
        """Facts in the largest unit of z vectors and of judgements."""

    def kill(self, when: str) -> None:
        alive = {seat.pid for seat in self.executor.seats} - self.killed
        if alive:
            process = self.chance.choice(sorted(alive))
            os.kill(process, signal.SIGKILL)
            self.killed.add(process)
            self.kills[when] += 1

    def map(self, method: str, units: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        if method in COPIED:
            self.largest[method] = max(len(unit[0]) for unit in units)
        # Not after the last item, when nobody has anything in hand.
        last = len(units) - 1 if self.kills[method] < 2 else 0
        at = self.chance.randrange(last) if last > 0 else -1
        for number, found in enumerate(self.executor.map(method, units, **options)):
            if number == at:
                self.kill(method)
            yield found

    def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        # Each of these once: a run whose workers die each time that they are asked never ends.
        when = {"held": 1.0, "rows": 0.5, "apply": 0.5}.get(method, 0.0)
        if not self.kills[f"before {method}"] and self.chance.random() < when:
            self.kill(f"before {method}")
        found: list[Any] = self.executor.broadcast(method, *arguments)
        return found

    def close(self) -> None:
        self.executor.close()


class Given:
    """What was given to which process, and how much of what a process had was given out again."""

    def __init__(self) -> None:
        self.holders: dict[tuple[str, Any], int] = {}
        self.again: Counter[tuple[str, int]] = Counter()
        self.layer = self.sweep = 0

    def note(self, method: str, unit: tuple[Any, ...], process: int) -> None:
        for piece in self._pieces(method, unit):
            holder = self.holders.get((method, piece))
            if holder is not None:
                self.again[method, holder] += 1
            self.holders[method, piece] = process

    def _pieces(self, method: str, unit: tuple[Any, ...]) -> list[Any]:
        """What a unit consists of, by names that are the same when it is given out again."""
        if method in COPIED:
            return [getattr(fact, "request", fact).case_id for fact in unit[0]]
        if method not in ("keys", "sum_keys"):
            return [unit[0]]
        layer = unit[-2]
        self.sweep += layer < self.layer
        self.layer = layer
        return [(unit[0], layer, self.sweep)]

    def check(self, killing: Killing) -> None:
        """Only what a killed worker had not finished is done again, and all that it had summed."""
        for (method, process), pieces in self.again.items():
            units = pieces / killing.largest.get(method, 1)
            if process not in killing.killed:  # a straggler, at the end
                assert method in COPIED and units <= AT_A_TIME, (method, pieces)
            elif method not in SUMS:
                assert units <= AT_A_TIME + (method in COPIED), (method, pieces)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), bos=True)


@pytest.fixture(scope="module")
def encoded(folder: Path) -> list[EncodedRequest]:
    tokenizer = load_model(ModelSpec(files=LocalFiles(folder))).tokenizer
    return [encode_request(tokenizer, request, CONTEXTS) for request in REQUESTS]


def run(
    executor: Executor, folder: Path, encoded: list[EncodedRequest]
) -> tuple[dict[int, SecondMoment], list[Target], list[stages.SolvedLayer], Evaluation]:
    """Every stage of an edit, one after the other."""
    arch = load_model(ModelSpec(files=LocalFiles(folder))).arch
    executor.broadcast("load", ModelSpec(files=LocalFiles(folder)))
    moments = moments_of(executor)
    kept: list[str] = []
    targets, quarantined = stages.find_targets(
        executor,
        encoded,
        layer=LAYERS[-1],
        settings=TARGETS,
        known={},
        keep=lambda target: kept.append(target.case_id),
        progress=Silent(),
    )
    assert not quarantined
    assert sorted(kept) == sorted(r.case_id for r in REQUESTS)  # each once
    solved = solved_by(executor, encoded, targets, moments, arch)
    evaluation, _ = stages.judge(
        executor,
        REQUESTS,
        heldout=[window[:32] for window in windows()[:2]],
        reference=None,
        settings=JUDGEMENT,
        progress=Silent(),
    )
    return moments, targets, solved, evaluation


@pytest.fixture(scope="module")
def quiet(
    folder: Path, encoded: list[EncodedRequest]
) -> tuple[dict[int, SecondMoment], list[Target], list[stages.SolvedLayer], Evaluation]:
    threads = torch.get_num_threads()
    try:
        with InlineExecutor(ModelSpec(files=LocalFiles(folder)), threads=1) as executor:
            return run(executor, folder, encoded)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def on_ray(folder: Path) -> Iterator[Any]:
    rules = Rules(attempts=5, wait_s=0.1, stall_s=120.0)
    with open_executor(
        "ray", ModelSpec(files=LocalFiles(folder)), workers=2, threads=1, rules=rules
    ) as executor:
        yield executor


@pytest.mark.parametrize("seed", range(2))
def test_workers_are_killed_in_every_stage(
    on_ray: Any,
    folder: Path,
    encoded: list[EncodedRequest],
    quiet: Any,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summed = seed != 1
    monkeypatch.setattr(stages, "factors_are_cheaper", lambda *shape: not summed)
    # More of them than a worker has in hand.
    for name in ("FACTS_PER_KEY_UNIT", "FACTS_PER_SCORE_UNIT"):
        monkeypatch.setattr(stages, name, 2)
    given, call = Given(), RayExecutor._call

    def noted(self: RayExecutor, slot: Slot, method: str, unit: tuple[Any, ...]) -> Any:
        assert slot.seat is not None
        given.note(method, unit, slot.seat.pid)
        return call(self, slot, method, unit)

    monkeypatch.setattr(RayExecutor, "_call", noted)
    killing = Killing(on_ray, seed)
    moments, targets, solved, evaluation = run(killing, folder, encoded)
    keys = "sum_keys" if summed else "keys"
    assert {"count", "targets", keys, "score", "damage"} <= killing.kills.keys()
    assert killing.kills.total() >= 7

    true_moments, true_targets, true_solved, true_evaluation = quiet
    for layer in LAYERS:
        one, other = moments[layer], true_moments[layer]
        assert one.tokens == other.tokens and one.spread.batches == other.spread.batches
        assert (one.sum_II - other.sum_II).norm() <= 1e-12 * other.sum_II.norm()
    # A unit whose rest was done elsewhere was batched in another way: last bits of float32.
    for found, true in zip(targets, true_targets, strict=True):
        assert found.case_id == true.case_id
        assert (found.z_O - true.z_O).norm() <= 1e-5 * true.z_O.norm()
    for layer_found, layer_true in zip(solved, true_solved, strict=True):
        found_OI, true_OI = layer_found.update.delta_OI, layer_true.update.delta_OI
        assert (found_OI - true_OI).norm() <= 1e-4 * true_OI.norm()
    assert [fact.case_id for fact in evaluation.facts] == [r.case_id for r in REQUESTS]
    for key, value in true_evaluation.metrics.items():
        assert evaluation.metrics[key] == (
            None if value is None else pytest.approx(value, rel=1e-3)
        )
    assert given.again
    given.check(killing)
    assert len(on_ray.seats) >= 1
