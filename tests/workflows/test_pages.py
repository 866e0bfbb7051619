"""Every page in a real browser: what it asks for, whether it fits and can be read, its print."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.workflows.browser import Browser
from tests.workflows.ingestion.histories import made_history
from tests.workflows.outcomes import example_outcome
from tests.workflows.studies import (
    example_comparison,
    example_trace,
    example_traces,
    example_tuning,
)
from tests.workflows.test_evaluation_page import example
from workflows.comparison_page import write_comparison
from workflows.evaluation_page import write_evaluation
from workflows.ingestion.page import write_page
from workflows.report import write_report
from workflows.trace_page import write_trace_page
from workflows.tuning_page import write_tuning

pytestmark = pytest.mark.slow


def _trace(path: Path) -> None:
    traced = example_traces()
    write_trace_page(example_trace(traced), traced, path)


PAGES: dict[str, Callable[[Path], None]] = {
    "report": lambda path: write_report(example_outcome(60), path),
    "evaluation": lambda path: write_evaluation(example(60), path),
    "comparison": lambda path: write_comparison(example_comparison(), path),
    "trace": _trace,
    "tuning": lambda path: write_tuning(example_tuning(), path),
    "history": lambda path: write_page(made_history(30, current=1), path),
}
LIGHT, DARK, WHITE = "rgb(253, 253, 252)", "rgb(20, 23, 27)", "rgb(255, 255, 255)"


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    PAGES[request.param](path)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_fits_can_be_read_and_asks_for_nothing(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.show(page, width=width, dark=dark)
    assert browser.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert browser.beyond() == []
    assert browser.paper() == (DARK if dark else LIGHT)
    assert browser.unreadable() == []
    assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
    pixels = imread(io.BytesIO(browser.picture()))[..., :3]
    paper = pixels[2, 2]
    assert (paper.mean() < 0.3) == dark
    inked = (abs(pixels - paper).max(axis=-1) > 0.1).mean()
    assert 0.01 < inked < 0.6


def test_print_is_light_and_whole(browser: Browser, page: Path) -> None:
    # A browser makes what is wider than the paper smaller, but not without end.
    browser.show(page, width=960, dark=True)
    browser.media("print", dark=True)
    assert browser.beyond(scrolled=True) == []
    assert browser.paper() == WHITE
    assert browser.unreadable() == []
    browser.media("", dark=True)
    found = browser.printed()
    assert found.startswith(b"%PDF-") and browser.complaints() == []
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", found, flags=re.S)
    drawn = b"\n".join(_inflated(stream) for stream in streams)
    assert drawn.count(b" Tj") + drawn.count(b" TJ") > 100, "texts"
    fills = {
        tuple(map(float, fill)) for fill in re.findall(rb"([\d.]+) ([\d.]+) ([\d.]+) rg", drawn)
    }
    assert (0, 0, 0) in fills, "ink"
    assert not any(abs(r - 20 / 255) + abs(b - 27 / 255) < 0.01 for r, _, b in fills), "dark paper"


def _inflated(stream: bytes) -> bytes:
    try:
        return zlib.decompress(stream)
    except zlib.error:
        return b""
