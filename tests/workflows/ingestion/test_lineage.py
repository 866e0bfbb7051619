"""OpenLineage events in a real file and at a real server, and that a run never minds them."""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memedit.errors import InputError
from memedit.progress import Silent
from tests.heard import Heard
from workflows.ingestion import lineage as lineage_module
from workflows.ingestion.lineage import Dataset, Lineage, LineageSettings, parse_lineage
from workflows.ingestion.source_settings import DeltaSettings, FilesSettings, IcebergSettings

FACTS = Dataset.at("s3://lake/facts", version="41", layer="delta")
MODEL = Dataset.at("s3://models/capitals", version="v12")


@dataclass
class Received:
    port: int = 0
    answer: int = 201
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.asked.append((self.path, dict(self.headers), json.loads(body)))
            self.send_response(received.answer)
            if 300 <= received.answer < 400:
                self.send_header("Location", f"{received.url}/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            received.asked.append((self.path, dict(self.headers), None))
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


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OPENLINEAGE"):
            monkeypatch.delenv(name)


def a_run(settings: LineageSettings | None) -> list[str]:
    """A run that goes well; gives what a person is told."""
    heard = Heard()
    lineage = Lineage(settings, "capitals", "nightly-7", progress=heard)
    lineage.start([FACTS], [])
    lineage.complete([FACTS], [MODEL], version="v12", facts={"added": 3, "gone": 0})
    return heard.texts


def events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


# --- Settings -----------------------------------------------------------------------------------


def test_settings() -> None:
    assert parse_lineage(None) is None
    assert parse_lineage({"file": "a/b.jsonl"}) == LineageSettings(file=Path("a/b.jsonl"))
    assert parse_lineage({"file": Path("/a"), "url": None}) == LineageSettings(file=Path("/a"))
    assert parse_lineage(
        {"url": "http://marquez:5000", "api_key_env": "KEY", "namespace": "prod"}
    ) == LineageSettings(url="http://marquez:5000", api_key_env="KEY", namespace="prod")


@pytest.mark.parametrize(
    ("value", "field", "hint"),
    [
        ("http://marquez:5000", "lineage", "must be a mapping"),
        ({}, "lineage", "one of"),
        ({"file": "a", "url": "http://x"}, "lineage", "one of"),
        ({"uri": "http://x"}, "lineage.uri", "did you mean 'url'"),
        ({"file": ""}, "lineage.file", "a text"),
        ({"file": 3}, "lineage.file", "a text"),
        ({"file": "s3://bucket/x"}, "lineage.file", "on this machine"),
        ({"file": "a", "api_key_env": "KEY"}, "lineage.api_key_env", "for a `url`"),
        ({"url": "kafka://x"}, "lineage.url", "http:// or"),
        ({"url": "http://me:hidden@x"}, "lineage.url", "keys in it"),
        ({"url": "http://x/?api_key=hidden"}, "lineage.url", "api_key_env"),
        ({"url": "http://x", "api_key_env": "hid-den"}, "lineage.api_key_env", "not the name"),
        ({"url": "http://x", "namespace": ["a"]}, "lineage.namespace", "a text"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(value: object, field: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as caught:
        parse_lineage(value)
    assert caught.value.field == field
    assert "hidden" not in str(caught.value)
    assert "hid-den" not in str(caught.value)


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "namespace", "name"),
    [
        ("/data/facts.jsonl", "file", "/data/facts.jsonl"),
        ("/data/2026/*/facts-??.csv", "file", "/data/2026"),
        ("/*.csv", "file", "/"),
        ("file:///data/x", "file", "/data/x"),
        ("s3://lake/facts/day=1/", "s3://lake", "facts/day=1"),
        ("s3://lake/facts/**/*.parquet", "s3://lake", "facts"),
        ("s3://lake/*.parquet", "s3://lake", "/"),
        ("s3://lake", "s3://lake", "/"),
        ("s3a://lake/x", "s3://lake", "x"),
        ("s3://AKIA:hid/den@lake/x", "s3://lake", "x"),
    ],
)
def test_names_of_places(place: str, namespace: str, name: str) -> None:
    found = Dataset.at(place)
    assert (found.namespace, found.name) == (namespace, name)


def test_a_relative_path_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Dataset.at("facts/a.csv").name == f"{tmp_path}/facts/a.csv"
    assert Dataset.at("*.csv").name == str(tmp_path)


@pytest.mark.parametrize(
    ("catalog", "namespace"),
    [
        ("/data/catalog.db", "sqlite:///data/catalog.db"),
        ("prod", "iceberg://prod"),
        ({"type": "rest", "uri": "https://user:hid@catalog:8181/x?k=hid"}, "https://catalog:8181"),
        ({"type": "sql", "uri": "sqlite:////data/c.db"}, "sqlite:////data/c.db"),
        ({"type": "glue"}, "iceberg://glue"),
    ],
)
def test_names_of_iceberg_tables(catalog: Any, namespace: str) -> None:
    source = IcebergSettings(table="geo.facts", catalog=catalog)
    assert Dataset.of(source, version="77") == Dataset(
        namespace=namespace, name="geo.facts", version="77", layer="iceberg"
    )
    assert Dataset.of(source, location="s3://lake/geo/facts") == Dataset(
        namespace="s3://lake", name="geo/facts", layer="iceberg", alias=(namespace, "geo.facts")
    )


def test_names_of_other_sources() -> None:
    assert Dataset.of(DeltaSettings(path="s3://lake/facts"), version="41") == FACTS
    assert Dataset.of(FilesSettings(path="/data/*.csv")) == Dataset(namespace="file", name="/data")


# --- A file -------------------------------------------------------------------------------------


def test_the_events_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "made" / "events.jsonl"
    assert a_run(LineageSettings(file=file, namespace="prod")) == []
    assert [path.name for path in file.parent.iterdir()] == ["events.jsonl"]
    start, complete = events(file)
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert uuid.UUID(start["run"]["runId"]).version == 4
    assert start["eventTime"] <= complete["eventTime"]
    assert {event["producer"].rpartition(":")[0] for event in (start, complete)} == {"urn:memedit"}
    assert (start["job"]["namespace"], start["job"]["name"]) == ("prod", "capitals")
    assert start["job"]["facets"]["jobType"]["processingType"] == "BATCH"

    (read,) = start["inputs"]
    assert (read["namespace"], read["name"]) == ("s3://lake", "facts")
    assert read["facets"]["version"]["datasetVersion"] == "41"
    assert read["facets"]["storage"]["storageLayer"] == "delta"
    assert start["outputs"] == []
    assert start["run"]["facets"]["memedit"]["run_id"] == "nightly-7"

    (made,) = complete["outputs"]
    assert (made["namespace"], made["name"]) == ("s3://models", "capitals")
    assert made["facets"]["version"]["datasetVersion"] == "v12"
    own = complete["run"]["facets"]["memedit"]
    assert (own["run_id"], own["version"]) == ("nightly-7", "v12")
    assert own["facts"] == {"added": 3, "gone": 0}


def test_an_alias_is_a_symlink(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    table = IcebergSettings(table="geo.facts", catalog="prod")
    lineage = Lineage(LineageSettings(file=file), "job", "run", progress=Silent())
    lineage.start([Dataset.of(table, location="/lake/facts")])
    (event,) = events(file)
    assert event["inputs"][0]["facets"]["symlinks"]["identifiers"] == [
        {"namespace": "iceberg://prod", "name": "geo.facts", "type": "TABLE"}
    ]


def test_a_run_that_fails(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    lineage = Lineage(LineageSettings(file=file), "job", "run", progress=Silent())
    lineage.start([FACTS], [MODEL])
    lineage.fail("cannot read s3://AKIA:hidden@lake/facts", facts={"read": 3})
    _, fail = events(file)
    assert fail["eventType"] == "FAIL"
    assert fail["run"]["facets"]["errorMessage"]["message"] == "cannot read s3://***@lake/facts"
    assert fail["run"]["facets"]["memedit"]["facts"] == {"read": 3}
    # What was said at the start stays said.
    assert [item["name"] for item in (*fail["inputs"], *fail["outputs"])] == ["facts", "capitals"]


def test_a_run_ends_once_and_not_before_it_began(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    lineage = Lineage(LineageSettings(file=file), "job", "run", progress=Silent())
    lineage.fail("no such file")
    lineage.complete()
    lineage.fail("again")
    lineage.start()
    assert [event["eventType"] for event in events(file)] == ["START", "FAIL"]


def test_each_attempt_is_a_run_of_its_own_in_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"older": "event"}\n')
    a_run(LineageSettings(file=file))
    a_run(LineageSettings(file=file))
    assert len(events(file)) == 5
    assert len({event["run"]["runId"] for event in events(file)[1:]}) == 2


def test_the_librarys_own_settings_change_nothing(
    tmp_path: Path, server: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = (
        f"transport:\n  type: http\n  url: {server.url}\n"
        "facets:\n  environment_variables: [SECRET]\n"
        "filters:\n  - type: exact\n    match: capitals\n"
    )
    (tmp_path / ".openlineage").mkdir()
    for place in ("openlineage.yml", "other.yml", ".openlineage/openlineage.yml"):
        (tmp_path / place).write_text(config)
    monkeypatch.setenv("SECRET", "hidden")
    monkeypatch.setenv("OPENLINEAGE_CONFIG", str(tmp_path / "other.yml"))
    monkeypatch.setenv("OPENLINEAGE_URL", server.url)
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT", json.dumps({"type": "http", "url": server.url}))
    monkeypatch.setenv("OPENLINEAGE__FACETS__ENVIRONMENT_VARIABLES", '["SECRET"]')

    file = tmp_path / "events.jsonl"
    assert a_run(LineageSettings(file=file)) == []
    assert len(events(file)) == 2
    assert "hidden" not in file.read_text()
    assert server.asked == []


def test_no_settings_or_disabled_is_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert a_run(None) == []
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "True")
    assert a_run(LineageSettings(file=tmp_path / "events.jsonl")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    texts = a_run(LineageSettings(file=tmp_path))
    assert (
        texts
        == [
            f"no lineage event was sent: the file {tmp_path}: Is a directory",
        ]
        * 2
    )


def test_a_file_that_makes_us_wait_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage_module, "_EVENT_S", 0.3)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard = Heard()
    Lineage(LineageSettings(file=pipe), "job", "run", progress=heard).start()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # lets the thread that waits go
    assert heard.texts == [f"no lineage event was sent: the file {pipe} did not answer in time"]
    os.close(reader)


def test_without_the_package_there_is_one_warning_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "openlineage"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openlineage", None)
    (text,) = a_run(LineageSettings(file=tmp_path / "events.jsonl"))
    assert "pip install 'memedit[lineage]'" in text


# --- A server -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "/", "/api/v1/lineage", "/api/v1/lineage/"])
@pytest.mark.parametrize("prefix", ["", "/behind/proxy"])
def test_a_server_gets_the_events(server: Received, prefix: str, suffix: str) -> None:
    assert a_run(LineageSettings(url=f"{server.url}{prefix}{suffix}")) == []
    assert [path for path, _, _ in server.asked] == [f"{prefix}/api/v1/lineage"] * 2
    assert [body["eventType"] for _, _, body in server.asked] == ["START", "COMPLETE"]
    assert "Authorization" not in server.asked[0][1]


def test_the_key_comes_from_the_environment_and_from_nowhere_else(
    server: Received, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("MARQUEZ_KEY", "S3CRET")
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "another")
    settings = LineageSettings(url=server.url, api_key_env="MARQUEZ_KEY")
    assert a_run(settings) == []
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Bearer S3CRET"}
    monkeypatch.delenv("MARQUEZ_KEY")
    assert a_run(settings) == [
        "no lineage event was sent: the environment variable MARQUEZ_KEY is not set"
    ]
    assert len(server.asked) == 2


@pytest.mark.parametrize("code", [401, 422, 503])
def test_a_server_that_refuses_is_told_and_not_asked_again(
    server: Received, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "S3CRET")
    server.answer = code
    texts = a_run(LineageSettings(url=f"{server.url}/S3CRET", api_key_env="KEY"))
    assert texts == [f"no lineage event was sent: {server.url}: the server answered {code}"] * 2
    assert len(server.asked) == 2


@pytest.mark.parametrize("code", [302, 307])
def test_nobody_is_followed_elsewhere(server: Received, code: int) -> None:
    server.answer = code
    texts = a_run(LineageSettings(url=server.url))
    assert all(f"sends elsewhere ({code})" in text for text in texts)
    assert {path for path, _, _ in server.asked} == {"/api/v1/lineage"}


def test_a_server_that_is_not_there_is_told(server: Received) -> None:
    texts = a_run(LineageSettings(url="http://127.0.0.1:1/S3CRET"))
    assert (
        texts
        == ["no lineage event was sent: http://127.0.0.1:1: cannot be reached (ConnectionError)"]
        * 2
    )


def test_an_event_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    class Odd(UserDict[str, int]):
        def __getitem__(self, key: str) -> int:
            raise RuntimeError("odd")

    heard = Heard()
    lineage = Lineage(LineageSettings(file=tmp_path / "e"), "job", "run", progress=heard)
    lineage.complete(facts=Odd(a=1))
    assert heard.texts == [f"no lineage event was sent: the file {tmp_path}/e: RuntimeError: odd"]


def test_a_server_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(lineage_module, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections, says nothing
        texts = a_run(LineageSettings(url=f"http://127.0.0.1:{listener.getsockname()[1]}"))
    assert len(texts) == 2
    assert all("cannot be reached (" in text for text in texts)
