"""Whole commands over object storage, against the same commands over folders.

The server is real. Nothing that is computed depends on where files lie, so all that is published is
the same byte for byte, but for the manifest and the report, which name places and times.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.publication import S3Publication
from memedit.files import LocalFiles
from memedit.manifest import MANIFEST_NAME, Manifest, read_manifest
from memedit.verify import verify
from memedit.worker import Worker
from tests.integration.worlds import Place, World
from tests.workflows.runs import (
    Ran,
    contents,
    memedit,
    quick,
    setting,
    shards,
    stats,
    without_plots,
)
from workflows.corpora import open_corpus

pytestmark = pytest.mark.slow

CORPORA = {
    "Parquet files below a prefix": "text",
    "glob": "text/*.parquet",
    "one file": "more.jsonl",
}
PROMPTS = ("The Eiffel Tower is located in", "Danielle Darrieux speaks")
OWN = {MANIFEST_NAME, "report.html"}
"""What names places and times."""


@dataclass(frozen=True, kw_only=True)
class First:
    """The edit that all others are compared with: from a folder to a folder."""

    out: Path
    cache: Path
    ran: Ran


@pytest.fixture(scope="module")
def first(input_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> First:
    folder = tmp_path_factory.mktemp("edited")
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        ran = Place(root=str(input_folder)).edit(folder / "out", folder / "cache")
    assert ran.code == 0, ran.stderr
    assert shards(folder / "out") != shards(input_folder / "base")
    return First(out=folder / "out", cache=folder / "cache", ran=ran)


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, statistics and z vectors must all come from an earlier run."""
    for name in ("sample", "count", "targets"):
        monkeypatch.setattr(Worker, name, refuse)


def refuse(*arguments: object, **more: object) -> None:
    raise AssertionError("was computed before")


def check_same(mine: Path, expected: Path) -> None:
    """Two published versions of one edit."""
    found, wanted = (
        {name: content for name, content in contents(folder).items() if name not in OWN}
        for folder in (mine, expected)
    )
    assert found == wanted
    a, b = read_manifest(mine), read_manifest(expected)
    assert a.tensors == b.tensors != {}
    for part in ("method", "layers", "facts", "moments", "metrics", "format"):
        assert getattr(a, part) == getattr(b, part), part
    assert a.model.digest == b.model.digest
    assert settings_of(a) == settings_of(b)
    assert a.files.keys() == b.files.keys()
    for name, record in a.files.items():
        other = b.files[name]
        if name not in OWN:
            assert record.size_bytes == other.size_bytes
            assert record.sha256 == other.sha256 or None in (record.sha256, other.sha256)


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """Without the names of places."""
    settings = dict(manifest.settings)
    assert settings.pop("heldout") == settings["corpus"]["name"]
    return settings | {"corpus": settings["corpus"]["digest"]}


# --- The same edit -------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [("s3", "s3"), ("s3", "folder"), ("folder", "s3")])
def test_the_same_from_and_to_everywhere(
    world: World, s3: str, tmp_path: Path, first: First, source: str, target: str
) -> None:
    out = f"{s3}/out" if target == "s3" else str(tmp_path / "out")
    result = world.places[source].edit(out, tmp_path / "cache").result
    assert (result["out"], result["manifest"]) == (out, f"{out}/{MANIFEST_NAME}")
    if target == "s3":
        assert world.objects.get(result["report"]).startswith(b"<html>")
        assert not list(tmp_path.glob("out*"))
        world.objects.fetch(out, tmp_path / "out")
    check_same(tmp_path / "out", first.out)
    # Whoever downloads it has a version like any other.
    assert verify(LocalFiles(tmp_path / "out")) == []
    assert world.objects.uploads() == []


@pytest.mark.usefixtures("nothing_is_computed")
def test_a_copy_elsewhere_shares_what_was_computed(
    world: World, s3: str, tmp_path: Path, first: First
) -> None:
    ran = world.there.edit(f"{s3}/out", first.cache)
    assert ran.code == 0, ran.stderr
    check_same(world.objects.fetch(f"{s3}/out", tmp_path / "out"), first.out)


def test_another_machine_computes_nothing_again(
    world: World, s3: str, tmp_path: Path, first: First, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run has finished lies in object storage; a fresh machine finds it there."""
    work = ("--artifacts", f"{s3}/work")
    assert world.here.edit(tmp_path / "one", tmp_path / "cache-1", *work).code == 0
    for name in ("sample", "count", "targets"):
        monkeypatch.setattr(Worker, name, refuse)
    ran = world.here.edit(tmp_path / "two", tmp_path / "cache-2", *work)
    assert ran.code == 0, ran.stderr
    check_same(tmp_path / "one", first.out)
    check_same(tmp_path / "two", first.out)


@pytest.mark.parametrize("corpus", CORPORA)
def test_the_same_statistics_of_every_corpus(
    world: World, s3: str, tmp_path: Path, corpus: str
) -> None:
    for kind, place in world.places.items():
        out = f"{s3}/out" if kind == "s3" else str(tmp_path / "out")
        spec = place.at(CORPORA[corpus])
        ran = stats(place.at("base"), out, tmp_path / kind, "--corpus", spec)
        assert (ran.result["out"], ran.result["corpus"]) == (out, spec)
    there, here = world.objects.below(f"{s3}/out"), contents(tmp_path / "out")
    assert list(here) == ["layer-1.safetensors", "layer-2.safetensors", "stats.json"]
    a, b = (json.loads(files.pop("stats.json")) for files in (there, here))
    assert there == here
    for value in (a, b):
        del value["model"]["name"], value["corpus"]["name"]
    assert a == b


def test_other_files_are_another_corpus(world: World) -> None:
    """The test above would pass if every corpus had one digest."""
    specs = ("text", "text/a.parquet", "text/[b].parquet", "more.jsonl")
    assert len({open_corpus(world.there.at(spec)).digest for spec in specs}) == len(specs)


def test_stats_are_used(world: World, s3: str, tmp_path: Path) -> None:
    """Counted from S3 to S3 and used from there: as if the edit had counted itself, in a folder."""
    corpus = "--corpus", world.there.at("text")
    ran = stats(world.there.at("base"), f"{s3}/stats", tmp_path / "cache", *corpus)
    assert ran.code == 0, ran.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "count", refuse)
        given = ("--stats", f"{s3}/stats", *corpus)
        used = world.there.edit(f"{s3}/out", tmp_path / "other", *given)
    assert used.code == 0, used.stderr
    ran = world.here.edit(tmp_path / "out", tmp_path / "third", "--corpus", world.here.at("text"))
    assert ran.code == 0, ran.stderr
    check_same(world.objects.fetch(f"{s3}/out", tmp_path / "fetched"), tmp_path / "out")


def test_looking_at_a_model_says_the_same(
    world: World, s3: str, tmp_path: Path, first: First
) -> None:
    """evaluate, generate and plan, on the base and on what was published."""
    ran = world.there.edit(f"{s3}/out", first.cache)
    assert ran.code == 0, ran.stderr
    versions = {"folder": str(first.out), "s3": f"{s3}/out"}
    found: dict[str, Any] = {}
    for kind, place in world.places.items():
        common = ("--cache", tmp_path / f"look-{kind}", "--json")
        table = ("--facts", place.at("facts.jsonl"))
        text = ("--text", place.at("more.jsonl"), "--base", place.at("base"))
        evaluated = memedit("evaluate", "--model", versions[kind], *table, *text, *common).result
        generated = memedit("generate", "--model", versions[kind], *PROMPTS, *common).result
        flags = (*quick(place.at("base"), common[1]), "--matrix-gflops", "100", *table)
        planned = memedit("plan", *flags).result
        assert planned["model"].pop("name") == place.at("base")
        assert planned["facts"].pop("file") == place.at("facts.jsonl")
        found[kind] = (
            evaluated["metrics"],
            evaluated["per_fact"],
            generated["continuations"],
            planned,
        )
    assert found["folder"][0] == found["s3"][0]
    assert found["folder"] == found["s3"]
    # The edited model was looked at, and the base for the drift.
    after = ran.result["metrics"]["after"]
    metrics = found["s3"][0]
    assert metrics["efficacy"] == after["efficacy"] > ran.result["metrics"]["before"]["efficacy"]
    assert metrics["drift_kl"] > 0 and metrics["perplexity"] > 0


# --- What becomes visible ------------------------------------------------------------------------


def test_storage_settings_reach_every_object(world: World, s3: str, first: First) -> None:
    settings = setting("storage.storage_class=STANDARD_IA")
    ran = world.there.edit(f"{s3}/out", first.cache, *settings)
    assert ran.code == 0, ran.stderr
    classes = world.objects.storage_classes(f"{s3}/out")
    assert len(classes) == 15 and set(classes.values()) == {"STANDARD_IA"}
    assert set(world.objects.storage_classes(world.there.root).values()) != {"STANDARD_IA"}


def interrupt(*arguments: object, **more: object) -> None:
    raise KeyboardInterrupt


def _while_weights_are_made(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("workflows.product.write_patched", interrupt)


def _while_judged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Worker, "load", interrupt)


def _before_the_manifest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(S3Publication, "_commit", interrupt)


def test_an_interrupted_run_leaves_nothing(world: World, s3: str, first: First) -> None:
    before = world.objects.all()
    for moment in (_while_weights_are_made, _while_judged, _before_the_manifest):
        with pytest.MonkeyPatch.context() as patch:
            moment(patch)
            ran = world.there.edit(f"{s3}/out", first.cache)
        assert (ran.code, ran.error["kind"]) == (1, "Stopped"), (moment, ran.stderr)
        assert world.objects.all() == before and world.objects.uploads() == [], moment
    assert world.there.edit(f"{s3}/out", first.cache).code == 0


def test_a_gate_that_is_missed_leaves_nothing(world: World, s3: str, first: First) -> None:
    before = world.objects.all()
    ran = world.there.edit(f"{s3}/out", first.cache, "--gate", "efficacy<1")
    assert (ran.code, ran.error["kind"]) == (3, "GateError"), ran.stderr
    assert "not published" in ran.stderr and "efficacy" in ran.stderr
    assert world.objects.all() == before and world.objects.uploads() == []
