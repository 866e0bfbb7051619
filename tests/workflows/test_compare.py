"""`memedit compare` on a tiny model: the table, the judgements, the page, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from memedit.defaults import ALPHAEDIT_LAM
from memedit.outcome import METRIC_KEYS
from tests.tiny import save_tiny
from tests.workflows.runs import Ran, edit, measured, memedit, quick, setting, write_rows

METHODS = "memit,memedit,emmet,alphaedit"


def compare(model: Path, facts: Path, out: Path, cache: Path, *more: object) -> Ran:
    return memedit("compare", *quick(model, cache), "--facts", facts, "--out", out, *more)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("compare") / "base")


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("done")
    facts = write_rows(folder / "facts.jsonl")
    more = ("--methods", METHODS, "--edits", "3,1")
    settings = setting("solve.null_threshold=1e-9")
    return folder, compare(base, facts, folder / "out", folder / "cache", *more, *settings).result


def row(result: dict[str, Any], method: str, edits: int) -> dict[str, Any]:
    (found,) = [r for r in result["rows"] if (r["method"], r["edits"]) == (method, edits)]
    return found


def test_every_method_has_a_row_for_each_number_of_facts(done: tuple[Path, Any]) -> None:
    folder, result = done
    names = ["base", *METHODS.split(",")]
    assert [(r["method"], r["edits"]) for r in result["rows"]] == [
        (name, edits) for edits in (1, 3) for name in names
    ]
    for found in result["rows"]:
        if found["method"] != "alphaedit":
            assert tuple(found["metrics"]) == METRIC_KEYS and found["failed"] is None
    assert row(result, "base", 3)["metrics"]["drift_kl"] == 0
    assert row(result, "memit", 3)["moved"] > 0
    assert json.loads((folder / "out" / "results.json").read_text()) == result


def test_a_method_that_fails_says_why_and_the_others_go_on(done: tuple[Path, Any]) -> None:
    """So small a threshold leaves AlphaEdit no null space."""
    for edits in (1, 3):
        found = row(done[1], "alphaedit", edits)
        assert found["metrics"] is None and "raise solve.null_threshold" in found["failed"]


def test_a_row_is_what_edit_gives(base: Path, done: tuple[Path, Any]) -> None:
    folder, result = done
    for method in ("memit", "memedit", "emmet"):
        ran = edit(
            base, folder / "facts.jsonl", folder / method, folder / "cache", "--method", method
        )
        expected, found = ran.result["metrics"], row(result, method, 3)["metrics"]
        assert measured(found) == pytest.approx(measured(expected["after"]), rel=1e-5)
        base_row = row(result, "base", 3)["metrics"]
        assert measured(base_row) == pytest.approx(measured(expected["before"]))


def test_every_judgement_is_in_the_table(done: tuple[Path, Any]) -> None:
    folder, result = done
    rows = pq.read_table(folder / "out" / "judgements.parquet").to_pylist()
    assert len(rows) == 4 * (1 + 3)
    of_three = [r for r in rows if (r["method"], r["edits"]) == ("memit", 3)]
    assert {r["relation"] for r in of_three} == {
        "{} is located in the city of",
        "The mother tongue of {} is",
        "{} produces cars in",
    }
    exact = 100 * sum(r["efficacy_exact"] for r in of_three) / 3
    assert exact == pytest.approx(row(result, "memit", 3)["metrics"]["efficacy_exact"])
    assert all(math.isfinite(r["logprob_new"]) for r in rows)


def test_each_relation_has_its_metrics(done: tuple[Path, Any]) -> None:
    folder, result = done
    relations = row(result, "memit", 3)["relations"]
    assert {r["relation"]: r["facts"] for r in relations} == {
        "{} is located in the city of": 1,
        "The mother tongue of {} is": 1,
        "{} produces cars in": 1,
    }
    judged = pq.read_table(folder / "out" / "judgements.parquet").to_pylist()
    for relation in relations:
        (fact,) = [
            f
            for f in judged
            if (f["method"], f["edits"], f["relation"]) == ("memit", 3, relation["relation"])
        ]
        assert relation["metrics"]["efficacy_exact"] == 100 * fact["efficacy_exact"]
        assert ("paraphrase" in relation["metrics"]) == bool(fact["paraphrase"])
    page = (folder / "out" / "page.html").read_text()
    assert page.count("by relation</h3>") == 1  # with one fact there is one relation
    assert "The mother tongue of {} is" in page


def test_the_page_needs_nothing_else(done: tuple[Path, Any]) -> None:
    page = (done[0] / "out" / "page.html").read_text()
    assert page.count("<svg") == 5 and "http" not in page.replace("http://www.w3.org", "")
    assert "raise solve.null_threshold" in page and "3 facts" in page and "1 fact<" in page


def test_methods_of_one_layer(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.session.doubt_of", lambda *_: "λ is guessed")
    facts = write_rows(tmp_path / "facts.jsonl")
    more = ("--methods", "rome,ft", "--edits", "2")  # of the layers 1 and 2 the last
    ran = compare(base, facts, tmp_path / "out", tmp_path / "cache", *more)
    assert ran.stderr.count("guessed") == 1  # not for each method
    result = ran.result
    assert [r["layers"] for r in result["rows"]] == [[], [2], [2]]
    assert all(r["failed"] is None for r in result["rows"])


def test_lambda_is_that_of_memit_and_not_alphaedits(base: Path, tmp_path: Path) -> None:
    facts, cache = write_rows(tmp_path / "facts.jsonl"), tmp_path / "cache"
    given = setting("solve.lam=1", "solve.null_threshold=1")
    more = ("--methods", "memit,alphaedit", "--edits", "3", *given)
    result = compare(base, facts, tmp_path / "out", cache, *more).result
    found = row(result, "alphaedit", 3)
    assert found["failed"] is None
    assert (row(result, "memit", 3)["lam"], found["lam"]) == (1, ALPHAEDIT_LAM)
    its_own = setting(f"solve.lam={ALPHAEDIT_LAM}", "solve.null_threshold=1")
    ran = edit(base, facts, tmp_path / "alone", cache, "--method", "alphaedit", *its_own)
    alone = ran.result["metrics"]["after"]
    assert measured(found["metrics"]) == pytest.approx(measured(alone), rel=1e-5)


def test_the_base_may_be_named_and_has_one_row(base: Path, tmp_path: Path) -> None:
    facts = write_rows(tmp_path / "facts.jsonl")
    more = ("--methods", "base,memit", "--edits", "1")
    result = compare(base, facts, tmp_path / "out", tmp_path / "cache", *more).result
    assert [(r["method"], r["failed"]) for r in result["rows"]] == [("base", None), ("memit", None)]


@pytest.mark.parametrize(
    ("more", "field", "says"),
    [
        (("--methods", "memit,rom"), "methods", "did you mean 'rome'"),
        (("--edits", "1,x"), "edits", "write 1,10,100"),
        (("--edits", "0"), "edits", "write 1,10,100"),
        (("--edits", "4"), "edits", "holds 3 facts"),
        (("--methods", "memit,ft", "--dtype", "bfloat16"), "dtype", "float32"),
    ],
)
def test_what_cannot_be_compared(
    base: Path, tmp_path: Path, more: tuple[str, ...], field: str, says: str
) -> None:
    facts = write_rows(tmp_path / "facts.jsonl")
    ran = compare(base, facts, tmp_path / "out", tmp_path / "cache", "--edits", "1", *more)
    assert ran.code == 2, ran.stderr
    assert ran.error["field"] == field and says in ran.error["message"]
    assert not (tmp_path / "out").exists()
