"""What tests of pages can ask for: a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.workflows.browser import Browser

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of a module; skips where none is installed."""
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_BROWSERS)} is installed")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.end()
