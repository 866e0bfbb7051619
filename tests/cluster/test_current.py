"""CURRENT: where it is, how it is moved, and what is refused, in a folder and in memory alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.current import MOST_MOVES, content_of
from cluster.registry import Registry
from cluster.retention import Rules, collect
from cluster.store import ABSENT, LocalStore, Store
from memedit.errors import InputError, LockError
from tests.cluster.made_versions import publish, put, use
from tests.cluster.memory_store import MemoryStore


@pytest.fixture(params=["folder", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    store: Store = LocalStore(tmp_path / "r") if request.param == "folder" else MemoryStore()
    return Registry(store)


def grow(store: Store, name: str, more: bytes = b"more") -> None:
    found = store.get(name)
    assert found is not None
    store.put(name, found[0] + more, expected=found[1])


def test_it_says_where_it_is_and_how_it_came_there(registry: Registry) -> None:
    for run_id in ("a", "b"):
        publish(registry.store, run_id)
    assert registry.current() is None
    registry.move("a", expected=ABSENT, by="publish")
    use(registry, "b")
    use(registry, "a", by="rollback")
    found = registry.store.get("CURRENT")
    assert found is not None
    value = json.loads(found[0])
    assert value.keys() == {"version", "path", "moved_at", "by", "moves"}
    assert (value["version"], value["path"], value["by"]) == ("a", "versions/a", "rollback")
    assert [(m["version"], m["by"]) for m in value["moves"]] == [
        ("a", "publish"),
        ("b", "publish"),
        ("a", "rollback"),
    ]
    current = registry.current()
    assert current is not None
    assert (current.version, current.path, current.token) == ("a", "versions/a", found[1])
    assert current.moved_at == value["moved_at"] == value["moves"][-1]["moved_at"]


def test_previous_is_the_version_before_the_last_move(registry: Registry) -> None:
    for run_id in ("a", "b"):
        publish(registry.store, run_id)
    seen = []
    for run_id in ("a", "b", "a"):
        use(registry, run_id)
        current = registry.current()
        assert current is not None
        seen.append(current.previous)
    assert seen == [None, "a", "b"]


def test_to_move_it_where_it_is_changes_nothing(registry: Registry) -> None:
    publish(registry.store, "a")
    use(registry, "a")
    before = registry.store.get("CURRENT")
    use(registry, "a", by="rollback")
    assert registry.store.get("CURRENT") == before


def test_only_the_last_moves_are_kept(registry: Registry) -> None:
    for run_id in ("a", "b"):
        publish(registry.store, run_id)
    use(registry, "a")
    first = registry.current()
    assert first is not None
    put(registry.store, "CURRENT", content_of(first.moves * (MOST_MOVES + 5)))
    use(registry, "b")
    current = registry.current()
    assert current is not None
    assert [m.version for m in current.moves] == ["a"] * (MOST_MOVES - 1) + ["b"]


@pytest.mark.parametrize("expected", [ABSENT, "another"])
def test_it_is_not_moved_when_somebody_else_has_moved_it(registry: Registry, expected: str) -> None:
    for run_id in ("a", "b", "c"):
        publish(registry.store, run_id)
    use(registry, "a")
    seen = registry.current()
    assert seen is not None
    use(registry, "b")
    token = seen.token if expected == "another" else expected
    with pytest.raises(LockError, match="now it is at b"):
        registry.move("c", expected=token, by="publish")
    current = registry.current()
    assert current is not None and current.version == "b"


def test_the_first_of_two_moves_at_once_wins() -> None:
    """The other has read the same CURRENT, and is stopped by the write itself."""
    store = MemoryStore()
    registry = Registry(store)
    for run_id in ("a", "b", "c"):
        publish(store, run_id)
    use(registry, "a")
    seen = registry.current()
    assert seen is not None

    def other(operation: str, name: str) -> None:
        if (operation, name) == ("put", "CURRENT"):
            store.before = lambda operation, name: None
            registry.move("b", expected=seen.token, by="publish")

    store.before = other
    with pytest.raises(LockError):
        registry.move("c", expected=seen.token, by="rollback")
    current = registry.current()
    assert current is not None and [m.version for m in current.moves] == ["a", "b"]
    assert not store.sizes("holds")


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda s: s.delete(["versions/b/memedit.json"]), r"versions/b.*no memedit\.json"),
        (lambda s: s.delete(["versions/b/model.safetensors"]), "model.safetensors is missing"),
        (lambda s: grow(s, "versions/b/facts.jsonl"), r"facts\.jsonl has \d+ bytes, publ"),
        (lambda s: s.delete(["versions/base/memedit.json"]), "versions/base"),
        (lambda s: s.delete(["versions/base/facts.jsonl"]), "versions/base.*facts.jsonl"),
        (lambda s: grow(s, "versions/b/memedit.json", b"{"), "versions/b.*not JSON"),
    ],
)
def test_a_version_that_is_not_whole_is_refused(
    registry: Registry, break_it: Callable[[Store], None], match: str
) -> None:
    publish(registry.store, "a")
    publish(registry.store, "base")
    publish(registry.store, "b", needs="base")
    use(registry, "a")
    break_it(registry.store)
    with pytest.raises(InputError, match=match):
        use(registry, "b")
    current = registry.current()
    assert current is not None and current.version == "a"
    assert not registry.store.sizes("holds")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"3", b"[" * 100_000])
def test_what_is_no_object_is_refused(registry: Registry, content: bytes) -> None:
    put(registry.store, "CURRENT", content)
    with pytest.raises(InputError, match="CURRENT: damaged: not"):
        registry.current()


@pytest.mark.parametrize(
    "change",
    [
        {"path": "versions/../../elsewhere"},
        {"path": "/versions/a"},
        {"path": "versions/b"},
        {"path": None},
        {"version": "../a", "path": "versions/../a"},
        {"version": "..", "path": "versions/.."},
        {"version": 3},
        {"version": "b", "path": "versions/b"},
        {"moved_at": "yesterday"},
        {"moved_at": None},
        {"moved_at": "x", "moves": [{"version": "a", "moved_at": "x", "by": "publish"}]},
        {"by": None},
        {"moves": []},
        {"moves": None},
        {"moves": [{"version": "a"}]},
        {"moves": ["a"]},
    ],
    ids=str,
)
def test_a_damaged_one_is_refused(registry: Registry, change: dict[str, Any]) -> None:
    publish(registry.store, "a")
    use(registry, "a")
    found = registry.store.get("CURRENT")
    assert found is not None
    put(registry.store, "CURRENT", json.dumps(json.loads(found[0]) | change).encode())
    for act in (registry.current, registry.claims, lambda: collect(registry, Rules(keep=0))):
        with pytest.raises(InputError, match="CURRENT: damaged"):
            act()
    assert registry.version("a").manifest is not None


def test_fields_of_others_do_not_matter(registry: Registry) -> None:
    publish(registry.store, "a")
    use(registry, "a")
    found = registry.store.get("CURRENT")
    assert found is not None
    put(registry.store, "CURRENT", json.dumps(json.loads(found[0]) | {"facts": 3}).encode())
    current = registry.current()
    assert current is not None and current.version == "a"
