from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from memedit.errors import InputError
from memedit.outcome import EditOutcome, Evaluation, FactCounts
from tests.workflows.outcomes import example_outcome
from workflows.findings import failures, weakest
from workflows.judged_rows import SHOWN_FAILURES
from workflows.report import render_report, write_report

VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """Elements, attributes and visible text; checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def text() -> str:
    return render_report(example_outcome(100))


def test_the_page_needs_nothing_from_outside(text):
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"link", "script", "iframe", "img", "object", "embed", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert (value or "").startswith("#"), f"<{tag} {name}={value}>"
    assert "@import" not in text and "@font-face" not in text
    assert all(x.startswith("#") for x in re.findall(r"url\(['\"]?([^)]*)", text))
    addresses = set(re.findall(r"https?://[^\"'<> ]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_it_is_made_for_phones_dark_rooms_and_paper(text):
    assert '<meta name="viewport" content="width=device-width' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert "@media print" in text


def test_plots_do_not_clash_and_take_the_pages_colours(text):
    page = Page(text)
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert wanted and wanted <= set(ids)
    assert "DejaVu" not in text
    assert text.count("<style") == 1, "a <style> inside a drawing would reach out of it"
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert "var(--accent)" in drawings
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings), "a colour that dark mode cannot change"


def test_it_says_what_happened(text):
    outcome, page = example_outcome(100), Page(text)
    assert "100 facts written, and the edit works." in page.text
    assert "2 were rejected, with the reasons in rejects.jsonl" in page.text
    for words in (
        "z loss by step",
        "Size of the update",
        "The z vector said it, but the layer updates lost it",
        "The z vector never said it",
        "it reached the norm clamp",
        "targets.clamp_norm_factor",
        "2 min 18 s",
        outcome.run_id,
        "5.23.0",
    ):
        assert words in page.text
    assert outcome.after.facts[0].prompt in page.text
    for layer in outcome.layers:
        assert re.search(rf'<th scope="row" class="n">{layer}</th>.*<td class="n">60,000', text)
    assert f"({len(outcome.after.facts):,} judged)" in page.text


def test_relations_stand_by_themselves():
    outcome = example_outcome(100)
    page = render_report(outcome)
    assert "By relation" in page and "facts.parquet" in page
    tongues = [f for f in outcome.after.facts if f.relation == "The mother tongue of {} is"]
    exact = 100 * sum(f.efficacy_exact for f in tongues) / len(tongues)
    assert f'The mother tongue of {{}} is</th><td class="n">{len(tongues)}</td>' in page
    # None was said before.
    assert f'<span class="after">{exact:.1f}</span><small>0.0 \N{RIGHTWARDS ARROW} ' in page
    # Of many, those with the fewest facts are taken together.
    facts = tuple(
        replace(fact, relation=f"R{i % 30}" if i < 60 else "R0")
        for i, fact in enumerate(outcome.after.facts)
    )
    many = replace(outcome, after=replace(outcome.after, facts=facts))
    assert '18 other relations</th><td class="n">36</td>' in render_report(many)
    one = tuple(replace(fact, relation="R0") for fact in facts)
    alone = replace(outcome, after=replace(outcome.after, facts=one))
    assert "By relation" not in render_report(alone)


def test_what_repeats_another_metric_is_not_shown():
    outcome = example_outcome(20)
    exact = outcome.after.metrics["efficacy_exact"]

    def page(accuracy: float | None) -> str:
        metrics = {**outcome.after.metrics, "efficacy_accuracy": accuracy}
        return render_report(replace(outcome, after=replace(outcome.after, metrics=metrics)))

    assert "Efficacy, tokens" not in page(None) and "Efficacy, tokens" not in page(exact)
    assert "Efficacy, tokens" in page(exact / 2)


HOSTILE = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'


def test_a_fact_cannot_run_anything():
    outcome = example_outcome(3)
    facts = tuple(
        replace(
            f,
            case_id=HOSTILE,
            prompt=HOSTILE,
            continuation=HOSTILE + " & <b>",
            target_new='alert("x")',
            target_true="<img",
            efficacy=False,
        )
        for f in outcome.after.facts
    )
    outcome = replace(
        outcome,
        model=HOSTILE,
        run_id=HOSTILE,
        out=HOSTILE,
        settings={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        facts=FactCounts(read=4, accepted=3, rejected=1, rejects=f"a/{HOSTILE}"),
        before=replace(outcome.before, facts=facts),
        after=replace(outcome.after, facts=facts),
    )
    text = render_report(outcome)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert HOSTILE in page.text, "it is shown, as text"
    assert '<mark class="new">alert(&#34;x&#34;)</mark>' in text


def test_the_worst_facts_say_what_they_said_before(text):
    outcome = example_outcome(100)
    cells = re.findall(r'<td data-name="Said before">(.*?)</td>', text)
    plain = [" ".join(re.sub("<[^>]*>", "", cell).split()) for cell in cells]
    old, new = outcome.before.facts, outcome.after.facts
    found = [*failures(old, new), *weakest(old, new)]
    said = [" ".join(each.before.continuation.split()) for each in found]
    assert plain == said


def test_a_long_list_of_failures_is_cut_and_counted():
    outcome = example_outcome(200)
    facts = tuple(
        replace(f, efficacy=False, efficacy_exact=False, generation=False)
        for f in outcome.after.facts
    )
    outcome = replace(outcome, after=replace(outcome.after, facts=facts))
    words = Page(render_report(outcome)).text
    assert f"The worst {SHOWN_FAILURES} are shown; {200 - SHOWN_FAILURES} more" in words


def test_nothing_measured_makes_a_short_page_not_an_error():
    empty = EditOutcome(
        run_id="r",
        out="o",
        manifest="m",
        method="memit",
        model="x",
        layers=(5,),
        facts=FactCounts(read=1, accepted=1),
        before=Evaluation(metrics={}),
        after=Evaluation(metrics={}),
    )
    page = Page(render_report(empty))
    assert "1 fact written, not evaluated." in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)
    assert "rejects" not in page.text


def test_losses_and_norms_that_are_not_numbers_do_not_stop_it():
    outcome = example_outcome(2)
    traces = (
        replace(outcome.traces[0], losses=(8.0, float("nan"), float("inf"))),
        replace(outcome.traces[1], losses=(0.0, -0.0)),
    )
    updates = (replace(outcome.updates[0], delta_norm=float("nan"), weight_norm=0.0),)
    Page(render_report(replace(outcome, traces=traces, updates=updates)))


def test_the_file_replaces_the_old_one_whole(tmp_path: Path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    write_report(example_outcome(2), path)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")

    def disk_full(*_args, **_kwargs):
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(InputError, match="disk full"):
        write_report(example_outcome(3), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_same_outcome_gives_the_same_bytes(text):
    assert render_report(example_outcome(100)) == text


@pytest.mark.slow
def test_a_thousand_facts_stay_quick_and_small(tmp_path: Path):
    outcome, path = example_outcome(1000), tmp_path / "report.html"
    began = time.process_time()
    write_report(outcome, path)
    assert time.process_time() - began < 3
    assert path.stat().st_size < 2_000_000
