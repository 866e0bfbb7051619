"""Pairs of relations edited together and apart: which facts, and that it is what `edit` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from memedit.errors import InputError
from memedit.requests import EditRequest
from tests.tiny import save_tiny
from tests.workflows.runs import Ran, edit, memedit, quick, write_rows
from workflows.mixing import pairs_of

CITY, TONGUE = "{} is located in the city of", "The mother tongue of {} is"
ROWS: list[dict[str, Any]] = [
    *(
        {"id": name, "subject": name, "prompt": CITY, "target_new": new, "target_true": "Paris"}
        for name, new in (("Eiffel Tower", "Rome"), ("Louvre", "London"), ("Toyota", "Spain"))
    ),
    *(
        {"id": name, "subject": name, "prompt": TONGUE, "target_new": new, "target_true": "French"}
        for name, new in (("Bill Gates", "English"), ("Danielle Darrieux", "Spanish"))
    ),
    {"subject": "Mont Blanc", "prompt": "{} is a part of", "target_new": "Spain"},
]


def fact(subject: str, prompt: str, target: str | None = None) -> EditRequest:
    new = target or f"object of {prompt}"
    return EditRequest(case_id=subject, subject=subject, prompt=prompt, target_new=new)


def test_the_relations_with_the_most_facts_are_paired() -> None:
    counts = {"a {}": 2, "b {}": 7, "c {}": 5, "d {}": 4, "e {}": 1}
    facts = [fact(f"{name[0]}{i}", name) for i in range(7) for name in counts if i < counts[name]]
    first, second = pairs_of(facts, 2)
    assert (first.relations, first.edits) == (("b {}", "c {}"), 4)
    assert (second.relations, second.edits) == (("d {}", "a {}"), 2)
    assert [[f.subject for f in side] for side in first.judged] == [["b0", "b1"], ["c0", "c1"]]
    assert [f.subject for f in first.facts[1]] == ["c0", "c1", "c2", "c3"]
    assert pairs_of(facts, 0) == []
    with pytest.raises(InputError, match=r"take 6 relations .* 2 pairs can be made"):
        pairs_of(facts, 3)


def test_two_wordings_of_one_relation_are_no_pair() -> None:
    names = {"{} speaks": 4, "{} is in": 3, "The language of {} is": 3, "{} plays": 2}
    facts = [
        fact(f"{name}{i}", name, f"{'language' if 'a' in name[3:] else name} {i % 2}")
        for name, count in names.items()
        for i in range(count)
    ]
    (pair,) = pairs_of(facts, 1)
    assert pair.relations == ("{} speaks", "{} is in")
    with pytest.raises(InputError, match="1 pair can be made"):
        pairs_of(facts, 2)


def test_a_relation_without_a_partner_is_passed_over() -> None:
    objects = {"{} is in": ("Rome", "Paris"), "{} was in": ("Rome",), "{} lies in": ("Paris",)}
    facts = [
        fact(f"{name}{i}", name, of[i % len(of)])
        for name, of in objects.items()
        for i in range(2 * len(of))
    ]
    (pair,) = pairs_of(facts, 1)
    assert pair.relations == ("{} lies in", "{} was in")


def compare(base: Path, folder: Path, *more: object) -> Ran:
    facts = write_rows(folder / "facts.jsonl", ROWS)
    flags = (*quick(base, folder / "cache"), "--facts", facts, "--edits", "1", *more)
    return memedit("compare", *flags, "--out", folder / "out")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("mixing") / "base")


def test_a_pair_is_judged_as_edit_would_write_it(base: Path, tmp_path: Path) -> None:
    """The facts that come first in canonical order, with one of the other relation or of theirs."""
    result = compare(base, tmp_path, "--methods", "memit", "--pairs", "1").result
    (row,) = result["pairs"]
    assert row["relations"] == [CITY, TONGUE] and row["edits"] == 2 and row["failed"] is None

    def written(rows: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
        facts = write_rows(tmp_path / f"{name}.jsonl", rows)
        done = edit(base, facts, tmp_path / name, tmp_path / "cache")
        assert done.code == 0, done.stderr
        judged = pq.read_table(tmp_path / name / "facts.parquet").to_pylist()
        return {r["case_id"]: r for r in judged if r["model"] == "after"}

    cities = list(written(ROWS[:3], "order"))[:2]
    tongues = list(written(ROWS[3:5], "others"))
    asked = [cities[0], tongues[0]]
    of = {r["subject"]: r for r in ROWS}
    together = written([of[name] for name in asked], "together")
    apart = written([of[name] for name in cities], "apart") | written(ROWS[3:5], "tongues")
    for side, judged in (("together", together), ("apart", apart)):
        for metric in ("efficacy", "efficacy_exact", "generation"):
            share = 100 * sum(judged[name][metric] for name in asked) / 2
            assert row[side][metric] == pytest.approx(share)
    low, high = row["changes"]["efficacy_exact"]
    change = row["together"]["efficacy_exact"] - row["apart"]["efficacy_exact"]
    assert low <= change <= high
    table = pq.read_table(tmp_path / "out" / "judgements.parquet").to_pylist()
    for side, judged in (("together", together), ("apart", apart)):
        found = {r["case_id"]: r["logprob_new"] for r in table if r["side"] == side}
        assert found == {
            name: pytest.approx(judged[name]["logprob_new"], abs=1e-4) for name in asked
        }
    assert abs(together[asked[0]]["logprob_new"] - apart[asked[0]]["logprob_new"]) > 1e-3

    page = (tmp_path / "out" / "page.html").read_text()
    assert "Two relations together and apart" in page and CITY in page


def test_a_method_that_fails_on_a_pair_says_why(base: Path, tmp_path: Path) -> None:
    none = ("--set", "solve.null_threshold=1e-9")
    more = ("--methods", "alphaedit", "--pairs", "1", *none)
    (row,) = compare(base, tmp_path, *more).result["pairs"]
    assert row["together"] is None and "raise solve.null_threshold" in row["failed"]
    assert row["failed"].startswith("together: ")
    assert "raise solve.null_threshold" in (tmp_path / "out" / "page.html").read_text()


def test_too_few_relations_are_refused_at_once(base: Path, tmp_path: Path) -> None:
    ran = compare(base, tmp_path, "--pairs", "2")
    assert ran.code == 2 and ran.error["field"] == "pairs"
    assert not (tmp_path / "out").exists()


def test_a_terminal_shows_pairs(base: Path, tmp_path: Path) -> None:
    facts = write_rows(tmp_path / "facts.jsonl", ROWS)
    flags = [f for f in quick(base, tmp_path / "cache") if f != "--json"]
    more = ("--edits", "1", "--methods", "memit", "--pairs", "1", "--out", tmp_path / "out")
    ran = memedit("compare", *flags, "--facts", facts, *more)
    assert ran.code == 0 and "mother tongue" in ran.stdout
    assert "together   apart" in ran.stdout and "…" not in ran.stdout
