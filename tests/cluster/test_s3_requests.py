"""One request until it is answered: what is tried again, for how long, and what errors say."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import boto3
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    IncompleteReadError,
    ParamValidationError,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError

from cluster import s3_requests
from cluster.s3_requests import NotAsExpected, ask, forget_client
from memedit.errors import InputError, LockError, MemeditError
from tests.s3.fixtures import use_aws_environment
from tests.s3.server import Identity, aws_environment

KEYS = Identity(access_key="AKIAWELLKNOWN", secret_key="very/secret+key")
TOKEN = "a-session-token"
PLACE = "s3://bucket/key"
URL = "http://127.0.0.1:1"


def refusal(code: str, status: int, message: str = "No.") -> ClientError:
    answer: Any = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(answer, "GetObject")


NETWORK = {
    "refused": EndpointConnectionError(endpoint_url=URL),
    "closed": ConnectionClosedError(endpoint_url=URL),
    "silent": ReadTimeoutError(endpoint_url=URL),
    "short": IncompleteReadError(actual_bytes=1, expected_bytes=2),
    "reset": ConnectionResetError(104, "reset"),
    "no XML": ResponseParserError("no XML"),
    "no ETag": KeyError("ETag"),
}


@dataclass
class Clock:
    """Time passes when somebody sleeps, or a request takes long."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        self.now += duration_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """No server, keys that are secret, and a clock of the test's own."""
    use_aws_environment(monkeypatch, aws_environment(URL, KEYS) | {"AWS_SESSION_TOKEN": TOKEN})
    clock, no_client = Clock(), cast(Any, None)
    requests = s3_requests._Requests(boto3.session.Session(), no_client)
    monkeypatch.setattr(s3_requests, "_requests", lambda process: requests)
    monkeypatch.setattr(s3_requests, "time", clock)
    return clock


class Requests:
    """Makes one request after the other go as it is told; then all are granted."""

    def __init__(self, clock: Clock, *errors: BaseException | None, takes_s: float = 0.0) -> None:
        self.clock, self.errors, self.takes_s, self.count = clock, list(errors), takes_s, 0

    def __call__(self, client: Any) -> str:
        self.count += 1
        self.clock.now += self.takes_s
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return "granted"


def always(error: Exception) -> list[BaseException | None]:
    return [error] * 10_000


# What is tried again


@pytest.mark.parametrize("name", NETWORK)
def test_trouble_of_the_network_is_tried_again(clock: Clock, name: str) -> None:
    request = Requests(clock, *[NETWORK[name]] * 4)
    assert ask(request, PLACE) == "granted" and request.count == 5


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("InternalError", 500),
        ("SlowDown", 503),
        ("ServiceUnavailable", 503),
        ("502", 502),
        ("504", 504),
        ("429", 429),
        *(("Odd", status) for status in (408, 409, 500, 503)),
        *((code, 200) for code in ("SlowDown", "Throttling", "OperationAborted")),
        ("RequestTimeout", 400),
        ("IncompleteBody", 400),
        ("BadDigest", 400),
        ("XAmzContentChecksumMismatch", 400),
        ("ConditionalRequestConflict", 409),
        ("InternalError", 200),  # the error of a copy may come in an answer that began well
    ],
)
def test_what_passes_is_tried_again(clock: Clock, code: str, status: int) -> None:
    request = Requests(clock, *[refusal(code, status)] * 4)
    assert ask(request, PLACE) == "granted" and request.count == 5


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("NoSuchBucket", 404, "no such bucket"),
        ("NoSuchKey", 404, "no such object"),
        ("404", 404, "no such object"),
        ("AccessDenied", 403, "access denied"),
        ("403", 403, "access denied"),
        ("InvalidAccessKeyId", 403, "check the AWS keys"),
        ("SignatureDoesNotMatch", 403, "check the AWS keys"),
        ("ExpiredToken", 400, "ExpiredToken"),
        ("PermanentRedirect", 301, "another region"),
        ("AuthorizationHeaderMalformed", 400, "AWS_REGION"),
        ("EntityTooLarge", 400, "the storage refuses: EntityTooLarge No."),
    ],
)
def test_a_refusal_is_told_at_once(clock: Clock, code: str, status: int, says: str) -> None:
    request = Requests(clock, *always(refusal(code, status)))
    with pytest.raises(InputError, match=says) as caught:
        ask(request, PLACE)
    assert request.count == 1 and not clock.slept
    assert str(caught.value).startswith(f"{PLACE}: ")


def test_what_the_storage_cannot_do_is_no_error_of_the_input(clock: Clock) -> None:
    with pytest.raises(MemeditError, match=f"{PLACE}: the storage refuses: NotImpl") as caught:
        ask(Requests(clock, refusal("NotImplemented", 501)), PLACE)
    assert not isinstance(caught.value, InputError)


def test_an_upload_that_another_run_gave_up(clock: Clock) -> None:
    with pytest.raises(LockError, match=f"{PLACE}: .* by another run"):
        ask(Requests(clock, refusal("NoSuchUpload", 404)), PLACE)


def test_a_condition_that_does_not_hold(clock: Clock) -> None:
    for error in (refusal("PreconditionFailed", 412), refusal("412", 412)):
        request = Requests(clock, *always(error))
        with pytest.raises(NotAsExpected, match=PLACE):
            ask(request, PLACE, missing=None)
        assert request.count == 1


def test_what_is_missing_may_be_expected(clock: Clock) -> None:
    for code in ("NoSuchKey", "404", "NotFound", "NoSuchUpload"):
        assert ask(Requests(clock, refusal(code, 404)), PLACE, missing="none") == "none"
    with pytest.raises(InputError, match="no such bucket"):
        ask(Requests(clock, refusal("NoSuchBucket", 404)), PLACE, missing=None)


def test_a_mistake_of_ours_is_not_tried_again(clock: Clock) -> None:
    request = Requests(clock, *always(ParamValidationError(report="bad")))
    with pytest.raises(MemeditError, match=f"{PLACE}: Parameter validation"):
        ask(request, PLACE)
    with pytest.raises(KeyboardInterrupt):
        ask(Requests(clock, KeyboardInterrupt()), PLACE)
    assert request.count == 1


def test_damage_that_comes_every_time_is_told(clock: Clock) -> None:
    request = Requests(clock, *always(refusal("BadDigest", 400)))
    with pytest.raises(InputError, match="BadDigest"):
        ask(request, PLACE)
    assert request.count == 6
    # Damage that comes once, after other trouble, is nothing special.
    request = Requests(clock, *[refusal("SlowDown", 503)] * 6, refusal("BadDigest", 400))
    assert ask(request, PLACE) == "granted"


def test_doubt_is_kept(clock: Clock) -> None:
    doubt: list[Exception] = []
    lost = NETWORK["closed"]
    with pytest.raises(NotAsExpected):
        ask(Requests(clock, lost, refusal("PreconditionFailed", 412)), PLACE, doubt=doubt)
    assert doubt == [lost]


# For how long


def meet(clock: Clock) -> None:
    """Let the storage answer once."""
    assert ask(Requests(clock), PLACE) == "granted"


def fails_after_s(clock: Clock, request: Callable[[Any], Any]) -> float:
    began = clock.now
    with pytest.raises(MemeditError, match=f"{PLACE}: the storage did not answer") as caught:
        ask(request, PLACE)
    assert not isinstance(caught.value, InputError) and "run again" in str(caught.value)
    return clock.now - began


def test_patience(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = NETWORK["refused"]
    # Who never answered is more likely a wrong address.
    assert 10 < fails_after_s(clock, Requests(clock, *always(refused))) <= 15
    meet(clock)
    assert 170 < fails_after_s(clock, Requests(clock, *always(refused))) <= 180
    meet(clock)
    assert max(clock.slept) <= 5
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "40")
    assert 35 <= fails_after_s(clock, Requests(clock, *always(refusal("SlowDown", 503)))) <= 40
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "0")
    request = Requests(clock, *always(refused))
    assert fails_after_s(clock, request) == 0 and request.count == 1
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "long")
    meet(clock)
    assert 170 < fails_after_s(clock, Requests(clock, *always(refused))) <= 180


def test_a_slow_request_that_fails_once_is_tried_again(clock: Clock) -> None:
    meet(clock)
    request = Requests(clock, NETWORK["reset"], takes_s=300)
    assert ask(request, PLACE) == "granted" and request.count == 2


def test_the_clean_up_does_not_wait_once_more(clock: Clock) -> None:
    """Of a storage that has gone, or every request of a run's end would take three minutes."""
    meet(clock)
    refused = NETWORK["refused"]
    fails_after_s(clock, Requests(clock, *always(refused)))
    request = Requests(clock, *always(refused))
    assert fails_after_s(clock, request) < 5
    # As soon as it answers, there is patience again.
    meet(clock)
    assert fails_after_s(clock, Requests(clock, *always(refused))) > 170


def test_an_answer_to_another_request_is_no_answer_to_this_one(clock: Clock) -> None:
    meet(clock)

    def request(client: Any) -> str:
        meet(clock)  # as other threads do meanwhile
        raise refusal("InternalError", 500)

    assert 170 < fails_after_s(clock, request) <= 180


# Keys stay secret


def everything(error: BaseException) -> str:
    """All that a log could hold of an error."""
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize(
    "error", [refusal("Odd", 400), refusal("Odd", 501), refusal("SlowDown", 503)]
)
def test_keys_that_a_server_repeats_are_not_shown(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, error: ClientError
) -> None:
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "0")
    code, status = (
        error.response["Error"]["Code"],
        error.response["ResponseMetadata"]["HTTPStatusCode"],
    )
    said = f"{KEYS.access_key} with {KEYS.secret_key} and {TOKEN}"
    with pytest.raises(MemeditError) as caught:
        ask(Requests(clock, refusal(code, status, said)), PLACE)
    shown = everything(caught.value)
    assert "*** with *** and ***" in shown and PLACE in shown
    assert not any(secret in shown for secret in (KEYS.access_key, KEYS.secret_key, TOKEN))


def test_a_password_in_the_address_is_not_shown(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "0")
    for password in ("hidden", "hidden/hidden", "hid@den/hidden", "h:hidden"):
        address = EndpointConnectionError(endpoint_url=f"http://me:{password}@127.0.0.1:1/bucket")
        with pytest.raises(MemeditError, match=r"//\*\*\*@127.0.0.1:1") as caught:
            ask(Requests(clock, address), PLACE)
        assert "hid" not in everything(caught.value)


def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws_environment(monkeypatch, aws_environment("me:hidden@127.0.0.1", KEYS))
    with pytest.raises(InputError, match=r"S3: Invalid endpoint: \*\*\*@127.0.0.1") as caught:
        ask(lambda client: None, PLACE)
    assert "hidden" not in everything(caught.value)


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_by_either_name(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = aws_environment("http://127.0.0.1:1", KEYS)
    regions = ("AWS_REGION", "AWS_DEFAULT_REGION")
    use_aws_environment(monkeypatch, {k: v for k, v in environment.items() if k not in regions})
    for name in regions:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "eu-north-1")
    forget_client()
    assert ask(lambda client: client.meta.region_name, PLACE) == "eu-north-1"
    assert ask(lambda client: client.meta.region_name, PLACE, timeout_s=1) == "eu-north-1"
    forget_client()
