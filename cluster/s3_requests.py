"""One request to an S3-compatible storage, made until it is answered; the only use of boto3.

Asked again while that can help, and otherwise told as an error that names the object and no secret.
Does not know what is asked for (`cluster.s3`).
"""

from __future__ import annotations

import functools
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from memedit.errors import InputError, LockError, MemeditError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

PATIENCE_S = 180.0
"""For how long a storage that has answered before may be away; `MEMEDIT_S3_PATIENCE_S`."""
_FIRST_PATIENCE_S = 15.0
"""The same before its first answer: more likely the address is wrong."""
THREADS = 10
_LONGEST_PAUSE_S = 5.0
_MOST_DAMAGED = 6
"""Requests that may arrive damaged, one after the other, before the fault is not the network's."""

_AGAIN_STATUS = {408, 409, 429, 500, 502, 503, 504}
_AGAIN_CODES = {
    *("SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling"),
    *("ConditionalRequestConflict", "OperationAborted", "IncompleteBody", "BadDigest"),
    "XAmzContentChecksumMismatch",
}
_MISSING = {"404", "NoSuchKey", "NotFound", "NoSuchUpload"}
_DENIED = {
    *("403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("ExpiredToken", "InvalidToken", "AllAccessDisabled", "AccountProblem"),
}
_NO_KEYS = (
    *(NoCredentialsError, PartialCredentialsError, TokenRetrievalError),
    *(CredentialRetrievalError, SSOError),
)
_NETWORK_ERRORS = (
    *(BotoConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError),
    # An answer that breaks off lacks fields, or is no XML.
    *(OSError, EOFError, KeyError, ResponseParserError),
)


class NotAsExpected(MemeditError):
    """A conditional request found another version of the object, or one where none should be."""


@dataclass
class _Requests:
    """The clients of this process, and whether the storage has answered them."""

    session: boto3.session.Session
    client: S3Client
    hasty: dict[float, S3Client] = field(default_factory=dict)
    """By how long they wait for an answer."""
    met: bool = False
    silent_since: float | None = None
    """Since when it has answered nobody, though it was asked."""

    def answered(self) -> None:
        """Note an answer, whatever it says."""
        self.met, self.silent_since = True, None


@functools.cache
def _requests(process: int) -> _Requests:
    try:
        session = boto3.session.Session()
        return _Requests(session, _client(session, connect_s=10, read_s=60))
    except ProfileNotFound as error:
        raise InputError(str(error), source="S3", field="AWS_PROFILE") from error
    except (BotoCoreError, ValueError) as error:
        raise InputError(_without_password(str(error)), source="S3") from None


def _client(session: boto3.session.Session, *, connect_s: float, read_s: float) -> S3Client:
    config = Config(
        # Asking again is done here, for the body of an answer too.
        retries={"total_max_attempts": 1},
        connect_timeout=connect_s,
        read_timeout=read_s,
        max_pool_connections=3 * THREADS,
    )
    # boto3 itself reads AWS_DEFAULT_REGION only; the other SDKs read this one.
    region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    return session.client("s3", region_name=region, config=config)


def _client_of(requests: _Requests, timeout_s: float | None) -> S3Client:
    if timeout_s is None:
        return requests.client
    if timeout_s not in requests.hasty:
        requests.hasty[timeout_s] = _client(requests.session, connect_s=timeout_s, read_s=timeout_s)
    return requests.hasty[timeout_s]


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="s3")


def threads() -> ThreadPoolExecutor:
    """The threads of this process for requests that need nothing of each other."""
    return _threads(os.getpid())


def has_keys() -> bool:
    """Whether AWS keys are set, in the environment, a profile or by the machine's role.

    Raises:
        InputError: The profile that is asked for does not exist.
    """
    return _requests(os.getpid()).session.get_credentials() is not None


def reach() -> str:
    """Ask the storage for anything; where it is, for people.

    Raises:
        InputError, MemeditError: It cannot be reached, or refuses the keys.
    """
    endpoint = _without_password(_requests(os.getpid()).client.meta.endpoint_url)
    try:
        found = ask(lambda s3: s3.list_buckets(), endpoint)
        return f"{endpoint}: {len(found['Buckets'])} buckets"
    except InputError as error:
        if "AccessDenied" not in error.message:
            raise
        return f"{endpoint}: answers; the keys may not list buckets"


def forget_client() -> None:
    """Read the environment again with the next request; for tests."""
    _requests.cache_clear()


_RAISE: Any = object()


def ask(
    request: Callable[[S3Client], T],
    place: str,
    *,
    missing: Any = _RAISE,
    doubt: list[Exception] | None = None,
    timeout_s: float | None = None,
) -> T:
    """Make one request, again and again while that can help.

    Args:
        request: Makes it, and reads the answer to its end.
        place: What it is about, for errors.
        missing: Given where the object is not there; without it that is an error.
        doubt: Takes the errors after which nobody knows whether the request was granted.
        timeout_s: How long to wait for an answer before asking again; a minute by default.

    Raises:
        InputError: The storage refuses: no such bucket or object, wrong keys, no permission.
        NotAsExpected: A condition of the request does not hold.
        LockError: The upload in parts that it belongs to is gone.
        MemeditError: It could not be reached for too long, or answers strangely.
    """
    requests = _requests(os.getpid())
    began, pause_s, damaged = time.monotonic(), 0.1, 0
    failing_since: float | None = None
    while True:
        try:
            answer = request(_client_of(requests, timeout_s))
            requests.answered()
            return answer
        except ClientError as error:
            requests.answered()
            code, status = _code(error)
            if status == 412 or code == "PreconditionFailed":
                raise NotAsExpected(f"{place}: is not as expected") from error
            if code in _MISSING and code != "NoSuchBucket" and missing is not _RAISE:
                absent: T = missing
                return absent
            damaged = damaged + 1 if status == 400 else 0
            again = status in _AGAIN_STATUS or code in _AGAIN_CODES
            if not again or damaged >= _MOST_DAMAGED:
                raise _refused(code, status, error, place) from _cause(error)
            reason: Exception = error
        except _NO_KEYS as error:
            raise InputError(
                "no AWS keys were found, or they could not be fetched anew; set AWS_ACCESS_KEY_ID"
                " and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
                source=place,
            ) from error
        except _NETWORK_ERRORS as error:
            reason, damaged = error, 0
            if requests.silent_since is None:
                requests.silent_since = time.monotonic()
        except BotoCoreError as error:
            raise MemeditError(f"{place}: {_without_secrets(str(error))}") from _cause(error)
        if doubt is not None:
            doubt.append(reason)
        now = time.monotonic()
        if failing_since is None:
            # The time that a slow request took before it failed was not spent on waiting.
            failing_since = now if requests.met else began
        patience_s = _patience_s() if requests.met else min(_FIRST_PATIENCE_S, _patience_s())
        # Others may have waited for a storage that is away; nobody does so once more.
        waiting_since = min(failing_since, requests.silent_since or now)
        if now - waiting_since + pause_s > patience_s:
            raise MemeditError(
                f"{place}: the storage did not answer for {patience_s:g} s"
                f" ({_without_secrets(_line(reason))}); nothing is lost: run again when it does"
            ) from _cause(reason)
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _patience_s() -> float:
    try:
        return float(os.environ["MEMEDIT_S3_PATIENCE_S"])
    except (KeyError, ValueError):
        return PATIENCE_S


def _code(error: ClientError) -> tuple[str, int]:
    response: Any = error.response
    return (
        str(response.get("Error", {}).get("Code", "")),
        int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)),
    )


def _refused(code: str, status: int, error: ClientError, place: str) -> MemeditError:
    if code == "NoSuchBucket":
        return InputError("there is no such bucket", source=place)
    if code in _DENIED or status in (401, 403):
        return InputError(
            f"access denied ({code}); check the AWS keys, and what they are allowed to do here",
            source=place,
        )
    if code == "NoSuchUpload":
        return LockError(f"{place}: its upload in parts was given up by another run")
    if code in _MISSING:
        return InputError("there is no such object", source=place)
    if status in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return InputError(f"the bucket is in another region ({code}); set AWS_REGION", source=place)
    message = str(error.response.get("Error", {}).get("Message", ""))
    kind: type[MemeditError] = InputError if 400 <= status < 500 else MemeditError
    text = f"the storage refuses: {_without_secrets(f'{code} {message}'.strip())}"
    return kind(text, source=place) if kind is InputError else kind(f"{place}: {text}")


def _line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _cause(error: Exception) -> Exception | None:
    """The error for tracebacks to show, unless there is a secret in it."""
    return error if _without_secrets(str(error)) == str(error) else None


def _without_secrets(text: str) -> str:
    """`text` without the keys that are in use, should a server or library repeat them."""
    text = _without_password(text)
    try:
        keys = _requests(os.getpid()).session.get_credentials()
        secrets = () if keys is None else (keys.access_key, keys.secret_key, keys.token)
    except Exception:  # keys that must be fetched anew and cannot be: there are none to tell
        secrets = ()
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def _without_password(text: str) -> str:
    """`text` without the user and the password that an address may have."""
    text = re.sub(r"(?<=://)[^\s\"']*@", "***@", text)  # a secret of AWS may hold slashes
    return re.sub(r"[^/\s\"':]+:[^/\s\"'@]*@", "***@", text)
