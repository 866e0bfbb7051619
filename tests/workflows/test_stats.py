"""`memedit stats` on a tiny model, and edits that use what it made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memedit.moments import load_moment
from memedit.worker import Worker
from tests.tiny import LAYERS, save_tiny
from tests.workflows.runs import edit, shards, stats, without_plots, write_rows
from workflows.session import moments_path

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
        moment, metadata = load_moment(moments_path(out, layer))
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
    layer_1, layer_2 = moments_path(folder, 1), moments_path(folder, 2)
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
