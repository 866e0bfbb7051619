"""Fact tables in every file format, bad rows with their places, and what is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedit.errors import InputError
from memedit.layouts import to_row
from memedit.requests import EditRequest, Neighbour, Provenance
from workflows.facts import read_facts, write_facts, write_rejects

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"

ROWS: list[dict[str, Any]] = [
    {
        "id": "a",
        "subject": "Eiffel Tower",
        "prompt": "{} is in",
        "target_new": "Rome",
        "target_true": "Paris",
        "paraphrases": ["Find the Eiffel Tower in", 'Say "Eiffel Tower",\nthen'],
        "neighbourhood": [{"prompt": "The Louvre is in", "target": "Paris"}],
    },
    {"id": "b", "subject": "Zürich", "prompt": "Zürich lies in", "target_new": "Österreich"},
    {"id": "3", "subject": "東京", "prompt": "{}は", "target_new": "大阪"},
]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    columns = list(rows[0])
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


WRITERS = {".jsonl": lines, ".json": as_json, ".csv": as_csv, ".parquet": as_parquet}


class TestFormats:
    @pytest.mark.parametrize("suffix", WRITERS)
    def test_every_format_gives_the_same_requests(self, suffix: str, tmp_path: Path) -> None:
        path = WRITERS[suffix](tmp_path / f"facts{suffix}", ROWS)
        table = read_facts(path)
        assert [r.case_id for r in table.requests] == ["a", "b", "3"]
        assert to_row(table.requests[0]) == ROWS[0]
        assert table.requests[1].prompt == "{} lies in"
        assert (table.read, table.rejects, table.duplicates) == (3, (), ())
        assert len(table.batch) == 3

    def test_rows_are_where_an_editor_shows_them(self, tmp_path: Path) -> None:
        wanted = {".jsonl": [1, 2, 3], ".json": [1, 2, 3], ".parquet": [1, 2, 3]}
        wanted[".csv"] = [2, 4, 5]  # after the header; the first fact's cell has a line break
        rows = [{**ROWS[0], "prompt": "Q: {}\nA:"}, *ROWS[1:]]
        for suffix, numbers in wanted.items():
            path = WRITERS[suffix](tmp_path / f"facts{suffix}", rows)
            places = [r.provenance for r in read_facts(path).requests]
            assert places == [Provenance(source=str(path), row=n) for n in numbers], suffix

    def test_json_text_in_parquet_columns(self, tmp_path: Path) -> None:
        row = {**ROWS[0], **{k: json.dumps(ROWS[0][k]) for k in ("paraphrases", "neighbourhood")}}
        table = read_facts(as_parquet(tmp_path / "f.parquet", [row]))
        assert to_row(table.requests[0]) == ROWS[0]

    @pytest.mark.parametrize("column", ["references", "questions", "edit", "answers"])
    def test_a_csv_with_a_column_that_is_a_list_elsewhere(
        self, tmp_path: Path, column: str
    ) -> None:
        row = {"subject": "Rome", "prompt": "{} is in", "target_new": "France", column: "see there"}
        (request,) = read_facts(as_csv(tmp_path / "f.csv", [row])).requests
        assert request.target_new == "France"
        assert request.references == (("see there",) if column == "references" else ())

    def test_a_csv_of_another_layout(self, tmp_path: Path) -> None:
        rewrite = {
            "prompt": "{} is in",
            "subject": "Rome",
            "target_new": {"str": "Spain"},
            "target_true": {"str": "Italy"},
        }
        row = {"case_id": "1", "requested_rewrite": rewrite, "paraphrase_prompts": ["Rome: in"]}
        (request,) = read_facts(as_csv(tmp_path / "f.csv", [row])).requests
        assert (request.target_new, request.paraphrases) == ("Spain", ("Rome: in",))

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
    def test_a_byte_order_mark_is_accepted(self, suffix: str, tmp_path: Path) -> None:
        path = WRITERS[suffix](tmp_path / f"f{suffix}", ROWS)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert len(read_facts(path).requests) == 3

    def test_windows_line_ends_blank_lines_and_no_last_line_end(self, tmp_path: Path) -> None:
        path = tmp_path / "f.jsonl"
        path.write_bytes(b"\r\n\n".join(json.dumps(row).encode() for row in ROWS))
        assert [r.provenance and r.provenance.row for r in read_facts(path).requests] == [1, 3, 5]

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
    def test_a_huge_cell_is_no_problem(self, suffix: str, tmp_path: Path) -> None:
        limit = csv.field_size_limit()
        row = {**ROWS[0], "paraphrases": ["x" * 3_000_000]}
        (request,) = read_facts(WRITERS[suffix](tmp_path / f"f{suffix}", [row])).requests
        assert len(request.paraphrases[0]) == 3_000_000
        assert csv.field_size_limit() == limit


class TestUnreadable:
    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such file") as raised:
            read_facts(tmp_path / "none.jsonl")
        assert str(raised.value.source) == str(tmp_path / "none.jsonl")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="not a file"):
            read_facts(tmp_path)

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "f.xlsx").write_text("x")
        with pytest.raises(InputError, match=r"'\.xlsx'.*\.jsonl"):
            read_facts(tmp_path / "f.xlsx")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("f.jsonl", ""),
            ("f.jsonl", "\n \n"),
            ("f.json", "[]"),
            ("f.csv", ""),
            ("f.csv", "subject,prompt,target_new\n"),
        ],
    )
    def test_no_row(self, name: str, content: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        for on_bad_row in ("fail", "skip"):
            with pytest.raises(InputError, match="no row in it"):
                read_facts(tmp_path / name, on_bad_row=on_bad_row)  # type: ignore[arg-type]

    def test_no_row_in_parquet(self, tmp_path: Path) -> None:
        table = pa.Table.from_pylist(ROWS)[:0]
        pq.write_table(table, tmp_path / "f.parquet")
        with pytest.raises(InputError, match="no row in it"):
            read_facts(tmp_path / "f.parquet")

    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    def test_a_missing_column_is_named_whatever_happens_to_bad_rows(
        self, suffix: str, tmp_path: Path
    ) -> None:
        rows = [{"subject": "Rome", "prompt": "{} is in", "target": "Spain"}]
        path = WRITERS[suffix](tmp_path / f"f{suffix}", rows)
        with pytest.raises(InputError, match="no column 'target_new'") as raised:
            read_facts(path, on_bad_row="skip")
        assert raised.value.field == "target_new"
        assert "columns found: subject, prompt, target" in raised.value.message

    def test_columns_of_no_layout(self, tmp_path: Path) -> None:
        path = as_csv(tmp_path / "f.csv", [{"head": "Rome", "tail": "Spain"}])
        with pytest.raises(InputError, match="unknown layout; fields found: head, tail"):
            read_facts(path)

    def test_a_column_twice(self, tmp_path: Path) -> None:
        (tmp_path / "f.csv").write_text("subject,prompt,target_new,subject\na,{} b,c,d\n")
        with pytest.raises(InputError, match="'subject' occurs twice"):
            read_facts(tmp_path / "f.csv")

    def test_not_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "f.parquet").write_bytes(b"PAR1 this is not PAR1")
        with pytest.raises(InputError, match="not a readable Parquet file"):
            read_facts(tmp_path / "f.parquet")

    @pytest.mark.parametrize(
        ("content", "row"), [('[{"a": 1},\n {"b" 2}]', 2), ('{"a": 1}\n{"a": 2}', 2), ("{}", None)]
    )
    def test_not_a_json_array(self, content: str, row: int | None, tmp_path: Path) -> None:
        (tmp_path / "f.json").write_text(content)
        with pytest.raises(InputError, match=r"array.*\.jsonl") as raised:
            read_facts(tmp_path / "f.json")
        assert raised.value.row == row

    def test_an_open_quote_in_csv(self, tmp_path: Path) -> None:
        (tmp_path / "f.csv").write_text('subject,prompt,target_new\na,{} b,"c\n')
        with pytest.raises(InputError, match="not CSV"):
            read_facts(tmp_path / "f.csv")

    def test_csv_in_another_encoding_names_the_line(self, tmp_path: Path) -> None:
        text = "subject,prompt,target_new\na,{} b,c\nZürich,{} b,c\n"
        (tmp_path / "f.csv").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match="not UTF-8") as raised:
            read_facts(tmp_path / "f.csv")
        assert raised.value.row == 3


GOOD = json.dumps(ROWS[0])


class TestBadRows:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"{not json}", "not JSON"),
            (b"[1, 2]", "expected an object .*, found a list"),
            (b"7", "found a number"),
            ("{'subject': 'Zürich'}".encode("latin-1"), "not UTF-8"),
            (b'{"subject": "a", "subject": "b"}', "'subject' occurs twice"),
            (b"[" * 100_000, "not JSON"),
            (b"1" * 5_000, "not JSON"),
        ],
    )
    def test_a_bad_line_fails_or_is_skipped(self, line: bytes, reason: str, tmp_path: Path) -> None:
        path = tmp_path / "f.jsonl"
        path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
        with pytest.raises(InputError, match=reason) as raised:
            read_facts(path)
        assert (raised.value.source, raised.value.row) == (str(path), 2)
        table = read_facts(path, on_bad_row="skip")
        (reject,) = table.rejects
        assert (table.read, len(table.requests), reject.row) == (2, 1, 2)

    def test_all_bad_rows_are_counted_and_ten_are_listed(self, tmp_path: Path) -> None:
        bad = [{**ROWS[0], "id": str(n), "target_new": " "} for n in range(14)]
        path = lines(tmp_path / "f.jsonl", [ROWS[0], *bad])
        with pytest.raises(InputError) as raised:
            read_facts(path)
        message = str(raised.value)
        assert message.startswith(f"{path}:2 [target_new]: holds only whitespace")
        assert "13 more bad rows" in message
        assert "row 11 [target_new]" in message
        assert "row 12" not in message

    def test_csv_rows_with_other_numbers_of_cells(self, tmp_path: Path) -> None:
        text = "subject,prompt,target_new\nRome,{} is in,Spain\nOslo,{} is in\nBonn,{},x,y\n"
        (tmp_path / "f.csv").write_text(text)
        table = read_facts(tmp_path / "f.csv", on_bad_row="skip")
        assert [(r.row, r.reason[:7]) for r in table.rejects] == [(3, "2 cells"), (4, "4 cells")]

    def test_an_empty_csv_cell_is_an_empty_target_but_an_absent_option(
        self, tmp_path: Path
    ) -> None:
        text = "id,subject,prompt,target_new,target_true\n,Rome,{} is in,Spain,\n1,Oslo,{} is,,x\n"
        (tmp_path / "f.csv").write_text(text)
        table = read_facts(tmp_path / "f.csv", on_bad_row="skip")
        assert table.requests[0].target_true is None
        assert [(r.field, r.reason) for r in table.rejects] == [
            ("target_new", "is empty; write the text")
        ]

    def test_a_csv_list_that_is_no_json(self, tmp_path: Path) -> None:
        row = {**ROWS[0], "paraphrases": "Find it in"}
        with pytest.raises(InputError, match="written as JSON") as raised:
            read_facts(as_csv(tmp_path / "f.csv", [row]))
        assert (raised.value.row, raised.value.field) == (2, "paraphrases")

    def test_a_conflict_rejects_both_rows_and_names_both(self, tmp_path: Path) -> None:
        other = {**ROWS[0], "id": "z", "target_new": "Oslo"}
        path = lines(tmp_path / "f.jsonl", [*ROWS, other])
        with pytest.raises(InputError, match="different targets") as raised:
            read_facts(path)
        assert f"{path}:1" in raised.value.message
        assert f"{path}:4" in raised.value.message
        table = read_facts(path, on_bad_row="skip")
        assert [r.row for r in table.rejects] == [1, 4]
        assert [r.case_id for r in table.requests] == ["b", "3"]

    def test_one_id_for_two_facts(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "f.jsonl", [ROWS[0], {**ROWS[1], "id": "a"}])
        with pytest.raises(InputError, match="ids must be unique"):
            read_facts(path)

    def test_duplicates_are_merged_and_counted(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "f.jsonl", [*ROWS, {**ROWS[0], "id": "again"}])
        table = read_facts(path)
        assert (table.read, len(table.requests)) == (4, 3)
        assert [(d.kept.case_id, d.dropped.case_id) for d in table.duplicates] == [("a", "again")]

    def test_skipping_everything_is_an_error(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "f.jsonl", [{**ROWS[0], "target_new": ""}, 7])
        with pytest.raises(InputError, match="none of 2 rows can be used") as raised:
            read_facts(path, on_bad_row="skip")
        assert (raised.value.row, raised.value.field) == (1, "target_new")


class TestLaterRejection:
    def test_gives_a_new_table_with_the_reason(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "f.jsonl", ROWS)
        table = read_facts(path)
        smaller = table.reject("b", "the tokenizer cannot locate the subject")
        assert len(table.requests) == 3
        assert [r.case_id for r in smaller.requests] == ["a", "3"]
        (reject,) = smaller.rejects
        assert (reject.source, reject.row, reject.field) == (str(path), 2, "subject")
        assert reject.raw["subject"] == "Zürich"
        with pytest.raises(InputError, match="cannot locate") as raised:
            smaller.require_no_rejects()
        assert raised.value.row == 2
        table.require_no_rejects()

    def test_nothing_left_is_an_error(self, tmp_path: Path) -> None:
        table = read_facts(lines(tmp_path / "f.jsonl", ROWS[:1])).reject("a", "why")
        with pytest.raises(InputError, match="none of 1 rows"):
            table.require_requests()

    def test_an_unknown_id_is_a_mistake_of_the_caller(self, tmp_path: Path) -> None:
        table = read_facts(lines(tmp_path / "f.jsonl", ROWS))
        with pytest.raises(KeyError):
            table.reject("nobody", "why")


class TestWriting:
    def test_rejects_have_place_field_reason_and_the_raw_row(self, tmp_path: Path) -> None:
        path = tmp_path / "f.jsonl"
        bad = {**ROWS[1], "target_new": "\ud800"}
        path.write_text(GOOD + "\nnot json\n" + json.dumps(bad) + "\n")
        write_rejects(tmp_path / "r.jsonl", read_facts(path, on_bad_row="skip").rejects)
        first, second = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
        assert list(first) == ["source", "row", "field", "reason", "raw"]
        assert (first["row"], first["field"], first["raw"]) == (2, None, "not json")
        assert (second["row"], second["field"], second["raw"]) == (3, "target_new", bad)

    def test_a_parquet_row_with_types_that_json_lacks(self, tmp_path: Path) -> None:
        import datetime

        row = {**ROWS[1], "target_new": " ", "seen": datetime.date(2026, 1, 2), "blob": b"x"}
        good = {**ROWS[0], "seen": None, "blob": None}
        path = as_parquet(tmp_path / "f.parquet", [good, row])
        write_rejects(tmp_path / "r.jsonl", read_facts(path, on_bad_row="skip").rejects)
        assert json.loads((tmp_path / "r.jsonl").read_text())["raw"]["seen"] == "2026-01-02"

    def test_nothing_half_written(self, tmp_path: Path) -> None:
        def failing() -> Any:
            yield EditRequest(case_id="1", subject="a", prompt="{}", target_new="b")
            raise RuntimeError("stop")

        (tmp_path / "f.jsonl").write_text("before")
        with pytest.raises(RuntimeError, match="stop"):
            write_facts(tmp_path / "f.jsonl", failing())
        assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]
        assert (tmp_path / "f.jsonl").read_text() == "before"

    words = st.text(
        st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12
    ).map(lambda text: text.replace("{}", ""))

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.tuples(words, words, words, st.lists(words, max_size=2), st.none() | words),
            min_size=1,
            max_size=5,
        )
    )
    def test_what_is_written_is_read_back(
        self, tmp_path_factory: pytest.TempPathFactory, facts: list[Any]
    ) -> None:
        folder = tmp_path_factory.mktemp("facts")
        raw = [
            {
                "id": n,
                "subject": subject,
                "prompt": f"{{}} {prompt} {n}",
                "target_new": f"{target} {n}",
                "target_true": true,
                "paraphrases": paraphrases,
                "neighbourhood": [{"prompt": p, "target": target} for p in paraphrases],
            }
            for n, (subject, prompt, target, paraphrases, true) in enumerate(facts)
        ]
        lines(folder / "raw.jsonl", raw)
        try:
            first = read_facts(folder / "raw.jsonl", on_bad_row="skip")
        except InputError:  # every text of it was blank
            return
        write_facts(folder / "facts.jsonl", first.requests)
        second = read_facts(folder / "facts.jsonl")
        assert second.requests == first.requests
        assert second.batch.digest == first.batch.digest

    def test_neighbours_survive(self, tmp_path: Path) -> None:
        request = EditRequest(
            case_id="1",
            subject="Rome",
            prompt="{} is",
            target_new="big",
            neighbourhood=(Neighbour(prompt="Oslo is", target="cold"),),
        )
        write_facts(tmp_path / "f.jsonl", [request])
        assert read_facts(tmp_path / "f.jsonl").requests == (request,)


@pytest.mark.parametrize(
    ("name", "count"), [("counterfact-2000.jsonl", 2000), ("zsre-mend-300.json", 300)]
)
def test_real_tables(name: str, count: int) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"needs ../shared/data/{name}")
    table = read_facts(DATA / name)
    assert (table.read, len(table.requests), len(table.batch)) == (count, count, count)
