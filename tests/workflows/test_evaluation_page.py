"""The page of an evaluation, of made-up judgements."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from memedit.intervals import changes_of
from memedit.outcome import Evaluation, FactResult
from tests.workflows.outcomes import example_outcome
from tests.workflows.test_report import HOSTILE, Page
from workflows.evaluate import Evaluated
from workflows.evaluation_page import render_evaluation, write_evaluation
from workflows.findings import failures, weakest
from workflows.judgements import relation_metrics


def example(facts: int = 100) -> Evaluated:
    outcome = example_outcome(facts)
    before, after = outcome.before, outcome.after
    return Evaluated(
        model="runs/demo",
        base="smollm2",
        text="wiki.txt",
        facts=outcome.facts,
        before=before,
        after=after,
        changes=changes_of(before.facts, after.facts),
        relations=relation_metrics(after.facts),
        timings_s={"load": 1.5, "evaluate": 61.0, "total": 62.5},
        out="runs/judged",
    )


@pytest.fixture(scope="module")
def text() -> str:
    return render_evaluation(example())


def test_it_begins_with_the_verdict(text: str) -> None:
    found, page = example(), Page(text)
    after_heading = page.text.partition(found.verdict.headline)[2]
    assert after_heading.strip().startswith(found.verdict.success)
    assert found.verdict.damage in page.text
    assert page.text.index(found.verdict.headline) < page.text.index("Before and after")
    assert "memedit evaluate · runs/demo against smollm2" in page.text


def test_the_page_needs_nothing_from_outside(text: str) -> None:
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "script", "iframe", "img", "base"}
    asking = {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}
    for tag, attributes in page.tags:
        for name in asking & set(attributes):
            assert (attributes[name] or "").startswith("#"), (tag, name)
    assert "@import" not in text and "@font-face" not in text
    assert set(re.findall(r"https?://[^\"'<> ]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@media (prefers-color-scheme: dark)" in text and "@media print" in text


def test_metrics_have_the_base_the_change_and_intervals(text: str) -> None:
    found = example()
    assert found.before is not None
    row = re.search(r"<th scope=\"row\">Paraphrase<small>.*?</tr>", text)
    assert row
    cells = re.findall(r"<td class=\"([^\"]*)\">(.*?)</td>", row.group())
    assert [name for name, _ in cells] == ["n", "n after", "n better"]
    said = [re.split(r"<[^>]*>", cell) for _, cell in cells]
    for values, evaluation in zip(said, (found.before, found.after), strict=False):
        low, high = evaluation.intervals["paraphrase"]
        assert values[0] == f"{evaluation.metrics['paraphrase']:.1f}"
        assert values[1] == f"{low:.0f}\N{EN DASH}{high:.0f}"
    low, high = found.changes["paraphrase"]
    assert f"{low:+.1f} to {high:+.1f}" in said[2]
    assert "<svg" in text and 'class="key ring"' in text


def test_what_failed_is_shown_with_both_continuations(text: str) -> None:
    found = example()
    assert found.before is not None
    old, new = found.before.facts, found.after.facts
    shown = [*failures(old, new), *weakest(old, new)]
    for name, facts in (
        ("Said before", [each.before for each in shown]),
        ("Says now", [each.after for each in shown]),
    ):
        cells = re.findall(rf'<td data-name="{name}">(.*?)</td>', text)
        plain = [" ".join(re.sub("<[^>]*>", "", cell).split()) for cell in cells]
        said = [" ".join(fact.continuation.split()) for fact in facts if fact is not None]
        assert plain == said
    assert "no trace of the z optimisation" not in text, "nobody asked for one"
    assert "Neighbours lost" in text


def test_a_relation_of_one_fact_has_no_interval_and_no_arrow_to_one() -> None:
    found = example()
    assert found.before is not None
    first, *others = found.before.facts
    before = replace(found.before, facts=(replace(first, relation="alone"), *others))
    first, *others = found.after.facts
    after = replace(found.after, facts=(replace(first, relation="alone"), *others))
    text = render_evaluation(replace(found, before=before, after=after))
    (row,) = re.findall(r"<th scope=\"row\">alone</th>.*?</tr>", text)
    smalls = re.findall(r"<small>(.*?)</small>", row)
    assert smalls and not [cell for cell in smalls if "→" in cell]
    assert re.search(r"\d → \d", text.replace(row, ""))


def test_without_a_base_nothing_is_said_of_before() -> None:
    found = example()
    metrics = found.after.metrics | {"drift_kl": None, "drift_top1": None}
    found = replace(
        found, base=None, before=None, after=replace(found.after, metrics=metrics), changes={}
    )
    page = Page(render_evaluation(found))
    assert "--base judges that checkpoint, too" in page.text
    assert "Damage elsewhere was not measured." in page.text
    for words in ("Before", "before ", "Change", "Neighbours lost", "against"):
        assert words not in page.text.replace("before it was edited", "").replace("said before", "")


def _hostile(facts: tuple[FactResult, ...]) -> tuple[FactResult, ...]:
    return tuple(
        replace(
            fact,
            case_id=HOSTILE,
            relation=f"{HOSTILE}{i % 2}",
            prompt=HOSTILE,
            continuation=HOSTILE + " & <b>",
            target_new='alert("x")',
            target_true="<img",
            efficacy=False,
        )
        for i, fact in enumerate(facts)
    )


@pytest.mark.parametrize("compared", [True, False])
def test_texts_of_facts_and_models_cannot_run_anything(compared: bool) -> None:
    found = example(4)
    assert found.before is not None

    def hostile(evaluation: Evaluation) -> Evaluation:
        return replace(evaluation, facts=_hostile(evaluation.facts))

    found = replace(
        found,
        model=HOSTILE,
        base=HOSTILE if compared else None,
        text=HOSTILE,
        before=hostile(found.before) if compared else None,
        after=hostile(found.after),
    )
    text = render_evaluation(found)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert page.text.count(HOSTILE) > 8, "it is shown, as text"
    assert '<mark class="new">alert(&#34;x&#34;)</mark>' in text


def test_the_same_judgements_give_the_same_bytes(text: str, tmp_path: Path) -> None:
    write_evaluation(example(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
