from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from memedit.errors import InputError
from memedit.outcome import METRIC_KEYS
from tests.workflows.outcomes import example_outcome
from tests.workflows.test_report import Page
from workflows.ingestion.page import (
    SHOWN_CHARACTERS,
    SHOWN_REASONS,
    SHOWN_SOURCES,
    SHOWN_VERSIONS,
    PageHistory,
    PageReject,
    PageSource,
    PageVersion,
    render_page,
    write_page,
)
from workflows.report import render_report

START = datetime(2026, 9, 1, 4, tzinfo=UTC)
HOSTILE = (
    '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'
    "' onload='x \u202egnp.exe\x00\x1b[31m \ud800 $\\frac{1}{$ {{ 7 * 6 }} {% endif %}"
)
RTL = "الحقائق من المصدر الأول: עברית 123"


def made_version(i: int, **changes: Any) -> PageVersion:
    at = (START + timedelta(days=i)).isoformat()
    percents = dict.fromkeys(METRIC_KEYS, 90.0 - 0.1 * (i % 30))
    shares = {"wiki-dump": 400 + 6 * i, "crm": 220 + 2 * i, "tickets": 40 + (i % 7)}
    version = PageVersion(
        run_id=f"nightly-{START + timedelta(days=i):%Y%m%dT%H%M%S}Z",
        created_at=at,
        moved_at=at,
        method="memit",
        facts=sum(shares.values()),
        added=8 + i % 5,
        superseded=i % 4,
        retracted=i % 3,
        rejected=i % 2,
        metrics=percents
        | {
            "efficacy": 97.5 + (i % 5) / 2,
            "paraphrase": 88.0 + (i * 7 % 11) / 2,
            "neighbourhood": 76.0 - 0.2 * (i % 20),
            "score": 85.0 + (i * 3 % 7) / 3,
            "perplexity": 21.0 + 0.02 * i + (i % 3) / 10,
            "drift_kl": 0.012,
        },
        path=f"s3://models/registry/versions/nightly-{i}",
        by="publish",
        sources=shares,
    )
    return replace(version, **changes)


def made_history(n: int = 12, *, current: int = 0, rejects: int = 60) -> PageHistory:
    """The `current`th newest of `n` versions is current."""
    versions = [made_version(i) for i in reversed(range(n))]
    if n:
        versions[current] = replace(
            versions[current], current=True, by="rollback" if current else "publish"
        )
    reasons = (
        "target_new: must not be empty",
        "prompt: 'The {} of' needs one {} for the subject, found 2",
        "subject: contradicts row 12 of facts.parquet, which is newer",
    )
    return PageHistory(
        registry="s3://models/registry",
        model="HuggingFaceTB/SmolLM2-135M",
        generated_at="2026-12-01T05:00:00+00:00",
        current=versions[current].run_id if n else None,
        versions=tuple(versions),
        sources=(
            PageSource(
                name="wiki-dump",
                kind="iceberg",
                place="s3://lake/warehouse/facts.wiki_dump",
                active=466,
                last_read="2026-12-01T03:58:00+00:00",
                snapshot="snapshot 8231749012374",
            ),
            PageSource(name="crm", kind="delta", place="s3://lake/crm/facts", active=242),
            PageSource(name="tickets", kind="files", place="/data/in/*.jsonl", active=44),
        )
        if n
        else (),
        rejects=tuple(
            PageReject(
                at=(START + timedelta(days=9, minutes=-i)).isoformat(),
                source=("crm", "tickets")[i % 2],
                place=f"s3://lake/crm/facts/part-{i:05}.parquet",
                row=1000 + i,
                field=("target_new", "prompt", None)[i % 3],
                reason=reasons[i % 3].replace("12", str(i)),
                raw=json.dumps({"subject": f"Customer {i}", "prompt": "The {} of", "n": "x" * 90}),
            )
            for i in range(rejects)
        ),
        rejects_total=rejects,
        states={"active": 752, "superseded": 61, "retracted": 18, "quarantined": 5} if n else {},
    )


def hostile_history() -> PageHistory:
    long = "reason of ten thousand letters " * 330 + HOSTILE
    versions = tuple(
        made_version(
            i,
            run_id=f"{HOSTILE}{i}",
            created_at=HOSTILE,
            moved_at=HOSTILE,
            current=i == 2,
            method=HOSTILE,
            path="s3://key:secret@models/" + HOSTILE,
            pinned=True,
            problems=(HOSTILE, "x" * 5000),
            by="rollback",
            metrics={"score": None, "efficacy": float("nan"), "perplexity": float("inf")},
            sources={HOSTILE: 4, RTL: 9, "x" * 400: 3} | {f"s{k}{HOSTILE}": 1 for k in range(9)},
        )
        for i in reversed(range(3))
    )
    return PageHistory(
        registry=HOSTILE,
        model=HOSTILE,
        generated_at=HOSTILE,
        current=versions[0].run_id,
        versions=versions,
        sources=(
            PageSource(
                name=HOSTILE, kind=HOSTILE, place=HOSTILE, active=4, last_read=RTL, snapshot=HOSTILE
            ),
            PageSource(name=RTL, kind="x" * 300, place="y" * 9000, active=9, snapshot="z" * 300),
        ),
        rejects=tuple(
            PageReject(
                at=HOSTILE,
                source=HOSTILE,
                place="/data/" + "deep/" * 60,
                field=HOSTILE,
                reason=f"{chr(97 + i % 26)}{chr(97 + i // 26)} {(long, HOSTILE, RTL)[i % 3]}",
                raw=(HOSTILE, "q" * 300, RTL)[i % 3],
            )
            for i in range(250)
        ),
        rejects_total=12_345,
        states={"active": 3, HOSTILE: 2},
    )


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

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """A headless Chromium that is spoken to over a pipe; nothing listens anywhere."""

    def __init__(self, program: str, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()  # what it reads, what it writes
        command = (
            f'exec "$0" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage'
            f" --disable-background-networking --no-first-run --hide-scrollbars"
            f" --host-resolver-rules='MAP * ~NOTFOUND' --remote-debugging-pipe"
            f' --user-data-dir="$1" about:blank 3<&{ours[0]} 4>&{theirs[1]}'
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, str(profile)],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile), "XDG_CONFIG_HOME": str(profile)},
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = ours[1], theirs[0]
        self._numbers, self._rest = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        targets = self.ask("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._until(lambda m: m.get("id") == number, method)["result"]

    def _until(self, wanted, what: str, timeout_s: float = 60) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while True:
            while b"\0" in self._rest:
                first, self._rest = self._rest.split(b"\0", 1)
                message = json.loads(first)
                assert "error" not in message, (what, message)
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._from], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{what}: the browser did not answer in {timeout_s:g} s"
            some = os.read(self._from, 1 << 20)
            assert some, f"{what}: the browser is gone"
            self._rest += some

    def show(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.ask("Page.navigate", url=page.as_uri())
        self._until(lambda m: m.get("method") == "Page.loadEventFired", "load")

    def value(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [e["params"] for e in self.events if e["method"] in bad]

    def requests(self) -> list[str]:
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in asked]

    def picture(self, *, whole: bool = False) -> bytes:
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def end(self) -> None:
        self._session = None
        try:
            self.ask("Browser.close")
        except (AssertionError, OSError):
            self._process.kill()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.end()


CASES = {
    "usual": made_history,
    "rollback": lambda: made_history(12, current=3),
    "none": lambda: made_history(0, rejects=0),
    "one": lambda: made_history(1),
    "many": lambda: made_history(400, rejects=200),
    "hostile": hostile_history,
}

# The innermost elements that reach beyond the window, but for what scrolls in its own box.
BEYOND = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && !e.closest('.scroll, svg, .unseen')
    && !(e.closest('thead') && getComputedStyle(e.closest('thead')).position === 'absolute')
    && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 60))"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("case", CASES)
def test_it_fits_and_complains_of_nothing(browser, tmp_path, case, width):
    path = tmp_path / "history.html"
    write_page(CASES[case](), path)
    browser.show(path, width=width)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert browser.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    if width == 360:
        assert browser.value(BEYOND.replace(".scroll, ", "")) == []
    assert browser.value(BEYOND) == []
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


CONTRAST = """(() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => {
    const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = parts(c).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (parts(c)[3] !== 0) return c;
    }
  };
  const bad = new Set();
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const svg = e.closest('svg');
    if (svg && e.tagName !== 'text') continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(svg ? style.fill : style.color), light(behind(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.add(`${e.outerHTML.slice(0, 120)} ${ratio.toFixed(2)}`);
  }
  return [...bad];
})()"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read(browser, tmp_path, dark):
    path = tmp_path / "history.html"
    write_page(made_history(30, current=1), path)
    browser.show(path, width=1400, dark=dark)
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(253, 253, 252)")
    assert browser.value(CONTRAST) == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1400])
def test_the_picture_is_not_blank(browser, tmp_path, width, dark):
    path = tmp_path / "history.html"
    write_page(made_history(), path)
    browser.show(path, width=width, dark=dark)
    pixels = imread(io.BytesIO(browser.picture()))[..., :3]
    assert pixels.shape[:2] == (900, width)
    colours = {tuple(c) for c in (pixels[::2, ::2].reshape(-1, 3) * 255).round().astype(int)}
    assert len(colours) > 30
    paper = pixels[2, 2]
    share = (abs(pixels - paper).max(axis=-1) > 0.1).mean()
    assert 0.01 < share < 0.6
    assert (paper.mean() < 0.3) == dark
