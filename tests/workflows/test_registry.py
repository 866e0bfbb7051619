"""The commands over a registry, through the command line, in a folder and in a store alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import removal
from cluster.registry import Registry
from cluster.storage import StorageSettings
from cluster.store import ABSENT, LocalStore, Store
from memedit.manifest import FactsIdentity, ModelIdentity, TensorRecord
from tests.cluster.made_versions import TOWER, WEIGHT, days_ago, publish
from tests.cluster.memory_store import MemoryStore
from tests.workflows.runs import Ran, memedit
from workflows.version_tables import SHOWN, size_text

FIRST, SECOND, THIRD = "20261120T040000Z-1a2b", "20261121T040000Z-77ff", "20261122T040000Z-9abc"
BEN = ("Big Ben", "{} stands in", "Oslo")
OLD_METRICS = {
    "before": {"score": 37.0, "perplexity": 25.0},
    "after": {"score": 84.5, "perplexity": 26.5, "fluency": None},
}
NEW_METRICS = {"before": {"score": 37.0}, "after": {"score": 80.0, "drift_kl": 0.15}}


@dataclass(frozen=True)
class Place:
    """A registry, and how the command line is told of it."""

    location: str
    registry: Registry

    @property
    def store(self) -> Store:
        return self.registry.store

    def run(self, command: str, *arguments: object) -> Ran:
        return memedit(command, "--registry", self.location, *arguments)

    def current(self) -> str | None:
        current = self.registry.current()
        return current.version if current else None

    def use(self, run_id: str) -> None:
        seen = self.registry.current()
        self.registry.move(run_id, expected=seen.token if seen else ABSENT, by="publish")


@pytest.fixture(params=["folder", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Three versions; CURRENT went from the first to the second."""
    monkeypatch.setenv("COLUMNS", "80")
    store: Store
    if request.param == "folder":
        location = str(tmp_path / "registry")
        store = LocalStore(Path(location))
    else:
        location = "s3://bucket/models/registry"
        store = MemoryStore(place=location)

        def open_store(wanted: str, *, storage: StorageSettings | None = None) -> Store:
            # Neither taken for a path nor shortened to s3:/bucket.
            assert wanted == location
            return store

        monkeypatch.setattr("cluster.registry.open_store", open_store)
    found = Place(location, Registry(store))
    publish(store, FIRST, created=days_ago(3), facts=(TOWER, BEN), metrics=OLD_METRICS)
    publish(
        store,
        SECOND,
        created=days_ago(2),
        facts=[(TOWER[0], f" {TOWER[1]} ", "Lima"), ("The Louvre", "{} is in", "Rome")],
        metrics=NEW_METRICS,
        settings={"targets": {"lr": 0.4, "steps": 20}, "solve": {"lam": 400.0}, "heldout": "self"},
        tensors={
            WEIGHT: TensorRecord(sha256="e", delta_norm=3.0, weight_norm=30.0, rounding_error=0.0),
            "other": TensorRecord(sha256="e", delta_norm=3.0, weight_norm=0.0, rounding_error=0.0),
        },
    )
    publish(store, THIRD, created=days_ago(1), needs=SECOND, facts=(TOWER,))
    for run_id in (FIRST, SECOND):
        found.use(run_id)
    return found


class TestHistory:
    def test_what_a_program_is_told(self, place: Place) -> None:
        place.registry.pin(FIRST, why="in the paper")
        place.store.put("versions/dead/model.safetensors", b"half", expected=ABSENT)
        result = place.run("history", "--json").result
        assert result.keys() == {"registry", "current", "versions", "moves"}
        assert (result["registry"], result["current"]) == (place.location, SECOND)
        assert [m["version"] for m in result["moves"]] == [FIRST, SECOND]
        assert result["moves"][0].keys() == {"version", "moved_at", "by"}
        versions = result["versions"]
        assert [v["version"] for v in versions] == [THIRD, SECOND, FIRST, "dead"]
        assert [v["current"] for v in versions] == [False, True, False, False]
        assert [v["state"] for v in versions] == ["whole"] * 3 + ["unfinished"]
        assert [v["format"] for v in versions[:3]] == ["delta", "full", "full"]
        assert versions[2]["pinned"]["why"] == "in the paper" and versions[1]["pinned"] is None
        assert (versions[1]["facts"], versions[1]["score"]) == (2, 80.0)
        assert versions[1]["path"] == f"versions/{SECOND}"
        sizes = place.store.sizes(f"versions/{SECOND}", deep=True)
        assert versions[1]["size_bytes"] == sum(sizes.values())
        assert versions[3]["size_bytes"] == 4

    def test_what_a_person_is_shown(self, place: Place) -> None:
        place.registry.pin(FIRST, why="in the paper")
        place.store.put("versions/dead/model.safetensors", b"half", expected=ABSENT)
        place.store.delete([f"versions/{THIRD}/facts.jsonl"])
        ran = place.run("history")
        assert ran.code == 0 and all(len(line) <= 80 for line in ran.stdout.splitlines())
        text = " ".join(ran.stdout.split())
        for part in ("CURRENT", "pinned (in the paper)", "unfinished", "80.0"):
            assert part in text
        assert "delta, not whole: facts.jsonl is missing" in text
        assert text.index(THIRD) < text.index(SECOND) < text.index(FIRST)
        assert days_ago(2)[:13].replace("T", " ") in text

    def test_states(self, place: Place) -> None:
        request = removal.ask(place.store, FIRST)
        assert request is not None and removal.decide(place.store, request)
        name = f"versions/{THIRD}/memedit.json"
        found = place.store.get(name)
        assert found is not None
        place.store.put(name, b"{", expected=found[1])
        place.store.delete([f"versions/{SECOND}/model.safetensors"])
        versions = place.run("history", "--json").result["versions"]
        states = {v["version"]: (v["state"], v["problems"]) for v in versions}
        assert states[FIRST][0] == "removing"
        assert states[SECOND] == ("incomplete", ["model.safetensors is missing"])
        assert states[THIRD][0] == "damaged" and "not JSON" in states[THIRD][1][0]

    def test_before_the_first_version(self, place: Place) -> None:
        place.store.delete(["CURRENT"])
        ran = place.run("history")
        assert ran.code == 0 and "nothing is CURRENT yet" in ran.stdout
        assert place.run("history", "--json").result["current"] is None

    def test_a_damaged_current_is_named(self, place: Place) -> None:
        found = place.store.get("CURRENT")
        assert found is not None
        place.store.put("CURRENT", b"{}", expected=found[1])
        for command in ("history", "show", "rollback", "diff", "gc"):
            ran = place.run(command, "--json")
            assert (ran.code, ran.error["source"]) == (2, f"{place.location}/CURRENT"), command


class TestShow:
    def test_current_unless_another_is_named(self, place: Place) -> None:
        place.registry.pin(SECOND)
        result = place.run("show", "--json").result
        assert (result["version"], result["current"]) == (SECOND, True)
        assert result["location"] == f"{place.location}/versions/{SECOND}"
        assert result["pinned"]["why"] == "" and result["state"] == "whole"
        assert result["manifest"]["facts"]["count"] == 2
        assert result["updates"][0] == {"weight": WEIGHT, "delta_norm": 3.0, "relative": 0.1}
        assert result["updates"][1]["relative"] is None
        assert place.run("show", "previous", "--json").result["version"] == FIRST
        assert place.run("show", SECOND[:12], "--json").result["version"] == SECOND
        delta = place.run("show", THIRD, "--json").result
        assert (delta["needs"], delta["format"], delta["current"]) == ([SECOND], "delta", False)

    def test_what_a_person_is_shown(self, place: Place) -> None:
        ran = place.run("show", FIRST)
        assert ran.code == 0 and all(len(line) <= 80 for line in ran.stdout.splitlines())
        text = " ".join(ran.stdout.split())
        for part in (
            FIRST,
            "2 in facts.jsonl",
            "smollm2",
            "Score 37.0 84.5 +47.5",
            WEIGHT,
            "5.00%",
        ):
            assert part in text
        assert "CURRENT" not in text and "Fluency" not in text
        assert "CURRENT" in place.run("show").stdout

    def test_a_name_that_means_several_or_none(self, place: Place) -> None:
        ran = place.run("show", "202611", "--json")
        assert ran.code == 2 and ran.error["field"] == "version"
        assert all(name in ran.error["message"] for name in (FIRST, SECOND, THIRD))
        ran = place.run("show", "20271121", "--json")
        assert ran.code == 2 and f"did you mean {SECOND!r}" in ran.error["message"]
        assert ran.error["source"] == place.location
        assert "did you mean 'current'" in place.run("show", "curent", "--json").error["message"]

    def test_a_whole_name_is_not_the_beginning_of_another(self, place: Place) -> None:
        for run_id in ("nightly", "nightly-2"):
            publish(place.store, run_id)
        assert place.run("show", "nightly", "--json").result["version"] == "nightly"

    def test_a_complaint_does_not_list_hundreds(self, place: Place) -> None:
        for i in range(9):
            publish(place.store, f"2025-{i}")
        place.store.put("versions/2025-9/x", b"half", expected=ABSENT)
        said = place.run("show", "2025", "--json").error["message"]
        assert said.endswith("2025-8, 2025-7, 2025-6, 2025-5, 2025-4, …")

    def test_what_was_not_finished_is_no_version_and_in_nobodys_way(self, place: Place) -> None:
        place.store.put(f"versions/{SECOND[:12]}dead/x", b"half", expected=ABSENT)
        assert place.run("show", SECOND[:12], "--json").result["version"] == SECOND
        ran = place.run("show", f"{SECOND[:12]}dead", "--json")
        assert ran.code == 2 and "no memedit.json" in ran.error["message"]


def test_a_version_by_its_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "r")
    for run_id, facts in (("a", (TOWER,)), ("b", (BEN,))):
        publish(store, run_id, facts=facts)
    monkeypatch.chdir(tmp_path / "r" / "versions")
    for location in (tmp_path / "r" / "versions" / "a", "./a"):
        result = memedit("show", location, "--json").result
        assert (result["version"], result["registry"], result["current"]) == ("a", None, False)
    result = memedit("diff", "./a", "./b", "--json").result
    assert [f["subject"] for f in result["facts"]["added"]] == ["Big Ben"]
    assert result["new"] == {"version": "b", "location": "./b"}
    # Both kinds at once, and a name without a registry.
    mixed = memedit("diff", "a", "./b", "--registry", tmp_path / "r", "--json").result
    assert mixed["facts"] == result["facts"]
    ran = memedit("show", "a", "--json")
    assert ran.code == 2 and "--registry" in ran.error["message"]
    ran = memedit("show", tmp_path, "--json")
    assert ran.code == 2 and "not a version of memedit" in ran.error["message"]


class TestDiff:
    def test_what_a_program_is_told(self, place: Place) -> None:
        ran = place.run("diff", FIRST, SECOND, "--json")
        result = ran.result
        assert (result["old"]["version"], result["new"]["version"]) == (FIRST, SECOND)
        assert result["facts"] == {
            "added": [
                {"id": result["facts"]["added"][0]["id"], "subject": "The Louvre",
                 "prompt": "{} is in", "target_new": "Rome"}
            ],
            "removed": [
                {"id": result["facts"]["removed"][0]["id"], "subject": "Big Ben",
                 "prompt": "{} stands in", "target_new": "Oslo"}
            ],
            "changed": [
                {"id": result["facts"]["changed"][0]["id"], "subject": "Eiffel Tower",
                 "prompt": "{} is located in the city of", "old": "Rome", "new": "Lima"}
            ],
            "same": 0,
        }  # fmt: skip
        assert result["updates"] == [
            {
                "weight": WEIGHT,
                "old": {"delta_norm": 1.5, "relative": 0.05},
                "new": {"delta_norm": 3.0, "relative": 0.1},
            },
            {"weight": "other", "old": None, "new": {"delta_norm": 3.0, "relative": None}},
        ]
        metrics = {m["metric"]: (m["old"], m["new"]) for m in result["metrics"]}
        assert list(metrics) == ["score", "perplexity", "drift_kl"]
        assert metrics["score"] == (
            {"before": 37.0, "after": 84.5},
            {"before": 37.0, "after": 80.0},
        )
        assert metrics["perplexity"][1] == {"before": None, "after": None}
        assert result["settings"] == [
            {"setting": "heldout", "new": "self"},
            {"setting": "targets.lr", "old": 0.5, "new": 0.4},
        ]
        assert result["model"] is None
        assert "was changed since" not in ran.stderr

    def test_without_names_it_is_what_the_last_move_brought(self, place: Place) -> None:
        named = place.run("diff", FIRST, SECOND, "--json").result
        assert place.run("diff", "--json").result == named
        assert place.run("diff", "previous", "--json").result == named
        back = place.run("diff", "current", "previous", "--json").result
        assert back["facts"]["added"][0]["subject"] == "Big Ben"

    def test_nothing_differs(self, place: Place) -> None:
        result = place.run("diff", FIRST, FIRST, "--json").result
        assert result["facts"] == {"added": [], "removed": [], "changed": [], "same": 2}
        assert result["settings"] == []
        text = place.run("diff", FIRST, FIRST).stdout
        assert "0 added, 0 removed, 0 changed, 2 the same" in text
        assert "settings: no difference" in text

    def test_other_bases_and_ways(self, place: Place) -> None:
        model = ModelIdentity(name="other", digest="e" * 64)
        publish(place.store, "other", model=model, method="emmet", moments={"5": "m"})
        result = place.run("diff", FIRST, "other", "--json").result
        assert result["model"]["new"] == {"name": "other", "digest": "e" * 64}
        assert {s["setting"] for s in result["settings"]} == {"method", "statistics.5"}
        assert "the base differs: smollm2" in place.run("diff", FIRST, "other").stdout

    def test_a_person_is_shown_some_facts_and_told_of_the_others(self, place: Place) -> None:
        facts = [(f"Subject {i:02}", "{} is in", "Rome") for i in range(SHOWN + 7)]
        publish(place.store, "many", facts=facts)
        ran = place.run("diff", SECOND, "many")
        assert ran.code == 0 and all(len(line) <= 80 for line in ran.stdout.splitlines())
        assert ran.stdout.count("Subject ") == SHOWN
        assert "… and 7 more added" in ran.stdout and "more removed" not in ran.stdout
        assert f"{SHOWN + 7} added, 2 removed, 0 changed" in ran.stdout
        result = place.run("diff", SECOND, "many", "--json").result
        assert len(result["facts"]["added"]) == SHOWN + 7

    def test_what_a_person_is_shown(self, place: Place) -> None:
        text = " ".join(place.run("diff").stdout.split())
        assert f"from {FIRST} to {SECOND}" in text
        assert "+ The Louvre is in Rome" in text and "- Big Ben stands in Oslo" in text
        assert "~ Eiffel Tower is located in the city of Rome → Lima" in text
        assert "Score 37.0 84.5 37.0 80.0 -4.5 worse" in text
        assert "targets.lr 0.5 0.4" in text

    @pytest.mark.parametrize("name", ["../../CURRENT", "/etc/passwd", "nothing.jsonl"])
    def test_a_table_that_is_no_file_of_the_version_is_not_read(
        self, place: Place, name: str
    ) -> None:
        facts = FactsIdentity(digest="f" * 64, file=name, count=1)
        publish(place.store, "bad", identity=facts)
        ran = place.run("diff", FIRST, "bad", "--json")
        assert ran.code == 2 and f"{name!r}, is none of its files" in ran.error["message"]

    def test_a_table_that_was_changed_is_told(self, place: Place) -> None:
        name = f"versions/{SECOND}/facts.jsonl"
        found = place.store.get(name)
        assert found is not None
        place.store.put(name, found[0].replace(b"Lima", b"Cusc"), expected=found[1])
        ran = place.run("diff", "--json")
        assert ran.result["facts"]["changed"][0]["new"] == "Cusc"
        assert "facts.jsonl was changed since it was published" in ran.stderr

    @pytest.mark.parametrize(("row", "wrong"), [(b"{", "not JSON"), (b'{"subject": 3}', "layout")])
    def test_a_row_that_is_damaged_is_named(self, place: Place, row: bytes, wrong: str) -> None:
        name = f"versions/{SECOND}/facts.jsonl"
        found = place.store.get(name)
        assert found is not None
        place.store.put(name, found[0] + row, expected=found[1])
        ran = place.run("diff", "--json")
        assert (ran.code, ran.error["row"]) == (2, 3)
        assert ran.error["source"].endswith(name)


class TestRollback:
    def test_to_the_version_before_and_back(self, place: Place) -> None:
        result = place.run("rollback", "--json").result
        assert (result["moved"], result["from"], result["to"]) == (True, SECOND, FIRST)
        assert result["path"] == f"versions/{FIRST}" and place.current() == FIRST
        ran = place.run("rollback")
        assert ran.stdout.split() == ["CURRENT:", "from", FIRST, "to", SECOND]
        assert place.current() == SECOND

    def test_to_a_version_that_is_named(self, place: Place) -> None:
        assert place.run("rollback", "--to", THIRD[:10], "--json").result["to"] == THIRD
        assert place.current() == THIRD
        again = place.run("rollback", "--to", THIRD, "--json").result
        assert (again["moved"], again["from"], again["to"]) == (False, THIRD, THIRD)
        assert "already" in place.run("rollback", "--to", THIRD).stdout
        current = place.registry.current()
        assert current is not None
        assert [(m.version, m.by) for m in current.moves][-1] == (THIRD, "rollback")

    def test_nothing_to_go_back_to(self, place: Place) -> None:
        place.store.delete(["CURRENT"])
        assert "nothing is CURRENT yet" in place.run("rollback", "--json").error["message"]
        place.use(FIRST)
        ran = place.run("rollback", "--json")
        assert ran.code == 2 and f"another version than {FIRST}" in ran.error["message"]
        place.store.delete(["CURRENT"])
        result = place.run("rollback", "--to", FIRST, "--json").result
        assert (result["from"], result["to"]) == (None, FIRST)

    @pytest.mark.parametrize("file", ["memedit.json", "model.safetensors"])
    def test_what_is_not_whole_is_refused(self, place: Place, file: str) -> None:
        place.store.delete([f"versions/{FIRST}/{file}"])
        before = place.store.get("CURRENT")
        for arguments in ((), ("--to", FIRST)):
            ran = place.run("rollback", *arguments, "--json")
            assert ran.code == 2 and f"CURRENT stays at {SECOND}" in ran.error["message"]
            assert file in ran.error["message"] and FIRST in ran.error["source"]
        assert place.store.get("CURRENT") == before

    def test_what_is_being_removed_is_exit_code_4(self, place: Place) -> None:
        request = removal.ask(place.store, FIRST)
        assert request is not None and removal.decide(place.store, request)
        ran = place.run("rollback", "--json")
        assert (ran.code, ran.error["kind"]) == (4, "LockError")
        assert "is being removed" in ran.error["message"] and place.current() == SECOND

    def test_a_move_by_somebody_else_is_exit_code_4(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = Registry.require_whole

        def and_meanwhile(registry: Registry, run_id: str) -> Any:
            found = whole(registry, run_id)
            if run_id == FIRST:
                place.use(THIRD)
            return found

        monkeypatch.setattr(Registry, "require_whole", and_meanwhile)
        ran = place.run("rollback", "--json")
        assert (ran.code, ran.error["kind"]) == (4, "LockError")
        assert place.current() == THIRD and not place.store.sizes("holds")


class TestPin:
    def test_it_comes_and_goes(self, place: Place) -> None:
        result = place.run("pin", "current", "--why", "in the paper", "--json").result
        assert (result["version"], result["pinned"]) == (SECOND, True)
        assert place.registry.pins()[SECOND].why == "in the paper"
        result = place.run("pin", SECOND, "--remove", "--json").result
        assert (result["pinned"], result["changed"]) == (False, True)
        assert place.registry.pins() == {}
        result = place.run("pin", SECOND, "--remove", "--json").result
        assert (result["pinned"], result["changed"]) == (False, False)
        assert place.run("pin", FIRST[:8]).stdout == f"{FIRST}: pinned\n"
        assert place.run("pin", FIRST, "--remove").stdout == f"{FIRST}: not pinned any more\n"

    def test_the_pin_of_what_is_gone_can_be_removed(self, place: Place) -> None:
        place.store.put("pins/gone", b"{}", expected=ABSENT)
        assert place.run("pin", "gone", "--remove", "--json").result["changed"] is True
        assert place.run("pin", "gone", "--json").code == 2

    def test_a_reason_is_one_line(self, place: Place) -> None:
        ran = place.run("pin", "current", "--why", "a\x1b[31m", "--json")
        assert (ran.code, ran.error["field"]) == (2, "why")
        assert place.registry.pins() == {}


class TestGc:
    def test_a_dry_run_says_what_and_why_and_does_nothing(self, place: Place) -> None:
        place.store.put("versions/dead/model.safetensors", b"half", expected=ABSENT)
        publish(place.store, "old", created=days_ago(9))
        before = place.store.sizes("", deep=True)
        result = place.run("gc", "--keep", "1", "--json").result
        assert result["dry_run"] is True
        assert {k["version"]: k["why"] for k in result["kept"]} == {
            THIRD: ["it is the newest"],
            SECOND: ["it is CURRENT", f"{THIRD} needs it"],
            FIRST: ["rollback leads to it"],
        }
        assert [(r["version"], r["facts"]) for r in result["removed"]] == [("old", 1)]
        assert [r["version"] for r in result["unfinished"]] == ["dead"]
        size = sum(place.store.sizes("versions/old", deep=True).values())
        assert result["size_bytes"] == size + 4
        text = " ".join(place.run("gc", "--keep", "1").stdout.split())
        assert f"{SECOND} it is CURRENT; {THIRD} needs it" in text
        assert "1 version, 1 unfinished version would go" in text and "--run removes" in text
        assert place.store.sizes("", deep=True) == before

    def test_it_removes_what_it_said(self, place: Place) -> None:
        place.store.put("versions/dead/model.safetensors", b"half", expected=ABSENT)
        publish(place.store, "old", created=days_ago(9))
        said = place.run("gc", "--keep", "1", "--json").result
        done = place.run("gc", "--keep", "1", "--run", "--json").result
        assert (said.pop("dry_run"), done.pop("dry_run")) == (True, False)
        assert done == said
        assert [v.name for v in place.registry.versions()] == [THIRD, SECOND, FIRST]
        assert place.current() == SECOND
        assert "nothing to remove" in place.run("gc", "--run").stdout

    def test_ten_are_kept_unless_told_otherwise(self, place: Place) -> None:
        for i in range(11):
            publish(place.store, f"v{i:02}", created=days_ago(10 + i))
        removed = place.run("gc", "--json").result["removed"]
        assert [r["version"] for r in removed] == [f"v{i:02}" for i in range(7, 11)]
        younger = place.run("gc", "--keep", "0", "--keep-days", "18.5", "--json").result["removed"]
        assert [r["version"] for r in younger] == ["v09", "v10"]
        assert place.run("gc", "--keep", "-1", "--json").code == 2

    def test_nothing_goes_while_somebody_publishes(self, place: Place) -> None:
        publish(place.store, "old", created=days_ago(9))
        with place.store.lock():
            ran = place.run("gc", "--keep", "0", "--run", "--json")
            assert (ran.code, ran.error["kind"]) == (4, "LockError")
            # To look is no harm.
            assert place.run("gc", "--keep", "0", "--json").result["removed"]
        assert "old" in place.registry.ids()

    def test_what_somebody_began_to_need_meanwhile_is_told(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(place.store, "old", created=days_ago(9))
        ask = removal.ask

        def and_meanwhile(store: Store, run_id: str) -> Any:
            if run_id == "old":
                place.registry.pin("old")
            return ask(store, run_id)

        monkeypatch.setattr(removal, "ask", and_meanwhile)
        ran = place.run("gc", "--keep", "1", "--run", "--json")
        assert (ran.result["spared"], ran.result["removed"]) == (["old"], [])
        assert "old stays" in ran.stderr
        assert place.registry.version("old").problems == []

    def test_uploads_that_did_not_end(self, place: Place) -> None:
        if not isinstance(place.store, MemoryStore):
            pytest.skip("a folder has none")
        place.store.begun = {"versions/x/model.safetensors"}
        result = place.run("gc", "--json").result
        assert result["uploads"] == ["versions/x/model.safetensors"] and place.store.begun
        assert "1 upload would go" in place.run("gc").stdout
        place.run("gc", "--run")
        assert not place.store.begun


COMMANDS = ("history", "show", "diff", "rollback", "gc")


def test_a_registry_that_is_not_there_is_named(tmp_path: Path) -> None:
    place = tmp_path / "nothing"
    for command in (*COMMANDS, "pin"):
        arguments = ["current"] if command == "pin" else []
        ran = memedit(command, "--registry", place, *arguments, "--json")
        assert (ran.code, ran.error["source"], ran.error["field"]) == (2, str(place), "registry")
        assert "no registry" in ran.error["message"]
    assert not place.exists()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "a b", "/etc/passwd", "s3://b/x"])
def test_a_hostile_name_is_refused(place: Place, name: str) -> None:
    before = place.store.sizes("", deep=True)
    for arguments in (("pin", name), ("pin", name, "--remove"), ("rollback", "--to", name)):
        ran = place.run(*arguments, "--json")
        assert ran.code == 2 and "no name of a version" in ran.error["message"], arguments
    assert place.store.sizes("", deep=True) == before


def test_a_job_file_names_the_registry_relative_to_itself(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "jobs" / "registry")
    publish(store, "a")
    Registry(store).move("a", expected=ABSENT, by="publish")
    config = tmp_path / "jobs" / "job.yaml"
    config.write_text("registry: registry\nkeep: 3\nfacts: f.jsonl\n")
    assert memedit("history", "--config", config, "--json").result["current"] == "a"
    assert memedit("show", "--config", config, "--json").result["version"] == "a"
    assert memedit("gc", "--config", config, "--json").result["removed"] == []


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3_443, "3.44 kB"), (999_600, "1 MB"),
     (41e9, "41 GB"), (5e15, "5e+03 TB")],
)  # fmt: skip
def test_sizes_for_reading(size: float, text: str) -> None:
    assert size_text(size) == text
