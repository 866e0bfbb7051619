"""The files of the fact log: changes that are there as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.store import LocalStore
from memedit.errors import InputError, LockError
from tests.workflows.runs import contents
from workflows.ingestion.claims import CLAIMS, Held, Rule
from workflows.ingestion.fact_log import HEAD, FactLog
from workflows.ingestion.head import Change, Head
from workflows.ingestion.merge import Merge
from workflows.ingestion.register import register_table
from workflows.ingestion.source import SourceRow


def says(subject: str, target: str, **more: Any) -> dict[str, Any]:
    return {"subject": subject, "prompt": "{} is in", "target_new": target} | more


class Place:
    """A registry on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "registry"
        self.log = self.open()

    def open(self) -> FactLog:
        return FactLog(str(self.folder), cache=self.folder.parent / "cache")

    def add(
        self,
        *raws: dict[str, Any],
        source: str = "a",
        rule: Rule = "newest",
        log: FactLog | None = None,
    ) -> Head:
        rows = [SourceRow(raw=raw, place="f", row=n) for n, raw in enumerate(raws, 1)]
        return register_table(log or self.log, iter([rows]), source=source, rule=rule, run="r")

    def active(self, log: FactLog | None = None) -> set[tuple[str, str]]:
        log = log or self.log
        rows = log.select(log.head(), "SELECT subject, target_new FROM state WHERE state='active'")
        return {(row["subject"], row["target_new"]) for row in rows}

    def set_head(self, **values: Any) -> None:
        path = self.folder / HEAD
        path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class TestChanges:
    def test_an_empty_log(self, place: Place) -> None:
        head = place.log.head()
        assert (head, head.active, head.mark("a")) == (Head(), 0, None)
        assert place.active() == set()
        assert place.log.rejected(head, limit=9) == []
        assert place.log.history(head, "true", {}) == []
        assert not place.folder.exists()

    def test_a_place_that_looks_like_a_partition(self, tmp_path: Path) -> None:
        place = Place(tmp_path / "source=prod")
        place.add(says("X", "Rome"))
        place.add(says("Y", "Bonn"))
        (row, _) = place.log.select(place.log.head(), "FROM state ORDER BY subject")
        assert (row["subject"], row["source"]) == ("X", "a")

    def test_what_the_database_cannot_do_names_the_registry(self, place: Place) -> None:
        place.add(says("X", "Rome"))
        with pytest.raises(InputError, match="Conversion Error") as raised:
            place.log.select(place.log.head(), "SELECT CAST(subject AS INT) FROM state")
        assert raised.value.source == str(place.folder)

    def test_the_rule_is_kept(self, place: Place) -> None:
        place.add(says("X", "Rome"))

        def make(now: Head, merge: Merge) -> Change:
            merge.decide("priority", ("a",))
            return Change(rule=("priority", ("a",)))

        head = place.log.commit(make)
        assert head == place.log.commit(make) == place.log.head()
        assert (head.conflicts, head.priority, head.sequence) == ("priority", ("a",), 2)
        place.set_head(conflicts="oldest")
        with pytest.raises(InputError, match="no rule 'oldest'"):
            place.log.head()

    def test_each_change_is_a_segment_and_a_state(self, place: Place) -> None:
        first = place.add(says("X", "Rome", id="1"), says("Y", "Bonn", id="2"))
        second = place.add(says("X", "Oslo", id="3"))
        assert [h.sequence for h in (first, second)] == [1, 2]
        assert second == place.log.head()
        assert second.counts == {"active": 2, "superseded": 1}
        segments = [pq.read_table(place.folder / name) for name in second.log]
        assert [s.num_rows for s in segments] == [2, 2]
        assert second.state is not None
        state = pq.read_table(place.folder / second.state)
        assert state.column("id").to_pylist() == ["1", "2", "3"]
        for table in (*segments, state):
            assert table.column_names == CLAIMS.names
            assert table.schema.field("said_at").type == CLAIMS.field("said_at").type
            assert table.schema.field("neighbourhood").type == CLAIMS.field("neighbourhood").type

    def test_what_changes_nothing_writes_nothing(self, place: Place) -> None:
        place.add(says("X", "Rome"))
        before = contents(place.folder)
        assert place.add(says("X", "Rome")).sequence == 1
        assert place.log.commit(lambda head, merge: None).sequence == 1
        assert contents(place.folder) == before

    def test_files_that_head_does_not_name_do_not_count(self, place: Place) -> None:
        head = place.add(says("X", "Rome"))
        for folder in ("log", "state", "rejects"):
            (place.folder / "facts" / folder).mkdir(exist_ok=True)
            (place.folder / "facts" / folder / "00000002-dead.parquet").write_bytes(b"half")
        assert place.open().head() == head
        assert place.add(says("Y", "Bonn")).sequence == 2
        assert place.active() == {("X", "Rome"), ("Y", "Bonn")}

    def test_a_change_that_fails_leaves_no_head(self, place: Place) -> None:
        def make(head: Head, merge: Merge) -> Change:
            raise InputError("no")

        with pytest.raises(InputError):
            place.log.commit(make)
        assert not (place.folder / HEAD).exists()

    def test_rejects_are_kept_with_their_change(self, place: Place) -> None:
        def rejecting(number: int) -> Any:
            row = {
                **{"run": "r", "source": "a", "snapshot": "s", "place": "f", "row": number},
                **{"field": None, "reason": "why", "raw": "{}"},
            }

            def make(head: Head, merge: Merge) -> Change:
                merge.hold([], run="r", rule="newest", priority=())
                return Change(rejects=[row])

            return make

        place.log.commit(rejecting(4))
        head = place.log.commit(rejecting(2))
        assert (head.sequence, place.log.count_rejected(head)) == (2, 2)
        assert [r["row"] for r in place.log.rejected(head, limit=9)] == [2, 4]
        assert [r["row"] for r in place.log.rejected(head, limit=1)] == [2]
        assert pq.read_table(place.folder / head.rejects[0]).num_rows == 1

    def test_times_go_on_where_the_clock_goes_back(self, place: Place) -> None:
        place.add(says("X", "Rome"))
        future = datetime.now(UTC) + timedelta(days=400)
        place.set_head(at=future.isoformat())
        head = place.add(says("X", "Oslo"))
        assert datetime.fromisoformat(head.at) == future + timedelta(microseconds=1)
        assert place.active() == {("X", "Oslo")}
        last = place.add(says("X", "Rome"))
        assert datetime.fromisoformat(last.at) > datetime.fromisoformat(head.at)
        times = [e["changed_at"] for e in place.log.history(last, "true", {})]
        assert times == sorted(times)
        assert place.active() == {("X", "Rome")}

    def test_a_time_without_a_zone_is_no_problem(self, place: Place) -> None:
        place.add(says("X", "Rome"))
        place.set_head(at="2026-11-27T00:00:00")
        assert place.add(says("X", "Oslo")).sequence == 2

    def test_a_quote_in_the_name_of_the_folder(self, tmp_path: Path) -> None:
        place = Place(tmp_path / "it's here")
        place.add(says("X", "Rome"))
        assert place.active() == {("X", "Rome")}


class TestDamage:
    @pytest.mark.parametrize(
        "content",
        [
            *(b"", b"{", b"[]", b"null", b"\xff", b'{"sequence": 1}', b"[" * 100_000),
            b'{"sequence": "x", "at": "", "log": [], "state": "", "rejects": []}',
        ],
    )
    def test_a_head_that_is_no_head(self, place: Place, content: bytes) -> None:
        place.add(says("X", "Rome"))
        (place.folder / HEAD).write_bytes(content)
        for ask in (place.log.head, lambda: place.add(says("Y", "Bonn"))):
            with pytest.raises(InputError, match="damaged") as raised:
                ask()
            assert raised.value.source == str(place.folder / HEAD)
        assert (place.folder / HEAD).read_bytes() == content

    @pytest.mark.parametrize(
        "values",
        [
            {"log": ["/etc/passwd"]},
            {"log": ["facts/../../x.parquet"]},
            {"state": "versions/x"},
            {"rejects": ["other/x.parquet"]},
            {"counts": {"active": "many"}},
            {"counts": []},
            {"read": 4},
            {"read": {"a": 4}},
            {"at": "yesterday"},
            {"log": 3},
            {"log": "facts/log/x"},
            {"state": None},
            {"sequence": "first"},
        ],
    )
    def test_a_head_that_cannot_be(self, place: Place, values: dict[str, Any]) -> None:
        place.add(says("X", "Rome"))
        place.set_head(**values)
        with pytest.raises(InputError, match="damaged"):
            place.log.head()

    def test_a_file_that_is_gone_or_damaged_is_named(self, place: Place) -> None:
        head = place.add(says("X", "Rome"))
        assert head.state is not None
        for change in (Path.unlink, lambda path: path.write_bytes(b"PAR1")):
            change(place.folder / head.state)
            with pytest.raises(InputError, match="missing or damaged") as raised:
                place.open().digest(head)
            assert head.state in str(raised.value.source)


class TestRaces:
    def test_a_change_that_comes_second_is_made_again_on_what_is_there_then(
        self, place: Place
    ) -> None:
        place.add(says("X", "Rome", id="1"))
        seen: list[int] = []

        def make(head: Head, merge: Merge) -> Change:
            seen.append(head.sequence)
            if len(seen) < 3:
                place.add(says(f"Y{len(seen)}", "Bonn"), log=place.open())
            rows = merge.database.execute("SELECT source, fact FROM state WHERE id = '1'")
            claims = [
                Held(source=s, fact=f, held="retracted", reason="why") for s, f in rows.fetchall()
            ]
            merge.hold(claims, run="r", rule="newest", priority=())
            return Change()

        head = place.log.commit(make)
        assert seen == [1, 2, 3]
        assert head == place.log.head()
        assert place.active() == {("Y1", "Bonn"), ("Y2", "Bonn")}
        assert [e["sequence"] for e in place.log.history(head, "true", {})] == [1, 2, 3, 4]

    def test_nothing_is_lost_where_many_write(self, place: Place) -> None:
        def add(number: int) -> Head:
            log = place.open()
            while True:
                try:
                    return place.add(says(f"X{number}", "Rome"), log=log)
                except LockError:  # the others were quicker, twenty times
                    continue

        with ThreadPoolExecutor(4) as pool:
            heads = list(pool.map(add, range(20)))
        assert sorted(h.sequence for h in heads) == list(range(1, 21))
        assert place.active() == {(f"X{n}", "Rome") for n in range(20)}

    def test_who_never_comes_through_is_told(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> str:
            raise LockError("taken")

        monkeypatch.setattr(LocalStore, "put", refuse)
        with pytest.raises(LockError, match="others change its facts"):
            place.add(says("X", "Rome"))


class TestScratch:
    def test_it_writes_nothing_into_the_registry(self, place: Place) -> None:
        place.add(says("X", "Rome"))
        before = contents(place.folder)
        scratch = place.log.scratch()
        assert (scratch.is_scratch, place.log.is_scratch) == (True, False)
        head = place.add(says("X", "Oslo"), log=scratch)
        assert place.add(says("Y", "Bonn"), log=scratch).sequence == 3
        assert head.sequence == 2
        assert place.active(scratch) == {("X", "Oslo"), ("Y", "Bonn")}
        assert len(scratch.history(scratch.head(), "true", {})) == 4
        assert place.active() == {("X", "Rome")}
        assert contents(place.folder) == before

    def test_of_an_empty_registry(self, place: Place) -> None:
        scratch = place.log.scratch()
        place.add(says("X", "Rome"), log=scratch)
        assert place.active(scratch) == {("X", "Rome")}
        assert not place.folder.exists()


class TestOnBase:
    def test_what_the_base_says_is_compacted_for_who_asks_and_active_in_the_log(
        self, place: Place
    ) -> None:
        place.add(says("X", "Rome", id="1"), says("Y", "Bonn", id="2"))
        place.add(says("Z", "Oslo", id="3"))
        log = place.log.on_base(1)
        assert place.active(log) == {("Z", "Oslo")}
        assert (log.count(log.head()), place.log.count(log.head())) == (1, 3)
        place.add(says("X", "Kyiv", id="1"), log=log)
        assert place.active(log) == {("Z", "Oslo"), ("X", "Kyiv")}
        assert place.active() == {("Z", "Oslo"), ("X", "Kyiv"), ("Y", "Bonn")}
        assert place.log.head().counts == {"active": 3, "superseded": 1}


class TestDifference:
    def told(self, place: Place, head: Head, since: int) -> tuple[int, list[str], list[str]]:
        found = place.log.difference(head, since)
        superseded = [row["target_new"] for row in found.superseded]
        return len(found.added), superseded, [row["target_new"] for row in found.retracted]

    def test_against_nothing_and_against_itself(self, place: Place) -> None:
        head = place.add(says("X", "Rome"), says("Y", "Bonn"))
        assert self.told(place, head, 0) == (2, [], [])
        assert self.told(place, head, 1) == (0, [], [])
        assert self.told(place, place.log.head(), 99) == (0, [], [])

    def test_superseded_and_retracted(self, place: Place) -> None:
        place.add(*(says("X", "Rome", id="1"), says("Y", "Bonn", id="2"), says("Z", "Kyiv")))
        place.add(says("X", "Oslo", id="3"))
        head = place.add({"id": "2", "retracted": True}, says("V", "Lima", id="9"))
        assert self.told(place, head, 1) == (2, ["Rome"], ["Bonn"])
        assert self.told(place, head, 2) == (1, [], ["Bonn"])
        assert self.told(place, head, 0) == (3, [], [])

    def test_an_id_with_another_question_supersedes(self, place: Place) -> None:
        place.add(says("X", "Rome", id="1"))
        head = place.add(says("Y", "Bonn", id="1"))
        assert self.told(place, head, 1) == (1, ["Rome"], [])

    def test_what_comes_and_goes_in_between_is_no_difference(self, place: Place) -> None:
        place.add(says("X", "Rome"))
        place.add(says("X", "Oslo"))
        head = place.add(says("X", "Rome"))
        assert self.told(place, head, 1) == (0, [], [])

    def test_another_source_that_says_the_same_is_no_difference(self, place: Place) -> None:
        place.add(says("X", "Rome", id="1"), source="a")
        place.add(says("X", "Rome", id="1"), source="b")
        head = place.add({"id": "1", "retracted": True}, source="b")
        assert self.told(place, head, 1) == (0, [], [])


ROWS = st.lists(
    st.builds(
        says,
        st.sampled_from("XY"),
        st.sampled_from(("Rome", "Oslo")),
        id=st.sampled_from(("1", "2")),
    ),
    min_size=1,
    max_size=4,
)


@given(first=ROWS, second=ROWS)
@settings(
    max_examples=6,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_the_digest_is_that_of_what_is_active(
    tmp_path_factory: pytest.TempPathFactory,
    first: Sequence[dict[str, Any]],
    second: Sequence[dict[str, Any]],
) -> None:
    one, two = (Place(tmp_path_factory.mktemp("place")) for _ in range(2))
    one.add(*first)
    one.add(*second)
    two.add(*first, *second)
    digests, active = [], []
    for place in (one, two):
        log, head = place.log, place.log.head()
        digests.append(log.digest(head))
        rows = log.select(head, "SELECT content FROM state WHERE state = 'active' ORDER BY content")
        active.append(rows)
        state = log.select(head, "FROM state ORDER BY source, fact")
        folded = {(e["source"], e["fact"]): e for e in log.history(head, "true", {})}
        assert {(r["source"], r["fact"]): r for r in state} == folded
        assert head.active == len(rows)
    assert active[0] == active[1]
    assert digests[0] == digests[1]
    one.add(says("Z", "Kyiv", id="9"))
    assert one.log.digest(one.log.head()) != digests[0]
    one.add({"id": "9", "retracted": True})
    assert one.log.digest(one.log.head()) == digests[0]
