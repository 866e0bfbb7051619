"""Objects of a real S3 server: locations, refusals, and answers that were lost."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import boto3
import pytest

from cluster import s3_requests
from cluster.s3 import Place
from cluster.s3_requests import NotAsExpected, forget_client
from memedit.errors import InputError, MemeditError
from tests.cluster.test_s3_requests import KEYS, everything
from tests.s3.fixtures import use_aws_environment
from tests.s3.proxy import DisturbingProxy
from tests.s3.server import Identity, SeaweedServer, aws_environment

# Locations


@pytest.mark.parametrize("location", ["s3://me:hidden@bucket/x", "s3://me:hidden/bucket"])
def test_a_location_with_keys_in_it_is_not_shown(location: str) -> None:
    with pytest.raises(InputError, match="keys come from the environment") as caught:
        Place.of(location)
    assert "hidden" not in everything(caught.value)


@pytest.mark.parametrize(
    "location",
    [
        *("s3://", "s3:///x", "s3://b", "s3://UPPER/x", "s3://under_score/x", "s3://-x-/y"),
        *("s3://bucket/a/../b", "s3://bucket/..", "s3://bucket/./a", "s3://bucket/a//b"),
        *("s3://bucket?x/a", "s3:bucket/a", "https://bucket/a", f"s3://{'b' * 64}/a"),
    ],
)
def test_odd_locations_are_refused(location: str) -> None:
    with pytest.raises(InputError) as caught:
        Place.of(location)
    assert location in str(caught.value)


def test_locations() -> None:
    assert str(Place.of("s3://bucket")) == "s3://bucket"
    assert str(Place.of("s3://bucket/")) == "s3://bucket"
    place = Place.of("s3://my.bucket-1/a b/ü@/")
    assert (place.bucket, place.prefix) == ("my.bucket-1", "a b/ü@")
    assert place.key("n") == "a b/ü@/n" and Place.of("s3://bucket").key("n") == "n"


# A real storage


def test_what_a_real_storage_refuses(
    s3: str, s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place.of(s3)
    place.put("a", b"data")
    with pytest.raises(InputError, match=f"{s3}/b: there is no such object"):
        place.read_into("b", 0, memoryview(bytearray(1)), etag='"x"')
    absent = Place.of("s3://no-such-bucket/x")
    tries: dict[str, Callable[[], Any]] = {
        "list": lambda: absent.listing("", deep=True),
        "get": lambda: absent.get("a"),
        "put": lambda: absent.put("a", b"", absent=True),
        "begin": lambda: absent.begin("a"),
        "uploads": lambda: absent.uploads(""),
    }
    for attempt in tries.values():
        with pytest.raises(InputError, match=r"s3://no-such-bucket/x.*: there is no such bucket"):
            attempt()

    wrong = Identity(access_key=s3_server.access_key, secret_key="wrong-and-secret")
    unknown = Identity(access_key="AKIAUNKNOWN", secret_key="wrong-and-secret")
    for identity, code in ((wrong, "SignatureDoesNotMatch"), (unknown, "InvalidAccessKeyId")):
        use_aws_environment(monkeypatch, s3_server.environment(identity=identity))
        with pytest.raises(InputError, match=rf"{s3}/a: access denied \({code}\)") as caught:
            place.get("a")
        assert "wrong-and-secret" not in everything(caught.value)

    use_aws_environment(monkeypatch, s3_server.environment(identity=s3_server.reader))
    assert place.get("a") is not None
    denied: dict[str, Callable[[], Any]] = {
        "put": lambda: place.put("b", b""),
        "delete": lambda: place.delete(["a"]),
        "begin": lambda: place.begin("b"),
        "copy": lambda: place.copy("b", place, "a", etag="x"),
    }
    for attempt in denied.values():
        with pytest.raises(InputError, match=rf"{s3}/.*: access denied \(AccessDenied\)"):
            attempt()


def test_without_keys(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_client()
    with pytest.raises(InputError, match=f"{s3}/a: no AWS keys.*AWS_ACCESS_KEY_ID"):
        Place.of(s3).get("a")
    monkeypatch.setenv("AWS_PROFILE", "unknown-profile")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    forget_client()
    with pytest.raises(InputError, match=r"AWS_PROFILE.*unknown-profile"):
        Place.of(s3).get("a")


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        use_aws_environment(monkeypatch, aws_environment(url, KEYS))
        monkeypatch.setattr(s3_requests, "_FIRST_PATIENCE_S", 0.5)
        with pytest.raises(MemeditError, match=r"s3://bucket/x/a: .* 0\.5 s .*EndpointConnection"):
            Place.of("s3://bucket/x").get("a")


# Lost answers


def test_a_lost_answer_to_a_conditional_put(s3_proxy: DisturbingProxy, s3: str) -> None:
    place = Place.of(s3)
    lose = iter([True, False] * 4)
    s3_proxy.on_request = lambda method, path, query: (
        "lost answer" if method == "PUT" and next(lose) else None
    )
    first = place.put("a", b"one", absent=True)
    second = place.put("a", b"two", etag=first)
    assert place.get("a") == (b"two", second) and first != second
    # Not ours: somebody else's object was there all the time.
    with pytest.raises(NotAsExpected):
        place.put("a", b"three", absent=True)
    with pytest.raises(NotAsExpected):
        place.put("a", b"three", etag=first)
    assert place.get("a") == (b"two", second)
    assert s3_proxy.disturbed[("PUT", "lost answer")] == 4


def test_a_lost_answer_to_complete(s3_proxy: DisturbingProxy, s3: str) -> None:
    place = Place.of(s3)
    lost = []

    def lose(method: str, path: str, query: dict[str, str]) -> Any:
        first = method == "POST" and "uploadId" in query and query["uploadId"] not in lost
        lost.extend([query["uploadId"]] if first else [])
        return "lost answer" if first else None

    s3_proxy.on_request = lose
    upload = place.begin("a")
    upload.put(1, b"data")
    entry = upload.complete(4)
    assert place.get("a") == (b"data", entry.etag) and len(lost) == 1
    # The second one finds an object that is not its own, and says so.
    upload = place.begin("a")
    upload.put(1, b"more")
    with pytest.raises(NotAsExpected):
        upload.complete(4)
    upload.abort()
    upload.abort()
    assert place.get("a") == (b"data", entry.etag) and place.uploads("") == []
