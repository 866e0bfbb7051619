"""A real browser for the tests of pages, and what can be asked of a page in it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BEYOND = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && !e.closest('.scroll, svg, .unseen')
    && !(e.closest('thead') && getComputedStyle(e.closest('thead')).position === 'absolute')
    && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 60))"""

_CONTRAST = """(() => {
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

    def _until(
        self, wanted: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 60
    ) -> dict[str, Any]:
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
        """Load a page with all that is folded in it open."""
        self.events.clear()
        self.media("", dark=dark)
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.ask("Page.navigate", url=page.as_uri())
        self._until(lambda m: m.get("method") == "Page.loadEventFired", "load")
        self.value("document.querySelectorAll('details').forEach(d => { d.open = true })")

    def media(self, name: str, *, dark: bool) -> None:
        """Show the page as for `print`, or as it is, to a reader who likes it light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=name, features=[scheme])

    def value(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def paper(self) -> str:
        """The colour behind the page."""
        return str(self.value("getComputedStyle(document.body).backgroundColor"))

    def beyond(self, *, scrolled: bool = False) -> list[str]:
        """The elements that reach beyond the window.

        Without `scrolled` not those that can be scrolled to in a box of their own.
        """
        found: list[str] = self.value(_BEYOND.replace(".scroll, ", "") if scrolled else _BEYOND)
        return found

    def unreadable(self) -> list[str]:
        """The texts with less contrast than WCAG's AA asks for, with their ratio."""
        found: list[str] = self.value(_CONTRAST)
        return found

    def complaints(self) -> list[dict[str, Any]]:
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [e["params"] for e in self.events if e["method"] in bad]

    def requests(self) -> list[str]:
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in asked]

    def printed(self) -> bytes:
        """The page as PDF on A4, backgrounds and all."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        answer = self.ask("Page.printToPDF", printBackground=True, **size)
        return base64.b64decode(answer["data"])

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
