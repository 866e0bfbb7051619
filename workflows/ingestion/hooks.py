"""Notices on the end of a run: shell commands and webhooks.

Knows how to tell somebody, and that a notice which cannot be given never changes how the run
ended. Does not know what a run is: an event is a mapping with `run_id`, `status`, `version` and
whatever else is worth telling.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import SplitResult, urlsplit

from memedit import __version__
from memedit.errors import InputError
from memedit.progress import Progress
from workflows.wording import did_you_mean, without_keys

T = TypeVar("T")

_LIST_OF: dict[str, Literal["success", "failure"]] = {
    "published": "success",
    "gated": "failure",
    "failed": "failure",
}
"""Which hooks are told of a status; of others, such as `unchanged`, none is."""
_TIMEOUT_S = 30.0
_LONGEST_S = 3600.0
_NAMED = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SECRET_HEADERS = ("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key")
_URL = re.compile(r"\b(https?://)(?:[^\s/?#@'\"]*@)?([^\s/?#'\"<>]*)[^\s'\"<>]*", re.IGNORECASE)
_SHOWN_LINES = 3
_SHOWN_CHARACTERS = 500
_READ_BYTES = 10_000


@dataclass(frozen=True, kw_only=True)
class CommandHook:
    """A line for the shell."""

    place: str
    """Where it stands in the settings: `hooks.success[0]`."""
    command: str = field(repr=False)
    timeout_s: float = _TIMEOUT_S

    def tell(self, event: Mapping[str, Any]) -> None:
        """Run the command with the event on its stdin.

        Raises:
            HookError: It could not be started, took too long, or failed.
        """
        # Files instead of pipes: a command that reads nothing, writes a lot, or leaves somebody
        # behind who keeps stderr open, does not keep us waiting.
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
            stdin.write(_json(event))
            stdin.seek(0)
            named = {f"MEMEDIT_{key.upper()}": event.get(key) for key in _IN_ENVIRONMENT}
            texts = {name: "" if value is None else str(value) for name, value in named.items()}
            try:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", self.command],
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,  # ours belongs to the result of the run
                    stderr=stderr,
                    env={**os.environ, **texts},
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                raise HookError(f"cannot be started: {error}") from None
            try:
                code = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                raise HookError(
                    f"was ended because it took longer than {self.timeout_s:g} s" + _end_of(stderr)
                ) from None
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if code:
                how = f"ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
                raise HookError(how + _end_of(stderr))


_IN_ENVIRONMENT = ("run_id", "status", "version")


@dataclass(frozen=True, kw_only=True)
class WebHook:
    """An address that takes events as JSON by POST."""

    place: str
    """Where it stands in the settings: `hooks.failure[1]`."""
    url: str = field(repr=False)
    """As in the settings: each `$NAME` stands for an environment variable."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """As in the settings: each `$NAME` stands for an environment variable."""
    timeout_s: float = _TIMEOUT_S

    def tell(self, event: Mapping[str, Any]) -> None:
        """Post the event.

        Raises:
            HookError: A variable is missing, the server cannot be reached in time, or refuses.
        """
        from urllib.request import Request

        url = _from_environment(self.url)
        try:
            parts = checked_url(url, field=self.place)
        except InputError as error:
            raise HookError(error.message) from None
        headers = {"Content-Type": "application/json", "User-Agent": f"memedit/{__version__}"}
        headers |= {name: _from_environment(value) for name, value in self.headers.items()}
        request = Request(url, data=_json(event), headers=headers, method="POST")
        where = host_of(parts)
        try:
            # The timeout of a socket is that of a single answer of the network.
            within(self.timeout_s, lambda: _post(request, self.timeout_s))
        except TimeoutError:
            raise HookError(f"{where} did not answer within {self.timeout_s:g} s") from None
        except Exception as error:  # urllib, ssl, http.client and codecs have no common base
            raise HookError(f"{where}: {_reason(error)}") from None


Hook: TypeAlias = CommandHook | WebHook


class HookError(Exception):
    """A notice could not be given."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Whom to tell that a run has ended."""

    success: tuple[Hook, ...] = ()
    """A version was published."""
    failure: tuple[Hook, ...] = ()
    """The run failed, or a gate kept it from publishing."""

    def tell(self, event: Mapping[str, Any], progress: Progress) -> None:
        """Give notice of a run's end, one after the other; what goes wrong is told, never raised.

        Args:
            event: What to tell. `status` decides whom: `published`, `gated` or `failed`; of any
                other status, such as `unchanged`, nobody is told.
            progress: Is told of notices that could not be given.
        """
        which = _LIST_OF.get(str(event.get("status")))
        if which is None:
            return
        for hook in getattr(self, which):
            try:
                hook.tell(event)
            except Exception as error:  # a notice is never a reason for a run to fail
                kind = "" if isinstance(error, HookError) else f"{type(error).__name__}: "
                text = f"the notice {hook.place} was not given: {kind}{error}"
                progress.message(without_secrets(text, _secrets(hook)), warning=True)


def parse_hooks(value: object) -> Hooks:
    """The section `hooks` of a settings file; None stands for no hooks.

    Raises:
        InputError: With the field that is wrong, such as `hooks.success[0].url`.
    """
    if value is None:
        return Hooks()
    lists = _mapping(value, "hooks", allowed=("success", "failure"))
    return Hooks(**{name: tuple(_hooks(f"hooks.{name}", lists[name])) for name in lists})


def within(seconds: float, act: Callable[[], T]) -> T:
    """What `act` gives or raises; it is left to itself if it takes too long.

    Raises:
        TimeoutError: It took too long.
    """
    given: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            given.append(act())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True, name="memedit-notice")
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not given:
        raise TimeoutError
    return given[0]


def checked_url(url: str, *, field: str) -> SplitResult:
    """The parts of an `http` or `https` address without keys in it.

    Raises:
        InputError: It is none.
    """
    try:
        parts = urlsplit(url)
        port_is_right = parts.port != 0  # a port that is none raises, too
    except ValueError:
        raise InputError("not an address; write https://host/path", field=field) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
        raise InputError("not an address at http:// or https://", field=field)
    if "@" in parts.netloc:
        raise InputError(
            "an address with keys in it; keys come from environment variables", field=field
        )
    if re.search(r"[^!-~]", url):
        raise InputError("an address with a space or a sign that is not ASCII", field=field)
    return parts


def host_of(parts: SplitResult) -> str:
    """What may be shown of an address: the path and the query of a webhook are secrets."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def without_secrets(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without what must not be read in a log: of an address only scheme and host stay."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _URL.sub(r"\1\2", without_keys(text))


# --- Settings -----------------------------------------------------------------------------------


def _hooks(place: str, value: object) -> Iterator[Hook]:
    items = value if isinstance(value, list | tuple) else () if value is None else (value,)
    for number, item in enumerate(items):
        yield _hook(f"{place}[{number}]", item)


def _hook(place: str, item: object) -> Hook:
    if isinstance(item, str):
        return CommandHook(place=place, command=_command(place, item))
    if not isinstance(item, Mapping):
        raise InputError(
            "must be a line for the shell, or a mapping with a `command` or a `url`", field=place
        )
    given = _mapping(item, place, allowed=("command", "url", "headers", "timeout_s"))
    if ("command" in given) == ("url" in given):
        raise InputError("give one of `command` and `url`", field=place)
    timeout_s = _timeout(f"{place}.timeout_s", given.get("timeout_s", _TIMEOUT_S))
    if "command" in given:
        if "headers" in given:
            raise InputError("headers are for a `url`", field=f"{place}.headers")
        command = _command(f"{place}.command", given["command"])
        return CommandHook(place=place, command=command, timeout_s=timeout_s)
    return WebHook(
        place=place,
        url=_url(f"{place}.url", given["url"]),
        headers=_headers(f"{place}.headers", given.get("headers")),
        timeout_s=timeout_s,
    )


def _mapping(value: object, place: str, *, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        # Not the value itself, which may be an address with a secret.
        raise InputError(
            f"must be a mapping of {', '.join(allowed)}, but it is a {type(value).__name__}",
            field=place,
        )
    for name in value:
        if name not in allowed:
            raise InputError(
                f"no such field{did_you_mean(str(name), allowed)}", field=f"{place}.{name}"
            )
    return dict(value)


def _command(place: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise InputError("must be a line for the shell", field=place)
    return value


def _timeout(place: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= _LONGEST_S:
        raise InputError(
            f"must be seconds above 0, at most {_LONGEST_S:g}, but it is {value!r}", field=place
        )
    return float(value)


def _url(place: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError("must be an address at http:// or https://", field=place)
    if not _NAMED.match(value):
        checked_url(value, field=place)
    return value


def _headers(place: str, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError("must be a mapping of names to values", field=place)
    for name, text in value.items():
        here = f"{place}.{name}"
        if not isinstance(name, str) or not _HEADER.fullmatch(name):
            raise InputError("not the name of a header", field=here)
        if not isinstance(text, str) or re.search(r"[^\t -~]", text):
            raise InputError("must be a text of one line, in ASCII", field=here)
        if name.lower() in _SECRET_HEADERS and not _NAMED.search(text):
            raise InputError(
                "a secret in the settings; write $NAME, and set the environment variable NAME",
                field=here,
            )
    return dict(value)


# --- Telling ------------------------------------------------------------------------------------


def _from_environment(text: str) -> str:
    """`text` with the values of the environment variables it names.

    Raises:
        HookError: One is not set, or has a value that no header can have.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        found = os.environ.get(name, "").strip()
        if not found:
            raise HookError(f"the environment variable {name} is not set")
        if re.search(r"[^\t -~]", found):
            raise HookError(f"the environment variable {name} has more than one line of ASCII")
        return found

    return _NAMED.sub(value, text)


def _secrets(hook: Hook) -> list[str]:
    if isinstance(hook, CommandHook):
        return []
    names = [m[1] or m[2] for t in (hook.url, *hook.headers.values()) for m in _NAMED.finditer(t)]
    return [value for name in names if (value := os.environ.get(name, "").strip())]


def _post(request: Any, timeout_s: float) -> None:
    from urllib import request as urllib

    class NoRedirect(urllib.HTTPRedirectHandler):
        """Elsewhere a POST would arrive without its body, and with our secrets."""

        def redirect_request(self, *_: Any) -> None:
            return None

    opener = urllib.OpenerDirector()  # build_opener's would also open files, FTP and data
    for handler in (
        urllib.ProxyHandler(),
        urllib.HTTPHandler(),
        urllib.HTTPSHandler(),
        urllib.HTTPDefaultErrorHandler(),
        urllib.HTTPErrorProcessor(),
        urllib.UnknownHandler(),
        NoRedirect(),
    ):
        opener.add_handler(handler)
    opener.open(request, timeout=timeout_s).close()


def _reason(error: Exception) -> str:
    from urllib.error import HTTPError, URLError

    if isinstance(error, HTTPError):
        error.close()
        if 300 <= error.code < 400:
            return f"the server sends elsewhere ({error.code}); give the address it sends to"
        return f"the server answered {error.code}"
    if isinstance(error, URLError):
        return f"cannot be reached: {error.reason}"
    return f"{type(error).__name__}: {error}"


def _end_of(stderr: Any) -> str:
    """The last lines that a command has written to stderr, to put after a complaint."""
    begin = max(0, stderr.seek(0, os.SEEK_END) - _READ_BYTES)
    stderr.seek(begin)
    lines = stderr.read().decode(errors="replace").splitlines()
    # A line that was cut may begin with the secret end of an address.
    whole = [line.rstrip() for line in lines[1 if begin else 0 :] if line.strip()]
    shown = [without_secrets(line) for line in whole[-_SHOWN_LINES:]]
    text = "".join(c if c.isprintable() else " " for c in " | ".join(shown))
    return f"; it said: {text[-_SHOWN_CHARACTERS:]}" if text else ""


def _json(event: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(event), ensure_ascii=False, default=str).encode(errors="replace")


def _plain(value: Any) -> Any:
    """`value` as JSON has it and without keys; a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return without_keys(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
