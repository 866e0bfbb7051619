"""Notices: real commands, and a real server for webhooks."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memedit.errors import InputError
from memedit.progress import Silent
from tests.heard import Heard
from workflows.ingestion.hooks import CommandHook, Hooks, WebHook, parse_hooks

EVENT = {"run_id": "nightly-7", "status": "published", "version": "v12", "facts": {"added": 3}}
FAILED = {"run_id": "nightly-8", "status": "failed", "version": None, "error": "no such file"}


@dataclass
class Received:
    """What a server was asked, and what it answers."""

    port: int = 0
    answer: int = 200
    location: str = ""
    asked: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/services/T0/B0/S3CRET"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.asked.append(("POST", self.path, dict(self.headers), json.loads(body)))
            self.send_response(received.answer)
            if received.location:
                self.send_header("Location", received.location)
            self.end_headers()

        def do_GET(self) -> None:
            received.asked.append(("GET", self.path, dict(self.headers), None))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        received.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield received
        http.shutdown()
        thread.join()


class Warned(Heard):
    """Hears warnings only."""

    def message(self, text: str, *, warning: bool = True) -> None:
        assert warning
        super().message(text)


def told(hooks: object, event: dict[str, Any]) -> list[str]:
    """What a person is told when a run has ended with `event`."""
    heard = Warned()
    parse_hooks(hooks).tell(event, heard)
    return heard.texts


# --- Settings -----------------------------------------------------------------------------------


def test_every_way_to_write_a_hook() -> None:
    assert parse_hooks(
        {
            "success": ["make deploy", {"command": "x", "timeout_s": 5}],
            "failure": [
                {
                    "url": "https://example.org/hook",
                    "headers": {"Authorization": "Bearer $TOKEN", "X-Team": "ml"},
                    "timeout_s": 2.5,
                },
                {"url": "$SLACK_URL"},
            ],
        }
    ) == Hooks(
        success=(
            CommandHook(place="hooks.success[0]", command="make deploy", timeout_s=30),
            CommandHook(place="hooks.success[1]", command="x", timeout_s=5),
        ),
        failure=(
            WebHook(
                place="hooks.failure[0]",
                url="https://example.org/hook",
                headers={"Authorization": "Bearer $TOKEN", "X-Team": "ml"},
                timeout_s=2.5,
            ),
            WebHook(place="hooks.failure[1]", url="$SLACK_URL"),
        ),
    )


def test_no_hooks() -> None:
    assert parse_hooks(None) == parse_hooks({}) == parse_hooks({"success": None}) == Hooks()
    assert parse_hooks({"success": "true"}) == parse_hooks({"success": ["true"]})


@pytest.mark.parametrize(
    ("value", "field", "hint"),
    [
        ("make deploy", "hooks", "must be a mapping"),
        ({"succes": []}, "hooks.succes", "did you mean 'success'"),
        ({"success": [3]}, "hooks.success[0]", "a line for the shell, or a mapping"),
        ({"success": ["true", " "]}, "hooks.success[1]", "a line for the shell"),
        ({"success": ["a\0b"]}, "hooks.success[0]", "a line for the shell"),
        ({"success": [{}]}, "hooks.success[0]", "one of"),
        ({"success": [{"command": "x", "url": "http://x"}]}, "hooks.success[0]", "one of"),
        ({"success": [{"comand": "x"}]}, "hooks.success[0].comand", "did you mean 'command'"),
        ({"success": [{"command": 3}]}, "hooks.success[0].command", "a line for the shell"),
        ({"success": [{"command": "x", "headers": {}}]}, "hooks.success[0].headers", "`url`"),
        ({"success": [{"url": "file:///etc/passwd"}]}, "hooks.success[0].url", "http:// or"),
        ({"success": [{"url": "ftp://example.org"}]}, "hooks.success[0].url", "http:// or"),
        ({"success": [{"url": "https://"}]}, "hooks.success[0].url", "http:// or"),
        ({"success": [{"url": "http://x:port/"}]}, "hooks.success[0].url", "not an address"),
        ({"success": [{"url": "http://[::1"}]}, "hooks.success[0].url", "not an address"),
        ({"success": [{"url": "http://x/a b"}]}, "hooks.success[0].url", "a space"),
        ({"success": [{"url": ["http://x"]}]}, "hooks.success[0].url", "http:// or"),
        ({"success": [{"url": "http://me:hidden@x/"}]}, "hooks.success[0].url", "keys in it"),
        *(
            ({"failure": [{"command": "x", "timeout_s": s}]}, "hooks.failure[0].timeout_s", "above")
            for s in (0, -1, "5", True, float("nan"), float("inf"), None)
        ),
        (
            {"failure": [{"url": "http://x", "headers": {"Authorization": "Bearer hidden"}}]},
            "hooks.failure[0].headers.Authorization",
            r"write \$NAME",
        ),
        (
            {"failure": [{"url": "http://x", "headers": {"X-Y": "a\r\nZ: b"}}]},
            "hooks.failure[0].headers.X-Y",
            "one line",
        ),
        (
            {"failure": [{"url": "http://x", "headers": {"X Y": "a"}}]},
            "hooks.failure[0].headers.X Y",
            "name of a header",
        ),
        (
            {"failure": [{"url": "http://x", "headers": ["a"]}]},
            "hooks.failure[0].headers",
            "a mapping",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(value: object, field: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as caught:
        parse_hooks(value)
    assert caught.value.field == field
    assert "hidden" not in str(caught.value)


def test_secrets_are_not_in_what_a_debugger_shows() -> None:
    hooks = parse_hooks(
        {"success": ["curl -H 'Key: hidden'", {"url": "https://example.org/hidden"}]}
    )
    assert "hidden" not in repr(hooks)


# --- Commands -----------------------------------------------------------------------------------


def test_a_command_gets_the_event(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = (
        f"cat > {tmp_path}/event; echo $MEMEDIT_RUN_ID-$MEMEDIT_STATUS-$MEMEDIT_VERSION"
        f" | tee {tmp_path}/named; echo to stderr >&2"
    )
    assert told({"success": [command]}, EVENT) == []
    assert json.loads((tmp_path / "event").read_text()) == EVENT
    assert (tmp_path / "named").read_text() == "nightly-7-published-v12\n"
    assert capfd.readouterr() == ("", "")


def test_an_event_of_anything_is_json(tmp_path: Path) -> None:
    event = {
        **FAILED,
        "path": Path("/a"),
        "loss": float("nan"),
        "source": "s3://AKIA:hidden@bucket/x",
        "list": ("Zürich", 1),
    }
    assert told({"failure": [f"cat > {tmp_path}/event; env > {tmp_path}/env"]}, event) == []
    assert json.loads((tmp_path / "event").read_text("utf-8")) == {
        **FAILED,
        "path": "/a",
        "loss": None,
        "source": "s3://***@bucket/x",
        "list": ["Zürich", 1],
    }
    assert "MEMEDIT_VERSION=\n" in (tmp_path / "env").read_text()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("published", ["success"]),
        ("gated", ["failure"]),
        ("failed", ["failure"]),
        ("unchanged", []),
        ("something new", []),
        (None, []),
    ],
)
def test_who_is_told_of_which_end(status: str | None, expected: list[str], tmp_path: Path) -> None:
    hooks = {name: [f"touch {tmp_path}/{name}"] for name in ("success", "failure")}
    assert told(hooks, {"run_id": "r", "status": status}) == []
    assert [path.name for path in tmp_path.iterdir()] == expected


def test_a_command_that_fails_is_told_with_what_it_said_last(tmp_path: Path) -> None:
    command = "for i in 1 2 3 4 5; do echo line $i >&2; echo; done; echo out; exit 7"
    hooks = {"success": [command, f"touch {tmp_path}/second"]}
    assert told(hooks, EVENT) == [
        "the notice hooks.success[0] was not given: failed with exit code 7; it said: line 3 |"
        " line 4 | line 5"
    ]
    assert (tmp_path / "second").exists()


def test_a_command_that_is_killed_is_told() -> None:
    (text,) = told({"success": ["kill -9 $$"]}, EVENT)
    assert text.endswith("ended by signal 9")


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # The child holds the pipe open; reading it ends when the child is gone, and not before.
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    command = f"sh -c 'echo begun; exec sleep 600' > {pipe} & echo waiting >&2; wait"
    texts = told({"success": [{"command": command, "timeout_s": 0.5}]}, EVENT)
    assert texts == [
        "the notice hooks.success[0] was not given: was ended because it took longer than 0.5 s;"
        " it said: waiting"
    ]
    with open(reader) as content:
        assert content.read() == "begun\n"


def test_a_command_may_leave_somebody_behind_and_read_nothing(tmp_path: Path) -> None:
    big = {**EVENT, "text": "x" * 1_000_000}
    command = f"sleep 600 & echo $! > {tmp_path}/pid"
    assert told({"success": [command]}, big) == []
    os.kill(int((tmp_path / "pid").read_text()), 9)  # it was still there


def test_a_command_that_says_a_lot_does_not_block() -> None:
    noise = f"{shlex.quote(sys.executable)} -c 'import sys; sys.stderr.write(\"x\" * 3_000_000)'"
    (text,) = told({"success": [f"{noise}; echo >&2; echo last >&2; exit 1"]}, EVENT)
    assert text.endswith("it said: last")


def test_an_interruption_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def wait(process: Any, timeout: float | None = None) -> int:
        monkeypatch.undo()
        pids.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen.wait", wait)
    with pytest.raises(KeyboardInterrupt):
        parse_hooks({"success": ["sleep 600"]}).tell(EVENT, Silent())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_command_that_cannot_be_started_is_told() -> None:
    (text,) = told({"success": ["true"]}, {**EVENT, "version": "a\0b"})
    assert "hooks.success[0] was not given: cannot be started" in text


def test_addresses_and_keys_that_a_command_says_are_not_repeated() -> None:
    command = "echo POST https://hooks.slack.com/services/T0/S3CRET?k=S3CRET from s3://A:S3CRET@b/x"
    (text,) = told({"success": [f"{command} >&2; exit 1"]}, EVENT)
    assert text.endswith("it said: POST https://hooks.slack.com from s3://***@b/x")


# --- Webhooks -----------------------------------------------------------------------------------


def test_a_webhook_gets_the_event(server: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLACK_TOKEN", "S3CRET\n")
    hook = {"url": server.url, "headers": {"Authorization": "Bearer ${SLACK_TOKEN}", "X-Y": "z"}}
    assert told({"success": [hook]}, EVENT) == []
    ((method, path, headers, body),) = server.asked
    assert (method, path, body) == ("POST", "/services/T0/B0/S3CRET", EVENT)
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Bearer S3CRET"
    assert headers["X-Y"] == "z"
    assert headers["User-Agent"].startswith("memedit/")


def test_a_part_of_the_address_may_be_a_secret(
    server: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLACK_TOKEN", "S3CRET")
    monkeypatch.setenv("SLACK", server.url)
    base = server.url.removesuffix("S3CRET")
    urls = [f"{base}$SLACK_TOKEN", f"{base}a-${{SLACK_TOKEN}}?x", "$SLACK/x"]
    assert told({"success": [{"url": url} for url in urls]}, EVENT) == []
    assert [path.removeprefix("/services/T0/B0/") for _, path, _, _ in server.asked] == [
        *("S3CRET", "a-S3CRET?x", "S3CRET/x")
    ]
    (text,) = told({"success": [{"url": f"{base}$NOBODY"}]}, EVENT)
    assert text.endswith("the environment variable NOBODY is not set")


def test_the_whole_address_may_be_a_secret(
    server: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = {"success": [{"url": "$SLACK_URL"}]}
    assert told(hooks, EVENT) == [
        "the notice hooks.success[0] was not given: the environment variable SLACK_URL is not set"
    ]
    monkeypatch.setenv("SLACK_URL", "file:///etc/passwd")
    (text,) = told(hooks, EVENT)
    assert "http:// or https://" in text
    monkeypatch.setenv("SLACK_URL", server.url)
    assert told(hooks, EVENT) == []
    assert len(server.asked) == 1


def test_a_server_that_refuses_is_told_without_the_path(server: Received) -> None:
    server.answer = 404
    assert told({"failure": [{"url": server.url}]}, FAILED) == [
        "the notice hooks.failure[0] was not given:"
        f" http://127.0.0.1:{server.port}: the server answered 404"
    ]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://127.0.0.1:{port}/elsewhere"])
def test_nobody_is_followed_elsewhere(server: Received, code: int, location: str) -> None:
    server.answer, server.location = code, location.format(port=server.port)
    (text,) = told({"success": [{"url": server.url}]}, EVENT)
    assert f"sends elsewhere ({code})" in text
    assert [path for _, path, _, _ in server.asked] == ["/services/T0/B0/S3CRET"]


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (text,) = told({"success": [{"url": f"http://127.0.0.1:{port}/S3CRET"}]}, EVENT)
    assert f"http://127.0.0.1:{port}: cannot be reached" in text
    assert "S3CRET" not in text


@pytest.mark.parametrize("drip", [False, True])
def test_a_server_that_hangs_is_left(drip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that keeps sending a little, so that no single answer takes long."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    over = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                while drip and not over.wait(0.05):
                    connection.sendall(b"H")
            except OSError:
                pass
            over.wait(60)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/S3CRET"
        (text,) = told({"success": [{"url": url, "timeout_s": 0.4}]}, EVENT)
        over.set()
        thread.join()
    assert text.endswith("did not answer within 0.4 s")
    assert "S3CRET" not in text


def test_a_token_that_no_header_can_have_is_not_repeated(
    server: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = {"url": server.url, "headers": {"Authorization": "Bearer $SLACK_TOKEN"}}
    monkeypatch.setenv("SLACK_TOKEN", "S3CRET\nS3CRET")
    (text,) = told({"success": [hook]}, EVENT)
    assert "SLACK_TOKEN has more than one line" in text
    monkeypatch.delenv("SLACK_TOKEN")
    (without,) = told({"success": [hook]}, EVENT)
    assert "SLACK_TOKEN is not set" in without
    assert "S3CRET" not in text + without
    assert not server.asked
