"""`memedit stats` on a tiny model, and edits that use what it made."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.artifacts import Artifacts
from memedit.moments import SecondMoment, check_moment, load_moment
from memedit.worker import Worker
from tests.tiny import LAYERS, save_tiny
from tests.workflows.runs import Ran, edit, shards, stats, without_plots, write_rows
from workflows.moments import StoredMoments, moments_name

SENTENCES = [
    f"In the year {1800 + i} the city of Paris was visited by {i} people from Rome and London."
    for i in range(200)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in SENTENCES])


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    without_plots(monkeypatch)


def test_what_it_prints_and_leaves(base: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats"
    ran = stats(base, out, tmp_path / "cache", "--corpus", corpus)
    result = ran.result
    assert (result["out"], result["model"], result["corpus"]) == (str(out), str(base), str(corpus))
    assert list(result["layers"]) == ["1", "2"]
    assert {p.name for p in out.iterdir()} == {
        *("stats.json", "layer-1.safetensors", "layer-2.safetensors")
    }
    told = json.loads((out / "stats.json").read_text())
    assert told["layers"] == result["layers"]
    for layer in (1, 2):
        path = out / moments_name(layer)
        moment, metadata = load_moment(path), check_moment(path)
        assert moment.layer == layer
        assert moment.tokens == result["layers"][str(layer)]["tokens"] >= 1024
        assert moment.trace == pytest.approx(result["layers"][str(layer)]["trace"])
        assert metadata["digest"] == told["moments"][str(layer)]
        assert bool((torch.linalg.eigvalsh(moment.value_II) > -1e-9).all())
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "corpus.jsonl", "stats"}


def test_numbers_that_json_lacks_are_null(base: Path, tmp_path: Path) -> None:
    """The error of a single batch of windows cannot be estimated."""
    out = tmp_path / "stats"
    result = stats(base, out, tmp_path / "cache").result
    assert result["layers"]["1"]["error"] is None

    def no_constant(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    json.loads((out / "stats.json").read_text(), parse_constant=no_constant)


def test_only_the_lower_blocks_are_loaded(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, count = set(), Worker.count

    def looking(worker: Worker, *arguments: Any) -> Iterator[Any]:
        blocks.add(len(worker.loaded.arch.blocks(worker.loaded.model)))
        yield from count(worker, *arguments)

    monkeypatch.setattr(Worker, "count", looking)
    ran = stats(base, tmp_path / "stats", tmp_path / "cache", "--corpus", corpus)
    assert ran.code == 0
    assert blocks == {3} and LAYERS == 4


@pytest.mark.parametrize("kind", ["corpus", "self"])
def test_an_edit_with_them_is_the_edit_that_collects_its_own(
    base: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    """The same windows are counted, though an edit holds text out for the perplexity."""
    facts = write_rows(tmp_path / "facts.jsonl")
    text = ["--corpus", corpus if kind == "corpus" else "self"]
    folder = tmp_path / "stats"
    made = stats(base, folder, tmp_path / "c1", *text)
    assert made.code == 0
    collected = edit(base, facts, tmp_path / "collected", tmp_path / "c2", *text)
    given = edit(base, facts, tmp_path / "given", tmp_path / "c3", *text, "--stats", folder)
    assert shards(tmp_path / "collected") == shards(tmp_path / "given") != shards(base)
    assert given.result["metrics"] == collected.result["metrics"]
    if kind == "corpus":  # else text is sampled for the perplexity
        assert given.result["timings_s"]["stats"] == 0


def test_which_text_is_counted_does_not_depend_on_what_is_measured(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    """Kept second moments are found by settings that `evaluation` is no part of."""
    facts = write_rows(tmp_path / "facts.jsonl")
    for heldout, cache in ((0, "c1"), (512, "c2")):
        ran = edit(
            *(base, facts, tmp_path / f"out-{heldout}", tmp_path / cache, "--corpus", corpus),
            *("--set", f"evaluation.heldout_tokens={heldout}", "--set", "moments.tokens=256"),
        )
        assert ran.code == 0, ran.stderr
    assert shards(tmp_path / "out-0") == shards(tmp_path / "out-512")


@pytest.mark.parametrize("tolerance", [0, 1e-9])
def test_only_layers_that_were_not_kept_are_counted(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    """Unless all stop by their common error."""
    counted: list[tuple[int, ...]] = []
    count = Worker.count

    def counting(worker: Worker, unit: int, windows: Any, layers: Any, *rest: Any) -> Iterator[Any]:
        counted.append(tuple(layers))
        yield from count(worker, unit, windows, layers, *rest)

    monkeypatch.setattr(Worker, "count", counting)
    more = ("--corpus", corpus, "--set", f"moments.tolerance={tolerance}")
    assert stats(base, tmp_path / "two", tmp_path / "c1", *more).code == 0
    assert set(counted) == {(1, 2)}
    counted.clear()
    assert stats(base, tmp_path / "three", tmp_path / "c1", *more, layers="1-3").code == 0
    assert set(counted) == {(1, 2, 3) if tolerance else (3,)}
    assert stats(base, tmp_path / "fresh", tmp_path / "c2", *more, layers="1-3").code == 0
    for layer in (1, 2, 3):
        kept, fresh = ((tmp_path / n / moments_name(layer)) for n in ("three", "fresh"))
        assert torch.equal(load_moment(kept).sum_II, load_moment(fresh).sum_II)


def test_stats_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    facts = write_rows(tmp_path / "facts.jsonl")
    other = save_tiny(tmp_path / "other", seed=1)
    folder = tmp_path / "stats"
    assert stats(other, folder, tmp_path / "cache").code == 0
    ran = edit(base, facts, tmp_path / "out", tmp_path / "cache", "--stats", folder)
    assert ran.code == 2
    assert "another model" in ran.error["message"] and str(other) in ran.error["message"]
    assert not (tmp_path / "out").exists()


def test_stats_that_lack_a_layer_are_refused(base: Path, tmp_path: Path) -> None:
    facts = write_rows(tmp_path / "facts.jsonl")
    folder = tmp_path / "stats"
    assert stats(base, folder, tmp_path / "cache", layers="2").code == 0
    ran = edit(base, facts, tmp_path / "out", tmp_path / "cache", "--stats", folder)
    assert (ran.code, ran.error["field"]) == (2, "layers")
    assert "layers 1" in ran.error["message"]


@pytest.mark.parametrize("damage", ["absent", "no json", "truncated", "lost", "mixed up"])
def test_damaged_stats_are_refused(base: Path, tmp_path: Path, damage: str) -> None:
    facts = write_rows(tmp_path / "facts.jsonl")
    folder, cache = tmp_path / "stats", tmp_path / "cache"
    assert stats(base, folder, cache).code == 0
    layer_1, layer_2 = (folder / moments_name(layer) for layer in (1, 2))
    if damage == "absent":
        (folder / "stats.json").unlink()
    elif damage == "no json":
        (folder / "stats.json").write_text("{")
    elif damage == "truncated":
        layer_1.write_bytes(layer_1.read_bytes()[:1000])
    elif damage == "lost":
        layer_1.unlink()
    else:
        layer_2.write_bytes(layer_1.read_bytes())
    ran = edit(base, facts, tmp_path / "out", cache, "--stats", folder)
    assert ran.code == 2, ran.stderr
    assert str(folder) in ran.error["source"]
    assert not (tmp_path / "out").exists()


class Alive:
    """The second moments that somebody holds: how many there were, at each that was used."""

    def __init__(self) -> None:
        self._sums: list[weakref.ref[torch.Tensor]] = []
        self.at_use: list[int] = []

    def made(self, moment: SecondMoment) -> None:
        self._sums.append(weakref.ref(moment.sum_II))

    def used(self) -> None:
        sums = [sum_II for ref in self._sums if (sum_II := ref()) is not None]
        self.at_use.append(len({id(sum_II) for sum_II in sums}))


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    alive, init, get = Alive(), SecondMoment.__init__, StoredMoments.__getitem__

    def noted(moment: SecondMoment, **values: Any) -> None:
        init(moment, **values)
        alive.made(moment)

    def used(moments: StoredMoments, layer: int) -> SecondMoment:
        moment = get(moments, layer)
        alive.used()
        return moment

    monkeypatch.setattr(SecondMoment, "__init__", noted)
    monkeypatch.setattr(StoredMoments, "__getitem__", used)
    return alive


@pytest.mark.parametrize("origin", ["collected", "kept", "given"])
def test_an_edit_holds_one_second_moment_at_a_time(
    base: Path, tmp_path: Path, alive: Alive, origin: str
) -> None:
    facts, cache, folder = write_rows(tmp_path / "facts.jsonl"), tmp_path / "cache", tmp_path / "s"
    more: tuple[object, ...] = ("--layers", "0-3", "--set", "targets.steps=2")
    if origin != "collected":
        assert stats(base, folder, cache, layers="0-3").code == 0
    if origin == "given":
        more, cache = (*more, "--stats", folder), tmp_path / "other"
    alive.at_use.clear()
    ran = edit(base, facts, tmp_path / "out", cache, *more)
    assert ran.code == 0, ran.stderr
    assert alive.at_use == [1] * LAYERS


@pytest.mark.parametrize("origin", ["collected", "kept"])
def test_stats_hold_few_second_moments_at_a_time(
    base: Path, tmp_path: Path, alive: Alive, origin: str
) -> None:
    """The one that is read, and at most the one that was saved before it."""
    if origin == "kept":
        assert stats(base, tmp_path / "first", tmp_path / "cache", layers="0-3").code == 0
    alive.at_use.clear()
    ran = stats(base, tmp_path / "stats", tmp_path / "cache", layers="0-3")
    assert ran.code == 0, ran.stderr
    assert len(alive.at_use) == LAYERS
    assert max(alive.at_use) <= 2


@pytest.mark.parametrize(("command", "damage"), [("edit", "removed"), ("stats", "truncated")])
def test_a_second_moment_that_goes_while_it_is_needed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, damage: str
) -> None:
    facts, cache, out = write_rows(tmp_path / "facts.jsonl"), tmp_path / "cache", tmp_path / "out"
    keep = Artifacts.keep_moment

    def keep_for_a_moment(artifacts: Artifacts, digest: str, moment: SecondMoment) -> None:
        keep(artifacts, digest, moment)
        for path in (cache / "moments").rglob("*.safetensors"):
            if damage == "removed":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:1000])

    def run() -> Ran:
        if command == "stats":
            return stats(base, out, cache)
        return edit(base, facts, out, cache, "--set", "targets.steps=2")

    with monkeypatch.context() as patch:
        patch.setattr(Artifacts, "keep_moment", keep_for_a_moment)
        ran = run()
    assert (ran.code, ran.error["kind"]) == (1, "MemeditError")
    told = ran.error["message"]
    assert "second moment of layer 1" in told and str(cache) in told and "again" in told
    assert "Traceback" not in ran.stderr
    assert not out.exists()
    assert run().code == 0
