"""Counting that is interrupted goes on where it was, and every window counts once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.artifacts import Artifacts
from cluster.kept_moments import KeptMoments, windows_digest
from memedit import collect
from memedit.collect import collect_moments
from memedit.config import MomentSettings
from memedit.executor import InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.moments import SecondMoment
from memedit.progress import Silent
from memedit.worker import Worker
from tests.tiny import VOCAB, save_tiny

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InlineExecutor]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    with InlineExecutor(ModelSpec(files=LocalFiles(folder))) as made:
        yield made


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "TOKENS_PER_COUNT", 64)
    monkeypatch.setattr(collect._Collection, "_round", lambda self: 3)
    monkeypatch.setattr(collect, "KEEP_S", 0.0)
    monkeypatch.setattr(collect, "KEEP_SHARE", math.inf)


@pytest.fixture
def windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (32,), generator=generator).tolist() for _ in range(40)]


def counted(executor: Any, windows: Any, kept: Any = None) -> dict[int, SecondMoment]:
    found = collect_moments(
        executor,
        windows,
        layers=LAYERS,
        settings=MomentSettings(),
        progress=Silent(),
        kept=kept,
    )
    return {moment.layer: moment for moment in found}


class Killed(BaseException):
    """Stands for what nobody can catch."""


@pytest.mark.parametrize("at", [2, 7, 13, 19])
def test_a_killed_collection_goes_on(
    executor: InlineExecutor,
    windows: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    whole = counted(executor, windows)
    kept = KeptMoments(Artifacts(tmp_path), windows_digest(windows))
    count, units = Worker.count, list[int]()

    def counting(worker: Worker, unit: int, *rest: Any) -> Iterator[Any]:
        if len(units) == at:
            raise Killed
        units.append(unit)
        yield from count(worker, unit, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "count", counting)
        with pytest.raises(Killed):
            counted(executor, windows, kept)
        executor.broadcast("forget", "moments")  # it went with its process
        before, _ = kept.load()
        assert before == frozenset(range(at // 3 * 3))
        at, done = -1, list(units)
        units.clear()
        moments = counted(executor, windows, kept)
    assert sorted(units) == sorted(set(range(20)) - before)
    assert len(done) - len(before) <= 3
    for layer in LAYERS:
        assert moments[layer].tokens == whole[layer].tokens == 40 * 32
        assert moments[layer].spread.batches == whole[layer].spread.batches
        assert moments[layer].trace_0 == pytest.approx(whole[layer].trace_0, rel=1e-12)
        difference = (moments[layer].sum_II - whole[layer].sum_II).norm()
        assert difference <= 1e-12 * whole[layer].sum_II.norm()
    assert kept.load() == (frozenset(), {})  # nothing of it is needed any more
    assert not list(tmp_path.rglob("*.safetensors"))


def test_half_a_save_does_not_count(
    executor: InlineExecutor, windows: list[list[int]], tmp_path: Path
) -> None:
    kept = KeptMoments(Artifacts(tmp_path), "digest")
    moments = counted(executor, windows)

    def half() -> Iterator[SecondMoment]:
        yield moments[1]
        raise Killed

    kept.save([0, 1], moments.values())
    with pytest.raises(Killed):
        kept.save([0, 1, 2], half())
    units, found = kept.load()
    assert units == {0, 1} and torch.equal(found[2].sum_II, moments[2].sum_II)
    kept.save([0, 1, 2], moments.values())
    assert kept.load()[0] == {0, 1, 2}
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(LAYERS)
    next(iter(tmp_path.rglob("*.safetensors"))).write_bytes(b"damaged")
    assert kept.load() == (frozenset(), {})


def test_other_windows_are_another_collection(windows: list[list[int]]) -> None:
    assert windows_digest(windows) == windows_digest([list(w) for w in windows])
    assert windows_digest(windows) != windows_digest(windows[1:] + windows[:1])
    assert windows_digest([[1, 2], [3]]) != windows_digest([[1], [2, 3]])


def test_a_collection_belongs_to_one_run(tmp_path: Path) -> None:
    first, second = (KeptMoments(Artifacts(tmp_path), "digest") for _ in range(2))
    with first.held() as mine:
        assert mine is first
        with second.held() as theirs:
            assert theirs is None
    with second.held() as theirs:
        assert theirs is second
    assert not list(tmp_path.rglob("*.lock"))
