"""`memedit edit --format delta`, then `memedit apply`: byte for byte the full checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memedit.delta import DELTA_NAME, load_delta
from memedit.files import LocalFiles
from memedit.manifest import MANIFEST_NAME, read_manifest
from memedit.verify import verify
from tests.s3.objects import Objects
from tests.s3.server import SeaweedServer
from tests.tiny import HIDDEN, INNER
from tests.workflows.made_deltas import Made, make, published
from tests.workflows.runs import (
    FACTS,
    contents,
    memedit,
    shards,
    without_plots,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llama"), "llama", FACTS)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("gpt2"), "gpt2", FACTS)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """More facts than a weight has rows or columns."""
    rows = [
        {"subject": f"{name} {i}", "prompt": "{} is located in", "target_new": place}
        for i in range(INNER // 2 + 4)
        for name, place in (("Tower", "Rome"), ("House", "Paris"))
    ]
    return make(tmp_path_factory.mktemp("dense"), "llama", rows)


KINDS = [
    "llama",
    pytest.param("gpt2", marks=pytest.mark.slow),
    pytest.param("dense", marks=pytest.mark.slow),
]


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Made:
    found: Made = request.getfixturevalue(request.param)
    return found


def test_the_same_bytes_as_full(made: Made, tmp_path: Path) -> None:
    ran = made.apply(tmp_path / "out")
    assert ran.code == 0, ran.stderr
    assert published(tmp_path / "out") == published(made.full)
    assert shards(tmp_path / "out") != shards(made.base)
    mine, full = read_manifest(tmp_path / "out"), read_manifest(made.full)
    for part in ("tensors", "layers", "facts", "model", "settings", "metrics", "format", "moments"):
        assert getattr(mine, part) == getattr(full, part), part
    assert mine.tensors.keys() and mine.format == "full"
    assert mine.created_at > full.created_at  # a version of its own: gc goes by this
    assert mine.run_id not in (full.run_id, read_manifest(made.delta).run_id)
    assert memedit("verify", tmp_path / "out", "--base", made.base, "--json").result["ok"]
    assert ran.result["tensors"] == 2 and "differs in last bits" not in ran.stderr


def test_what_a_delta_is(made: Made) -> None:
    manifest = read_manifest(made.delta)
    assert manifest.format == made.results["delta"]["format"] == "delta"
    files = [DELTA_NAME, "facts.jsonl", "facts.parquet", "report.html"]
    assert sorted(manifest.files) == files
    assert sorted(contents(made.delta)) == sorted([*files, MANIFEST_NAME])
    updates = load_delta(made.delta / DELTA_NAME)
    many = manifest.facts.count > HIDDEN
    assert [update.right_NI is None for update in updates.values()] == [many, many]
    # What was judged is the base with the update, so it is what `full` is.
    assert made.results["delta"]["metrics"] == made.results["full"]["metrics"]
    assert memedit("verify", made.delta, "--json").result["ok"]
    assert verify(LocalFiles(made.delta), quick=True) == []


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("s3", "s3"), ("s3", "folder"), ("folder", "s3")])
def test_from_and_to_s3(
    llama: Made, s3: str, s3_server: SeaweedServer, tmp_path: Path, source: str, target: str
) -> None:
    objects = Objects(s3_server)
    base, delta = llama.base, llama.delta
    if source == "s3":
        base = objects.put_folder(llama.base, f"{s3}/base")
        delta = objects.put_folder(llama.delta, f"{s3}/delta")
    out = tmp_path / "out" if target == "folder" else f"{s3}/out"
    ran = llama.apply(out, "--model", base, delta=delta)
    assert ran.result["out"] == str(out), ran.stderr
    if target == "s3":
        objects.fetch(str(out), tmp_path / "out")
        assert memedit("verify", out, "--base", base, "--json").result["ok"]
    assert published(tmp_path / "out") == published(llama.full)
    assert read_manifest(tmp_path / "out").tensors == read_manifest(llama.full).tensors


@pytest.mark.slow
def test_a_delta_made_on_s3_and_applied_into_a_registry(
    llama: Made, s3: str, s3_server: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plots(monkeypatch)
    objects = Objects(s3_server)
    base = objects.put_folder(llama.base, f"{s3}/base")
    ran = llama.edit(f"{s3}/delta", "--format", "delta", model=base)
    assert ran.code == 0, ran.stderr
    assert objects.get(f"{s3}/delta/{DELTA_NAME}") == (llama.delta / DELTA_NAME).read_bytes()
    # The base that the delta names is the one at s3://.
    ran = memedit(
        *("apply", f"{s3}/delta", "--registry", f"{s3}/reg", "--run-id", "applied"),
        *("--cache", llama.cache, "--json"),
    )
    assert ran.result["model"] == base, ran.stderr
    assert json.loads(objects.get(f"{s3}/reg/CURRENT"))["version"] == "applied"
    objects.fetch(f"{s3}/reg/versions/applied", tmp_path / "out")
    assert published(tmp_path / "out") == published(llama.full)
