"""Published versions in object storage: verified, and in a registry whose CURRENT they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.registry import open_registry
from cluster.store import open_store
from memedit.checkpoint import Checkpoint
from memedit.manifest import MANIFEST_NAME, read_manifest
from tests.integration.worlds import World
from tests.tiny import save_tiny
from tests.workflows.runs import FACTS, PLAIN, Ran, memedit
from workflows.facts import write_facts

pytestmark = pytest.mark.slow

OTHER = {"subject": "Big Ben", "prompt": "{} stands in", "target_new": "Berlin"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: what is computed is no matter of these tests."""
    return tmp_path_factory.mktemp("cache")


def check(version: str, *more: object) -> Ran:
    return memedit("verify", version, "--json", *more)


def kinds(ran: Ran) -> dict[str, set[str]]:
    """The kinds of problems that were found, by file."""
    assert ran.code == 1, ran.stderr
    result = json.loads(ran.stdout)
    assert not result["ok"]
    found: dict[str, set[str]] = {}
    for problem in result["problems"]:
        found.setdefault(problem["file"], set()).add(problem["kind"])
    return found


# --- verify --------------------------------------------------------------------------------------


def test_a_version_is_verified(world: World, s3: str, tmp_path: Path, cache: Path) -> None:
    objects, version, base = world.objects, f"{s3}/out", world.there.at("base")
    ran = world.there.edit(version, cache)
    assert ran.code == 0, ran.stderr
    folder = objects.fetch(version, tmp_path / "out")
    checkpoint, manifest = Checkpoint.open(folder), read_manifest(folder)

    sound = check(version)
    assert sound.result["ok"]
    # The base that the version names is at hand, and compared with.
    assert (sound.result["format"], sound.result["base"]) == ("full", base)
    assert check(version, "--base", world.here.at("base")).result["ok"]
    quick = check(version, "--quick").result
    assert quick["ok"] and quick["base"] is None
    assert (quick["files"], quick["tensors"]) == (14, 2)

    def changed(name: str, offset: int) -> bytes:
        content = bytearray(objects.get(f"{version}/{name}"))
        content[offset] ^= 1
        return bytes(content)

    def tampered(name: str, content: bytes | None, *more: object) -> dict[str, set[str]]:
        """What is found while an object is another one, or gone."""
        location = f"{version}/{name}"
        was = objects.get(location) if name in objects.names(version) else None
        for change in (content, was):
            if change is None:
                objects.delete(location)
            else:
                objects.put(location, change)
            if change is content:
                found = kinds(check(version, *more))
        return found

    # A tensor that was edited; one beside it, in a shard that nobody has seen whole; and another.
    edited = next(iter(manifest.tensors))
    shard = checkpoint.shard_of(edited)
    shards = {checkpoint.shard_of(name) for name in manifest.tensors}
    beside = next(n for n in checkpoint.names if n != edited and checkpoint.shard_of(n) == shard)
    other = next(n for n in checkpoint.names if checkpoint.shard_of(n) not in shards)
    assert manifest.files[shard].sha256 is None
    for tensor, flags, expected in (
        (edited, (), {"checksum", "tensor"}),
        (edited, ("--quick",), {"checksum", "tensor"}),
        (beside, (), {"checksum", "base"}),
        (beside, ("--quick",), {"checksum"}),
        (other, (), {"checksum", "base"}),
    ):
        info = checkpoint.info(tensor)
        content = changed(info.shard, info.offset)
        assert tampered(info.shard, content, *flags) == {info.shard: expected}, (tensor, flags)
    facts = changed("facts.jsonl", 20)
    assert tampered("facts.jsonl", facts) == {"facts.jsonl": {"checksum"}}
    assert tampered("facts.jsonl", facts + b"x", "--quick") == {"facts.jsonl": {"size"}}
    assert tampered("facts.jsonl", None) == {"facts.jsonl": {"missing"}}
    assert tampered("mine.bin", b"x") == {"mine.bin": {"unlisted"}}
    assert check(version).result["ok"]

    save_tiny(tmp_path / "another", seed=1)
    for another in (tmp_path / "another", objects.put_folder(tmp_path / "another", f"{s3}/b")):
        ran = check(version, "--base", another)
        assert (ran.code, ran.error["field"]) == (2, "base")
        assert "is not the base of this version" in ran.error["message"]


def test_where_no_version_is(world: World, s3: str) -> None:
    for place in (world.there.at("base"), f"{s3}/nowhere"):
        ran = check(place)
        assert (ran.code, ran.error["source"]) == (2, place)
        assert "not a version of memedit" in ran.error["message"]


# --- A registry ----------------------------------------------------------------------------------


def publish(world: World, registry: str, cache: Path, run_id: str, *more: object) -> Ran:
    """An edit of its own facts: the second has one more."""
    facts = world.there.at(f"{run_id}.jsonl")
    rows = [*FACTS, OTHER] if run_id == "second" else FACTS
    world.objects.put(facts, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    place = ("--model", world.there.at("base"), "--cache", cache, "--layers", "1-2", "--json")
    settings = ("--set", "moments.tokens=1024", "--set", "moments.window=32")
    settings += ("--set", "targets.steps=4", "--set", "evaluation.heldout_tokens=0")
    target = ("--facts", facts, "--registry", registry, "--run-id", run_id)
    return memedit("edit", *PLAIN, *place, *settings, *target, *more)


def test_two_edits_and_back(world: World, s3: str, tmp_path: Path, cache: Path) -> None:
    registry, objects = f"{s3}/reg", world.objects
    results = []
    for run_id in ("first", "second"):
        ran = publish(world, registry, cache, run_id)
        assert ran.code == 0, ran.stderr
        results.append(ran.result)
        current = json.loads(objects.get(f"{registry}/CURRENT"))
        assert (current["version"], current["path"]) == (run_id, f"versions/{run_id}")
        # A reader takes CURRENT, then the path in it.
        version = f"{registry}/{current['path']}"
        assert ran.result["out"] == version
        assert check(version).result["ok"]
    looked = memedit(
        *("evaluate", "--model", version, "--facts", f"{version}/facts.jsonl"),
        *("--cache", cache, "--json"),
    ).result["metrics"]
    assert looked["efficacy"] == results[1]["metrics"]["after"]["efficacy"]
    names = objects.names(registry)
    assert {n.split("/")[0] for n in names} == {"CURRENT", "versions"}
    assert sorted(n for n in names if MANIFEST_NAME in n) == [
        f"versions/{run_id}/{MANIFEST_NAME}" for run_id in ("first", "second")
    ]
    assert objects.uploads() == []

    history = memedit("history", "--registry", registry, "--json").result
    assert history["current"] == "second"
    assert [v["version"] for v in history["versions"]] == ["second", "first"]
    assert [(v["current"], v["state"], v["facts"]) for v in history["versions"]] == [
        (True, "whole", 4),
        (False, "whole", 3),
    ]
    assert [v["score"] for v in history["versions"]] == [
        result["metrics"]["after"]["score"] for result in reversed(results)
    ]
    difference = memedit("diff", "--registry", registry, "--json").result
    assert [row["subject"] for row in difference["facts"]["added"]] == ["Big Ben"]
    assert difference["facts"]["removed"] == []

    back = memedit("rollback", "--registry", registry, "--json").result
    assert (back["from"], back["to"], back["moved"]) == ("second", "first", True)
    current = open_registry(registry).current()
    assert current is not None
    assert [(m.version, m.by) for m in current.moves] == [
        ("first", "publish"),
        ("second", "publish"),
        ("first", "rollback"),
    ]
    # Nothing of either version was touched.
    assert [n for n in objects.names(registry) if n != "CURRENT"] == names[1:]
    assert check(f"{registry}/versions/second").result["ok"]


def test_a_registry_that_is_locked(
    world: World, s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEDIT_LEASE_S", "1.5")
    registry = f"{s3}/reg"
    with open_store(registry).lock():
        before = world.objects.names(registry)
        ran = publish(world, registry, cache, "first")
        assert (ran.code, ran.error["kind"]) == (4, "LockError"), ran.stderr
        assert f"{registry}/.memedit.lock" in ran.error["message"]
        assert "holds this lock" in ran.stderr and "Traceback" not in ran.stderr
        assert world.objects.names(registry) == before == [".memedit.lock"]
    assert world.objects.names(registry) == []
    assert publish(world, registry, cache, "first").code == 0


def test_current_that_is_moved_meanwhile(
    world: World, s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback needs no lock; the edit that it overtakes does not undo it."""
    registry = f"{s3}/reg"
    for run_id in ("zero", "first"):
        assert publish(world, registry, cache, run_id).code == 0

    def rolled_back(*arguments: Any) -> None:
        assert memedit("rollback", "--registry", registry, "--json").result["to"] == "zero"
        write_facts(*arguments)

    monkeypatch.setattr("workflows.edit.write_facts", rolled_back)
    ran = publish(world, registry, cache, "second")
    assert (ran.code, ran.error["kind"]) == (4, "LockError"), ran.stderr
    assert "CURRENT was moved by another run" in ran.error["message"]
    current = open_registry(registry).current()
    assert current is not None and current.version == "zero"
    # The version is whole and can be used: nothing of hours of work is lost.
    ran = memedit("rollback", "--registry", registry, "--to", "second", "--json")
    assert ran.result["to"] == "second"


def test_a_failed_edit_leaves_a_registry_as_it_was(world: World, s3: str, cache: Path) -> None:
    registry = f"{s3}/reg"
    assert publish(world, registry, cache, "first").code == 0
    was = world.objects.below(registry)
    for code, flags in ((3, ("--gate", "fluency<1")), (2, ("--layers", "9"))):
        ran = publish(world, registry, cache, "second", *flags)
        assert ran.code == code, ran.stderr
        assert world.objects.below(registry) == was and world.objects.uploads() == []


def test_a_run_id_that_is_taken(world: World, s3: str, cache: Path) -> None:
    registry = f"{s3}/reg"
    assert publish(world, registry, cache, "first").code == 0
    was = world.objects.below(registry)
    ran = publish(world, registry, cache, "first")
    assert ran.code == 2 and "not empty" in ran.error["message"], ran.stderr
    assert ran.error["source"] == f"{registry}/versions/first"
    assert world.objects.below(registry) == was
