"""Versions, CURRENT and pins, in a folder and in memory alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import removal
from cluster.claims import HOLD_DAYS
from cluster.current import check_run_id
from cluster.registry import Registry, open_registry
from cluster.retention import Rules, collect, make_plan
from cluster.store import ABSENT, LocalStore, Store
from cluster.versions import needs_of
from memedit.errors import InputError, LockError
from memedit.manifest import ModelIdentity
from tests.cluster.made_versions import days_ago, publish, put, use
from tests.cluster.memory_store import MemoryStore, steps_of


@pytest.fixture(params=["folder", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    store: Store = LocalStore(tmp_path / "r") if request.param == "folder" else MemoryStore()
    return Registry(store)


HOSTILE = ["..", ".", "", "a/b", "../a", "/etc", "a\\b", "a\0b", "a b", "é", "x" * 101, "a\n"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused(registry: Registry, name: str) -> None:
    publish(registry.store, "a")
    for act in (
        check_run_id,
        registry.version,
        registry.require_whole,
        registry.pin,
        registry.unpin,
        lambda name: registry.hold(name).__enter__(),
        lambda name: registry.remove([name]),
        lambda name: registry.move(name, expected=ABSENT, by="rollback"),
    ):
        with pytest.raises(InputError, match="no name of a version"):
            act(name)


class TestVersions:
    def test_the_newest_first_then_the_unfinished(self, registry: Registry) -> None:
        for run_id, days in (("x", 3.0), ("y", 1.0), ("z", 2.0)):
            publish(registry.store, run_id, created=days_ago(days))
        put(registry.store, "versions/dead/model.safetensors", b"half")
        found = registry.versions()
        assert [v.name for v in found] == ["y", "z", "x", "dead"]
        assert [v.unfinished for v in found] == [False, False, False, True]
        assert found[0].manifest is not None and found[0].manifest.run_id == "y"
        assert found[0].size_bytes == sum(registry.store.sizes("versions/y").values())
        assert found[0].problems == []
        assert registry.ids() == ["dead", "x", "y", "z"]

    def test_staging_of_a_run_is_unfinished_and_other_things_are_not_ours(
        self, registry: Registry
    ) -> None:
        publish(registry.store, "a")
        manifest = registry.store.get("versions/a/memedit.json")
        assert manifest is not None
        put(registry.store, "versions/.b.partial-b/memedit.json", manifest[0])
        put(registry.store, "versions/.b.partial-b/model.safetensors", b"half")
        for name in ("versions/README.md", "versions/my notes/x", "versions/.git/x", "stats/a/x"):
            put(registry.store, name, b"mine")
        assert [v.name for v in registry.versions()] == ["a", ".b.partial-b"]
        collect(registry, Rules(keep=0))
        assert list(registry.store.sizes("", deep=True)) == [
            "stats/a/x",
            "versions/.git/x",
            "versions/README.md",
            "versions/my notes/x",
        ]

    def test_one_that_is_not_there_or_not_finished(self, registry: Registry) -> None:
        put(registry.store, "versions/dead/model.safetensors", b"half")
        with pytest.raises(InputError, match="versions/dead: this version was never finished"):
            registry.version("dead")
        with pytest.raises(InputError, match="versions/nothing: this version is not there"):
            registry.version("nothing")

    def test_what_cannot_be_read_stays_with_all_that_it_mentions(self, registry: Registry) -> None:
        """It may be of a later memedit, and a delta."""
        for run_id in ("base", "old", "later"):
            publish(registry.store, run_id, created=days_ago(9))
        found = registry.store.get("versions/later/memedit.json")
        assert found is not None
        text = json.dumps({"format_version": 99, "base": {"at": "s3://b/r/versions/base/"}})
        registry.store.put("versions/later/memedit.json", text.encode(), expected=found[1])
        assert "update memedit" in (registry.version("later").damage or "")
        done = collect(registry, Rules(keep=0))
        assert [v.name for v in done.removed] == ["old"]
        assert done.plan.kept["base"] == ("later needs it",)

    @pytest.mark.parametrize(
        ("base", "format", "needs"),
        [
            ("runs/r/versions/b", "delta", {"b"}),
            ("/runs/r/versions/b/", "lora", {"b"}),
            ("s3://bucket/r/versions/b", "delta", {"b"}),
            ("versions/b", "delta", {"b"}),
            ("r/versions/a/../b", "delta", {"b"}),
            ("r/versions/a/versions/b", "delta", {"b"}),
            ("r/versions/b", "full", set()),
            ("r/subversions/b", "delta", set()),
            ("smollm2", "delta", set()),
            ("org/model@versions", "lora", set()),
        ],
    )
    def test_what_a_version_needs(self, base: str, format: str, needs: set[str]) -> None:
        model = ModelIdentity(name=base, digest="d")
        manifest = publish(MemoryStore(), "x", model=model, format=format)
        assert needs_of(manifest) == needs


class TestPins:
    def test_a_pin_comes_and_goes(self, registry: Registry) -> None:
        publish(registry.store, "a")
        pin = registry.pin("a", why="for the paper")
        assert registry.pins() == {"a": pin}
        assert (pin.version, pin.why) == ("a", "for the paper")
        assert pin.pinned_at.endswith("+00:00")
        assert registry.pin("a", why="still").why == registry.pins()["a"].why == "still"
        assert registry.unpin("a") and not registry.unpin("a")
        assert registry.pins() == {}

    def test_only_what_is_there_can_be_pinned(self, registry: Registry) -> None:
        put(registry.store, "versions/dead/model.safetensors", b"half")
        for run_id in ("dead", "nothing"):
            with pytest.raises(InputError, match=f"versions/{run_id}: no version here"):
                registry.pin(run_id)
        assert not registry.store.sizes("pins")

    def test_a_damaged_pin_still_pins(self, registry: Registry) -> None:
        publish(registry.store, "a")
        publish(registry.store, "b")
        put(registry.store, "pins/a", b"\xff{")
        assert registry.pins()["a"].why == ""
        assert [v.name for v in collect(registry, Rules(keep=0)).removed] == ["b"]

    def test_a_pin_that_comes_too_late_is_taken_back(self, registry: Registry) -> None:
        publish(registry.store, "a")
        request = removal.ask(registry.store, "a")
        assert request is not None and removal.decide(registry.store, request)
        with pytest.raises(LockError, match="version a is being removed"):
            registry.pin("a")
        with pytest.raises(LockError, match="version a is being removed"):
            use(registry, "a")
        assert not registry.store.sizes("pins") and not registry.store.sizes("holds")
        assert registry.current() is None


class TestRemoval:
    def test_the_manifest_goes_first_and_the_trace_last(self) -> None:
        store = MemoryStore()
        publish(store, "a")
        steps = steps_of(store, lambda: Registry(store).remove(["a"]))
        deleted = [step.removeprefix("delete ") for step in steps if step.startswith("delete")]
        assert deleted[0] == "versions/a/memedit.json"
        assert deleted[-1] == "removing/a"
        assert not store.objects

    def test_the_claims_are_read_after_the_request(self) -> None:
        store = MemoryStore()
        publish(store, "a")
        steps = steps_of(store, lambda: Registry(store).remove(["a"]))
        asked, decided = (i for i, step in enumerate(steps) if step == "put removing/a")
        read = [steps.index(name) for name in ("sizes holds", "get CURRENT", "sizes pins")]
        assert asked < read[0] < read[1] < read[2] < decided

    def test_what_is_claimed_stays_and_can_be_removed_later(self, registry: Registry) -> None:
        for run_id in ("a", "b", "c", "base"):
            publish(registry.store, run_id)
        publish(registry.store, "d", needs="base")
        use(registry, "a")
        registry.pin("b")
        registry.pin("d")
        with registry.hold("c"):
            assert registry.remove(["a", "b", "c", "base", "d"]) == []
        assert registry.remove(["c"]) == ["c"]
        registry.unpin("d")
        assert registry.remove(["d", "base"]) == ["d", "base"]
        assert [v.name for v in registry.versions()] == ["b", "a"]

    def test_a_request_of_a_dead_run_is_in_nobodys_way(self, registry: Registry) -> None:
        for run_id in ("a", "b", "c"):
            publish(registry.store, run_id)
            removal.ask(registry.store, run_id)
        use(registry, "a")
        registry.pin("b")
        assert [v.name for v in collect(registry, Rules(keep=0)).removed] == ["c"]

    def test_a_request_that_was_refused_does_not_come_back(self, registry: Registry) -> None:
        """Though a second one, of the same second, looks like the first."""
        publish(registry.store, "a")
        first = removal.ask(registry.store, "a")
        removal.keep(registry.store, "a")
        second = removal.ask(registry.store, "a")
        assert first is not None and second is not None
        assert not removal.decide(registry.store, first)
        removal.withdraw(registry.store, first)
        assert removal.decide(registry.store, second)

    def test_a_decision_is_final(self, registry: Registry) -> None:
        """Who asks again goes on where the other stopped, and nobody can step in between."""
        publish(registry.store, "a")
        first = removal.ask(registry.store, "a")
        assert first is not None and removal.decide(registry.store, first)
        again = removal.ask(registry.store, "a")
        assert again is not None
        with pytest.raises(LockError, match="being removed"):
            removal.keep(registry.store, "a")
        assert removal.decide(registry.store, again)

    def test_a_removal_that_was_decided_ends_whatever_the_rules(self, registry: Registry) -> None:
        for run_id in ("a", "b"):
            publish(registry.store, run_id)
        request = removal.ask(registry.store, "a")
        assert request is not None and removal.decide(registry.store, request)
        assert {v.name: v.removing for v in registry.versions()} == {"a": True, "b": False}
        assert [v.name for v in collect(registry, Rules(keep=10)).removed] == ["a"]

    def test_the_trace_of_a_version_that_is_gone_goes_too(self, registry: Registry) -> None:
        publish(registry.store, "a")
        request = removal.ask(registry.store, "b")
        assert request is not None and removal.decide(registry.store, request)
        collect(registry, Rules())
        assert not registry.store.sizes("removing")

    def test_a_damaged_trace_stops_everybody(self, registry: Registry) -> None:
        publish(registry.store, "a")
        put(registry.store, "removing/a", b"{}")
        for act in (
            lambda: registry.pin("a"),
            lambda: use(registry, "a"),
            lambda: collect(registry, Rules()),
        ):
            with pytest.raises(InputError, match="removing/a: damaged"):
                act()
        assert not registry.store.sizes("pins") and registry.current() is None

    def test_the_hold_of_a_dead_command_ends(self, registry: Registry) -> None:
        publish(registry.store, "a")
        old = days_ago(HOLD_DAYS + 1)
        stamp = f"{old[:19].replace('-', '').replace(':', '')}Z"
        put(registry.store, f"holds/a.{stamp}-abcd", b"{}")
        put(registry.store, "holds/a.unreadable", b"{}")
        assert registry.claims() == {"a": ["a running command holds it"]}
        registry.store.delete(["holds/a.unreadable"])
        assert registry.claims() == {}
        collect(registry, Rules())
        assert not registry.store.sizes("holds")


class TestRules:
    def test_why_each_version_stays(self, registry: Registry) -> None:
        for age, run_id in enumerate(["n1", "n2", "prev", "cur", "pin", "young", "old", "base"]):
            publish(registry.store, run_id, created=days_ago(age + 0.5))
        publish(registry.store, "delta", needs="base", created=days_ago(20))
        for run_id in ("prev", "cur"):
            use(registry, run_id)
        registry.pin("pin")
        registry.pin("delta")
        plan = make_plan(registry, Rules(keep=2, keep_days=5.7))
        assert plan.kept == {
            "n1": ("it is one of the 2 newest", "it is younger than 5.7 days"),
            "n2": ("it is one of the 2 newest", "it is younger than 5.7 days"),
            "prev": ("rollback leads to it", "it is younger than 5.7 days"),
            "cur": ("it is CURRENT", "it is younger than 5.7 days"),
            "pin": ("it is pinned", "it is younger than 5.7 days"),
            "young": ("it is younger than 5.7 days",),
            "base": ("delta needs it",),
            "delta": ("it is pinned",),
        }
        assert [v.name for v in plan.remove] == ["old"]
        assert [v.name for v in registry.versions()][-1] == "delta"

    def test_a_chain_of_deltas_is_kept_to_its_root(self, registry: Registry) -> None:
        publish(registry.store, "root", created=days_ago(9))
        publish(registry.store, "one", needs="root", created=days_ago(8))
        publish(registry.store, "two", needs="one", created=days_ago(7))
        publish(registry.store, "other", created=days_ago(6))
        use(registry, "two")
        assert [v.name for v in collect(registry, Rules(keep=0)).removed] == ["other"]

    def test_what_needs_itself_ends(self, registry: Registry) -> None:
        publish(registry.store, "a", needs="b")
        publish(registry.store, "b", needs="a")
        use(registry, "a")
        assert collect(registry, Rules(keep=0)).removed == ()

    def test_a_full_version_does_not_need_its_base(self, registry: Registry) -> None:
        publish(registry.store, "base", created=days_ago(1))
        publish(registry.store, "b", needs="base", format="full")
        use(registry, "b")
        assert [v.name for v in collect(registry, Rules(keep=0)).removed] == ["base"]

    def test_a_time_that_cannot_be_read_is_no_reason_to_remove(self, registry: Registry) -> None:
        publish(registry.store, "a", created="last week")
        assert collect(registry, Rules(keep=0, keep_days=1)).removed == ()

    def test_a_plan_changes_nothing(self, registry: Registry) -> None:
        publish(registry.store, "a")
        put(registry.store, "versions/dead/x", b"half")
        before = registry.store.sizes("", deep=True)
        plan = make_plan(registry, Rules(keep=0))
        assert [v.name for v in plan.remove] == ["a"]
        assert [v.name for v in plan.unfinished] == ["dead"]
        assert registry.store.sizes("", deep=True) == before

    def test_nothing_is_touched_while_somebody_publishes(self, registry: Registry) -> None:
        publish(registry.store, "a")
        put(registry.store, "versions/dead/x", b"half")
        before = registry.store.sizes("", deep=True)
        with registry.store.lock():
            with pytest.raises(LockError):
                collect(registry, Rules(keep=0))
            left = registry.store.sizes("", deep=True)
        assert {n: s for n, s in left.items() if n != ".memedit.lock"} == before
        done = collect(registry, Rules(keep=0))
        assert [v.name for v in (*done.removed, *done.unfinished)] == ["a", "dead"]
        assert not registry.store.sizes("", deep=True)

    def test_uploads_that_did_not_end_are_ended_below_versions_only(self) -> None:
        store = MemoryStore(begun={"versions/a/x", "stats/y"})
        assert make_plan(Registry(store), Rules()).uploads == ("versions/a/x",)
        assert store.begun == {"versions/a/x", "stats/y"}
        collect(Registry(store), Rules())
        assert store.begun == {"stats/y"}

    def test_an_unfinished_version_that_ends_after_all_stays(self) -> None:
        """Its publisher had lost the lock, as in a laptop that slept."""
        store = MemoryStore()
        store.write("versions/late/model.safetensors")

        def ends(operation: str, name: str) -> None:
            if (operation, name) == ("get", "versions/late/memedit.json"):
                store.write("versions/late/memedit.json", b"{}")

        store.before = ends
        assert collect(Registry(store), Rules(keep=0)).unfinished == ()
        assert "versions/late/model.safetensors" in store.objects


def test_a_registry_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "nothing", tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(InputError, match=f"{place}.*no registry"):
            open_registry(str(place))
    assert not (tmp_path / "nothing").exists()
    publish(LocalStore(tmp_path / "r"), "a")
    assert open_registry(str(tmp_path / "r")).ids() == ["a"]
