from __future__ import annotations

import re
from dataclasses import replace

import pytest

from memedit.errors import InputError
from tests.workflows.ingestion.histories import hostile_history, made_history, made_version
from tests.workflows.outcomes import example_outcome
from tests.workflows.test_report import Page
from workflows.ingestion.page import (
    SHOWN_CHARACTERS,
    SHOWN_REASONS,
    SHOWN_SOURCES,
    SHOWN_VERSIONS,
    render_page,
    write_page,
)
from workflows.report import render_report

# Without a browser ----------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside_and_runs_nothing():
    text = render_page(made_history())
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert not {t for t, _ in page.tags} & {"link", "script", "iframe", "img", "object", "a"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href", "xlink:href") or (value or "").startswith("#")
    assert "default-src 'none'" in text
    assert "@media (prefers-color-scheme: dark)" in text


def test_it_looks_like_the_report():
    text = render_page(made_history())
    rules = render_report(example_outcome(1)).partition("<style>")[2].partition("</style>")[0]
    assert "--paper: #fdfdfc" in rules and ".stack td[data-name]::before" in rules
    assert f"<style>{rules}" in text
    assert not re.findall(r"\{[{%]", text)


def test_it_says_what_happened():
    history = made_history(12, current=2)
    text = Page(render_page(history)).text
    now = history.versions[2]
    assert f"{now.run_id} CURRENT" in text
    assert "Current since 2026-09-10 04:00 UTC, by a rollback. It holds 734 facts." in text
    assert "2 newer versions are not current." in text
    for words in (
        "+12 ↻1",
        "12 added, 1 superseded",
        "s3://lake/warehouse/facts.wiki_dump",
        "snapshot 8231749012374",
        "60 rows that could not become facts",
        "836",  # facts in any state
    ):
        assert words in text, words
    assert all(v.run_id in text for v in history.versions)


def test_the_change_is_against_the_version_before():
    first, second = made_version(0), made_version(1, current=True)
    second = replace(second, metrics={**second.metrics, "score": 70.0})
    first = replace(first, metrics={**first.metrics, "score": 80.0})
    history = replace(made_history(0), versions=(second, first), current=second.run_id)
    assert "before 80.0 (−10.0)" in Page(render_page(history)).text


def test_drawings_have_names_and_the_pages_colours():
    text = render_page(made_history(12))
    page = Page(text)
    drawings = [a for t, a in page.tags if t == "svg"]
    assert [a["role"] for a in drawings] == ["img"] * 3
    assert "Facts per version by source, from 660 to 752" in str(drawings[0]["aria-label"])
    assert "Efficacy from" in str(drawings[1]["aria-label"])
    found = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert found.count("<title>") == 3
    assert not re.findall(r"#[0-9a-f]{6}\b", found), "a colour that dark mode cannot change"
    for i in range(3):
        assert f"var(--series-{i})" in found
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_tables_have_captions_and_heads():
    page = Page(render_page(made_history(60)))
    tags = [t for t, _ in page.tags]
    assert tags.count("table") == tags.count("caption") > 5
    assert {a["scope"] for t, a in page.tags if t == "th"} == {"col", "row"}
    assert tags.count("h1") == 1 and [a["lang"] for t, a in page.tags if t == "html"] == ["en"]


@pytest.mark.parametrize("n", [0, 1, 2, 41, 400])
def test_any_number_of_versions(n):
    history = made_history(n, rejects=0)
    text = render_page(history)
    page = Page(text)
    assert sum(t == "svg" for t, _ in page.tags) == (3 if n else 0)
    assert all(v.run_id in page.text for v in history.versions)
    folded = max(n - SHOWN_VERSIONS, 0)
    assert (f"{folded:,} older versions" in page.text) == (folded > 0)
    assert ("No version yet" in page.text) == (n == 0)
    assert len(text) < 150_000 + 2_500 * n


def test_none_current_and_current_gone():
    history = made_history(2)
    versions = tuple(replace(v, current=False) for v in history.versions)
    page = Page(render_page(replace(history, versions=versions, current=None)))
    assert "No version is current" in page.text and "2 versions were published" in page.text
    page = Page(render_page(replace(history, versions=versions, current="gone-1")))
    assert "gone-1 CURRENT This version is named current, but it is not among" in page.text


def test_metrics_that_were_not_measured():
    versions = [made_version(i) for i in reversed(range(5))]
    for i, metrics in enumerate(({}, {"score": None}, {"score": 50.0}, {"score": float("nan")})):
        versions[i] = replace(versions[i], metrics=metrics)
    versions[0] = replace(versions[0], current=True, added=None, superseded=None, retracted=None)
    page = Page(render_page(replace(made_history(0), versions=tuple(versions))))
    assert "n/a" in page.text and "not known" in page.text and "nan" not in page.text
    bare = [replace(v, metrics={}) for v in versions]
    page = Page(render_page(replace(made_history(0), versions=tuple(bare))))
    assert sum(t == "svg" for t, _ in page.tags) == 1
    assert "Perplexity" not in page.text


def test_small_sources_share_a_colour_and_unknown_ones_are_shown():
    sources = {f"source-{i}": 100 - i for i in range(SHOWN_SOURCES + 3)}
    version = made_version(0, sources=sources, facts=sum(sources.values()), current=True)
    text = Page(render_page(replace(made_history(0), versions=(version,)))).text
    assert "3 other sources: 282" in text
    version = replace(version, sources={})
    text = Page(render_page(replace(made_history(0), versions=(version,)))).text
    assert f"source not recorded: {version.facts}" in text


def test_rejects_are_grouped_by_reason():
    history = made_history(rejects=60)
    page = Page(render_page(history))
    assert sum(t == "details" for t, _ in page.tags) == 3
    assert "20target_new: must not be empty" in page.text
    assert "20subject: contradicts row … of facts.parquet, which is newer" in page.text
    many = [replace(history.rejects[0], reason=chr(97 + i) * 5) for i in range(SHOWN_REASONS + 6)]
    page = Page(render_page(replace(history, rejects=tuple(many), rejects_total=9_999)))
    assert sum(t == "details" for t, _ in page.tags) == SHOWN_REASONS + 1
    assert "6Other reasons" in page.text and "The newest 26 of 9,999 rows" in page.text


def test_no_text_can_become_markup_or_disguise_itself():
    text = render_page(hostile_history())
    page = Page(text)
    assert not {t for t, _ in page.tags} & {"script", "img", "a"}
    for _, attributes in page.tags:
        assert not {n for n in attributes if n.startswith("on") or n == "src"}
    assert "alert(" in page.text and "{{ 7 * 6 }}" in page.text
    assert not set(text) & set("\x00\x1b\u202e\ud800")
    assert "secret" not in text, "a key of a store is shown"
    assert "reason of ten thousand" in page.text
    assert max(map(len, page.words)) <= SHOWN_CHARACTERS + 100
    assert len(text) < 1_000_000


def test_the_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "pages" / "history.html"
    write_page(hostile_history(), path)
    assert path.read_text("utf-8") == render_page(hostile_history())
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_page(replace(made_history(), versions=(None,)), path)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["history.html"]
    with pytest.raises(InputError):
        write_page(made_history(), path.parent)


# In a browser ---------------------------------------------------------------------------------

CASES = {
    "usual": made_history,
    "rollback": lambda: made_history(12, current=3),
    "none": lambda: made_history(0, rejects=0),
    "one": lambda: made_history(1),
    "many": lambda: made_history(400, rejects=200),
    "hostile": hostile_history,
}


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("case", CASES)
def test_it_fits_and_complains_of_nothing(browser, tmp_path, case, width):
    path = tmp_path / "history.html"
    write_page(CASES[case](), path)
    browser.show(path, width=width)
    assert browser.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert browser.beyond(scrolled=width == 360) == []
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]


@pytest.mark.slow
def test_a_reader_sees_the_current_version(browser, tmp_path):
    history, path = made_history(12, current=2), tmp_path / "history.html"
    write_page(history, path)
    browser.show(path, width=1400)
    shown = browser.value("document.querySelector('h1').innerText")
    assert shown == f"{history.current} CURRENT"
    assert str(history.current) in browser.value("document.documentElement.outerHTML")
    top = browser.value("document.querySelector('h1').getBoundingClientRect().top")
    assert 0 < top < 200
    text = browser.value("document.body.innerText")
    assert "2 newer versions are not current." in text
    marked = browser.value("document.querySelector('tr.now .id').innerText")
    assert marked == history.current
    # One drawing has one colour for a source, which is that of the legend and of the table.
    colours = browser.value(
        "['.legend .swatch', '.stack tbody th > .swatch'].map(q =>"
        " getComputedStyle(document.querySelector(q)).backgroundColor)"
    )
    assert colours[0] == colours[1] == "rgb(31, 98, 168)"
    fills = browser.value(
        "[...document.querySelectorAll('svg path')].map(p => getComputedStyle(p).fill)"
    )
    assert colours[0] in fills


@pytest.mark.slow
def test_hostile_texts_run_nothing(browser, tmp_path):
    path = tmp_path / "history.html"
    write_page(hostile_history(), path)
    browser.show(path, width=1400)
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.images.length") == 0
    assert '<script>alert("x")</script>' in browser.value("document.body.innerText")
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]
