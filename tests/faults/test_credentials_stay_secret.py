"""No key, secret or token in what a run says, publishes or keeps, whether it goes well or not.

What each case of bad input says is searched in test_s3_bad_input.py.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape

import pytest

from tests.faults.s3_world import KEYS, PASSWORD, World
from tests.s3.secrets import search
from tests.s3.server import HOST, Identity
from tests.s3.sessions import SessionServer
from tests.workflows.runs import FACTS, memedit, without_plots, write_rows
from workflows.report import write_report

pytestmark = pytest.mark.slow

SESSION = Identity(
    access_key="AKIAD1STINCT1VEKEY99", secret_key="s3cr3t/0f+Distinct=Length&40chars==x"
)
TOKEN = "t0k3n/0f+A.Session=" * 4


# --- Runs that go well ---------------------------------------------------------------------------


def test_an_edit_with_keys_of_a_session(s3_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world = s3_world
    bad = {"subject": " ", "prompt": "{} is", "target_new": "Rome"}
    rows = [json.dumps(row) for row in (*FACTS, bad)]
    world.facts = world.put("some.jsonl", "\n".join(rows).encode())
    monkeypatch.setattr("workflows.report.write_report", write_report)  # as it really is
    with SessionServer(world.server, SESSION, TOKEN) as server:
        world.environment(server.environment)
        assert world.secrets >= {SESSION.access_key, SESSION.secret_key, TOKEN}
        world.more = ["--on-bad-row", "skip", "--debug"]
        runs = [world.run()]
        without_plots(monkeypatch)
        for kind in ("delta", "lora"):
            world.out = f"{world.place}/{kind}"
            world.more = ["--on-bad-row", "skip", "--log-format", "json", "--format", kind]
            runs.append(world.run())
        world.out = f"{world.place}/reg/versions/x"
        common = ("--cache", world.cache, "--debug", "--json")
        runs += [
            memedit("apply", f"{world.place}/delta", "--registry", f"{world.place}/reg",
                    "--run-id", "x", *common),
            memedit("history", "--registry", f"{world.place}/reg", "--debug", "--json"),
            memedit("verify", f"{world.place}/out", *common),
            memedit("doctor", "--json"),
        ]  # fmt: skip
        assert [ran.code for ran in runs[:-1]] == [0] * 6, [ran.stderr for ran in runs]
        assert f"{world.server.endpoint}" not in runs[-1].stdout and server.requests > 100
        secrets, places = world.secrets, world.places(*runs)
    written = {name for name in places if name.startswith("s3 ")}
    for name in ("memedit.json", "report.html", "rejects.jsonl", "facts.jsonl"):
        assert f"s3 out/{name}" in written
    assert "s3 reg/CURRENT" in written and "s3 lora/adapter_config.json" in written
    assert len([name for name in places if name.startswith("here cache/")]) >= 10
    assert search(secrets, places) == []


@pytest.mark.parametrize("secret", [SESSION.access_key, SESSION.secret_key, TOKEN])
def test_the_search_finds_a_secret(secret: str) -> None:
    """In each of the forms, in the middle of other text."""
    clean = {"a": b"nothing", "b": b"AKIA and s3cr3t and t0k3n"}
    assert search({secret}, clean) == []
    raw = secret.encode()
    hidden: list[bytes] = [
        raw,
        f'{{"url": "http://{quote(secret, safe="")}@host/"}}'.encode(),
        quote_plus(secret).encode(),
        base64.b64encode(raw),
        base64.urlsafe_b64encode(b"user:" + raw + b"\n"),
        base64.b64encode(b"x" + raw + b"yz"),
        base64.b64encode(b"xy" + raw + b"z"),
        raw.hex().encode(),
        escape(secret).encode(),
        secret.replace("/", "\\/").encode(),
    ]
    for content in hidden:
        places = clean | {"c": b"\x80\0 some " + content + b" text"}
        assert search({secret}, places) == ["c"], content
    assert search({secret}, {f"folder/{secret}.json": b""}) != []


# --- Runs that fail ------------------------------------------------------------------------------


ANSWERS: dict[str, Callable[[str], tuple[int, str]]] = {
    "refuses": lambda said: (400, f"<Error><Code>Odd</Code><Message>{said}</Message></Error>"),
    "denies": lambda said: (
        403,
        f"<Error><Code>AccessDenied</Code><Message>{said}</Message><Token>{said}</Token></Error>",
    ),
    "is out of order": lambda said: (
        500,
        f"<Error><Code>InternalError</Code><Message>{said}</Message></Error>",
    ),
    "answers no XML": lambda said: (200, f"<html>{said}<br></html>"),
    "leads away": lambda said: (301, f"<Error><Code>Odd</Code><Message>{said}</Message></Error>"),
}


@contextmanager
def talkative(said: str, answer: Callable[[str], tuple[int, str]]) -> Iterator[str]:
    """The address of a storage that repeats what it should not."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answer(escape(said))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer((HOST, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{HOST}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ANSWERS)
def test_what_a_storage_repeats_is_not_handed_on(s3_world: World, name: str) -> None:
    """Its own messages are shown, for they help; without what must not be seen."""
    said = f"you are {SESSION.access_key} with {SESSION.secret_key} and {TOKEN}, I say"
    with talkative(said, ANSWERS[name]) as address:
        s3_world.use(
            SESSION,
            AWS_SESSION_TOKEN=TOKEN,
            AWS_ENDPOINT_URL_S3=f"http://{address}",
            MEMEDIT_S3_PATIENCE_S="0.3",
        )
        secrets = s3_world.secrets
        s3_world.more += ["--debug"]
        ran = s3_world.run()
    assert ran.code in (1, 2), ran.stderr
    assert search(secrets, {"stdout": ran.stdout.encode(), "stderr": ran.stderr.encode()}) == []
    if name == "refuses":
        assert "you are ***" in ran.error["message"] and "I say" in ran.error["message"]


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:port", "[::1", "no host/x"])
@pytest.mark.parametrize("command", ["edit", "doctor"])
def test_a_password_in_the_address_is_not_shown(
    s3_world: World, address: str, command: str, tmp_path: Path
) -> None:
    endpoint = f"http://someone:{PASSWORD}@{address}"
    s3_world.use(s3_world.server.admin, AWS_ENDPOINT_URL_S3=endpoint, MEMEDIT_S3_PATIENCE_S="0.3")
    if command == "edit":
        s3_world.more += ["--debug"]
        ran = s3_world.run()
        assert ran.code in (1, 2), ran.stderr
    else:
        ran = memedit("doctor", "--debug", "--json")
    said = {"stdout": ran.stdout.encode(), "stderr": ran.stderr.encode()}
    assert search(s3_world.secrets, said) == []


def test_keys_of_a_job_file_are_not_repeated(s3_world: World, tmp_path: Path) -> None:
    """Nor those on a line that is wrong for another reason."""
    location = f"s3://{KEYS}@bucket/x"
    job = tmp_path / "job.yaml"
    write_rows(job, [f"model: {location}", "facts: facts.jsonl", "out: x"])
    runs = [
        memedit("edit", "--config", job, "--debug"),
        memedit("edit", "--set", f"modell={location}", "--debug"),
        memedit("edit", "--set", location),
        memedit("verify", "x", location),
        memedit("verify", location, "--json", "--debug"),
        memedit("evaluate", "--model", "x", "--facts", "x.jsonl", "--text", location),
        memedit("generate", "--model", f"https://{KEYS}@host/x", "Rome"),
        memedit("show", location, "--json"),
        memedit("diff", location, location),
    ]
    assert [ran.code for ran in runs] == [2] * len(runs)
    assert search(s3_world.secrets, s3_world.here(*runs)) == ["here job.yaml"]
