"""A proxy in front of an S3 server that disturbs requests on purpose, and counts them.

It hands on heads and bodies byte by byte, the Host header too: a client signs the proxy's address,
and the server checks the signature against the address the client says. Of S3 it knows only the
names of the operations and the form of an error.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Literal, Self, get_args
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

Kind = Literal["drop", "reset", "delay", "truncate", "500", "503", "lost answer"]
"""What happens to a request.

drop: the whole request is read, then the connection is closed; the server never hears of it.
reset: the connection is reset (RST) after the request's head.
delay: the request is handed on `delay_s` later.
truncate: half of the answer's body (of an answer without one, half of its first line), then closed.
500, 503: answered InternalError or SlowDown in place of the server, which never hears of it.
lost answer: the server does what is asked, and its answer is thrown away.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)
ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
}
PIECE = 256 * 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

OnRequest = Callable[[str, str, dict[str, str]], Kind | None]
OnAnswer = Callable[[str, str, dict[str, str], int], None]


@dataclass(kw_only=True)
class Exchange:
    """One request as the proxy saw it; `number` counts from 1. Sizes are of bodies.

    `status` is what the client was told or, of a lost answer, would have been; 0 for nothing.
    """

    number: int
    method: str
    path: str
    query: dict[str, str]
    operation: str
    disturbed: Kind | None = None
    status: int = 0
    up_bytes: int = 0
    down_bytes: int = 0


class DisturbingProxy:
    """An HTTP/1.1 proxy on 127.0.0.1 to the server at `target`, in threads of this process.

    Args:
        target: The server's address, `http://host:port`.
        rate: The share of requests that are disturbed, each in one of `kinds`, by chance.
        kinds: What `rate` chooses from.
        seed: Makes that choice the same again, as far as the requests come in the same order.
        delay_s: How long "delay" is.

    Attributes:
        on_request: Called in the proxy's thread when a request's head is there, with its method,
            path and query (unquoted), before anything is handed on. What it returns is done to the
            request; None leaves it to `rate`. It may also do things, such as killing a process.
        on_answer: Called with the status, too, when the server has done the request and the client
            does not know yet.
        exchanges: Every request so far, in the order of arrival.
        failures: What went wrong in the hooks or the proxy; the end of the `with` block raises the
            first. A request whose hook failed is dropped.
        connections: How many connections there were so far.
    """

    def __init__(
        self,
        target: str,
        *,
        rate: float = 0.0,
        kinds: Sequence[Kind] = KINDS,
        seed: int = 0,
        delay_s: float = 0.2,
    ) -> None:
        parts = urlsplit(target)
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            raise ValueError(f"{target} is not http://host:port")
        self.target = (parts.hostname, parts.port)
        self.delay_s = delay_s
        self.on_request: OnRequest | None = None
        self.on_answer: OnAnswer | None = None
        self.exchanges: list[Exchange] = []
        self.failures: list[BaseException] = []
        self.connections = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self.disturb(rate, kinds=kinds, seed=seed)
        # Bound, never listening: nobody else gets the port while the proxy is down.
        self._claim = socket.socket()
        self._claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._claim.bind(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._claim.getsockname()[1]}"

    def disturb(self, rate: float, *, kinds: Sequence[Kind] = KINDS, seed: int = 0) -> None:
        """Disturb this share of the requests from now on."""
        with self._lock:
            self.rate, self.kinds, self._random = rate, tuple(kinds), random.Random(seed)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is None and self.failures:
            raise self.failures[0]

    def up(self) -> None:
        """Take connections, at the same address as before."""
        with self._lock:
            if self._listener is not None:
                return
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self._claim.getsockname())
            listener.listen(128)
            self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections and end those that are open, in the middle of what they do."""
        with self._lock:
            listener, self._listener = self._listener, None
            connections = list(self._open)
        if listener is not None:
            _shut(listener)  # wakes the thread that waits in accept()
            listener.close()
        for connection in connections:
            _shut(connection)  # its thread closes it

    def close(self) -> None:
        """End for good."""
        self._closing.set()
        self.down()
        self._claim.close()

    def forget(self) -> None:
        """Start counting again; connections that are open count."""
        with self._lock:
            self.exchanges = []
            self.connections = len(self._open)

    @property
    def requests(self) -> Counter[str]:
        """Requests by method."""
        return Counter(e.method for e in self._seen())

    @property
    def operations(self) -> Counter[str]:
        """Requests by the operation's name in S3, such as UploadPartCopy."""
        return Counter(e.operation for e in self._seen())

    @property
    def disturbed(self) -> Counter[tuple[str, Kind]]:
        """Disturbed requests by method and kind."""
        return Counter((e.method, e.disturbed) for e in self._seen() if e.disturbed)

    @property
    def up_bytes(self) -> int:
        """Bytes of bodies that clients sent, those of disturbed requests too."""
        return sum(e.up_bytes for e in self._seen())

    @property
    def down_bytes(self) -> int:
        """Bytes of bodies that clients were sent."""
        return sum(e.down_bytes for e in self._seen())

    def _seen(self) -> list[Exchange]:
        with self._lock:
            return list(self.exchanges)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:  # closed by down()
                return
            with self._lock:
                if self._listener is not listener:
                    accepted.close()
                    return
                self._open.add(accepted)
                self.connections += 1
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        connection = _Connection(self, _Stream(accepted))
        try:
            while connection.one_request():
                pass
        except OSError:  # one of the two sides has gone, and so does the other
            pass
        except BaseException as error:
            self.failures.append(error)
        finally:
            connection.close()
            with self._lock:
                self._open.discard(accepted)

    def _begin(self, head: _Head) -> Exchange:
        method, target, _ = head.first.split(" ", 2)
        url = urlsplit(target)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        path = unquote(url.path)
        with self._lock:
            exchange = Exchange(
                number=len(self.exchanges) + 1,
                method=method,
                path=path,
                query=query,
                operation=operation_name(method, path, query, head.headers),
            )
            self.exchanges.append(exchange)
        kind = None
        if self.on_request:
            with self._hook():
                kind = self.on_request(method, path, query)
        with self._lock:
            if kind is None and self._random.random() < self.rate:
                kind = self._random.choice(self.kinds)
        exchange.disturbed = kind
        return exchange

    def _done(self, exchange: Exchange, status: int) -> None:
        exchange.status = status
        if self.on_answer:
            with self._hook():
                self.on_answer(exchange.method, exchange.path, exchange.query, status)

    @contextmanager
    def _hook(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.failures.append(error)
            raise ConnectionAbortedError("a hook failed") from error

    def _connect(self) -> _Stream:
        connection = socket.create_connection(self.target, timeout=10)
        connection.settimeout(None)
        return _Stream(connection)

    def _pause(self) -> None:
        self._closing.wait(self.delay_s)


class _Connection:
    """A client's connection and, from the first request that is handed on, one to the server."""

    def __init__(self, proxy: DisturbingProxy, client: _Stream) -> None:
        self.proxy = proxy
        self.client = client
        self.server: _Stream | None = None

    def close(self) -> None:
        self.client.close()
        if self.server is not None:
            self.server.close()

    def one_request(self) -> bool:
        """Handle the next request; whether there may be another one on this connection."""
        # A server that goes away between two requests must look so to the client.
        if self.server and self.server in _readable(self.client, self.server, timeout_s=None):
            return False
        head = self.client.head()
        if head is None:
            return False
        exchange = self.proxy._begin(head)
        kind = exchange.disturbed
        if kind == "reset":
            self.client.reset()
            return False
        if kind == "drop":
            self._swallow(head, exchange)
            return False
        if kind == "500" or kind == "503":
            return self._answer_with_error(head, exchange, *ERRORS[kind])
        if kind == "delay":
            self.proxy._pause()
        return self._hand_on(head, exchange)

    def _swallow(self, head: _Head, exchange: Exchange) -> None:
        if head.expects_continue:
            self.client.send(CONTINUE)
        for _, size in self.client.body(head.request_length):
            exchange.up_bytes += size

    def _answer_with_error(
        self, head: _Head, exchange: Exchange, status: int, code: str, message: str
    ) -> bool:
        # Who asks whether to send the body is told no, and may send it all the same.
        ask = head.expects_continue
        if not ask:
            self._swallow(head, exchange)
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{message}</Message>"
            f"<Resource>{escape(exchange.path)}</Resource>"
            f"<RequestId>{exchange.number:016X}</RequestId></Error>"
        ).encode()
        answer = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\n" + ("Connection: close\r\n" if ask else "") + "\r\n"
        ).encode()
        exchange.status = status
        if exchange.method != "HEAD":
            answer += body
            exchange.down_bytes = len(body)
        self.client.send(answer)
        if ask:
            self.client.finish()
        return not ask and not head.closes

    def _hand_on(self, head: _Head, exchange: Exchange) -> bool:
        if self.server is None:
            self.server = self.proxy._connect()
        server = self.server
        server.send(head.raw)
        answer = self._send_body(head, exchange, server)
        whole = answer is None  # an answer before the end of the request ends the connection
        while answer is None or answer.is_interim:
            answer = server.head()
            if answer is None:
                return False
            if answer.is_interim:
                self.client.send(answer.raw)
        length = answer.answer_length(exchange.method)
        kind = exchange.disturbed
        if kind == "lost answer":
            for _ in server.body(length):
                pass
            self.proxy._done(exchange, answer.status)
            return False
        if kind == "truncate":
            pieces = list(server.body(length))
            self.proxy._done(exchange, answer.status)
            self._send_half(answer, b"".join(raw for raw, _ in pieces), exchange)
            return False
        self.proxy._done(exchange, answer.status)
        self.client.send(answer.raw)
        for raw, size in server.body(length):
            exchange.down_bytes += size
            self.client.send(raw)
        if not whole:
            self.client.finish()
        return whole and length is not None and not (head.closes or answer.closes)

    def _send_body(self, head: _Head, exchange: Exchange, server: _Stream) -> _Head | None:
        """Send the request's body; the server's final answer if that came before the end."""

        def watch() -> None:
            # Either the client sends something, or the server says go on, or no.
            while server in _readable(self.client, server, timeout_s=None):
                answer = server.head()
                if answer is None:
                    raise ConnectionResetError("the server closed the connection")
                if not answer.is_interim:
                    raise _Answered(answer)
                self.client.send(answer.raw)

        self.client.before_receive = watch
        try:
            for raw, size in self.client.body(head.request_length):
                exchange.up_bytes += size
                server.send(raw)
        except _Answered as early:
            return early.head
        finally:
            self.client.before_receive = None
        return None

    def _send_half(self, answer: _Head, body: bytes, exchange: Exchange) -> None:
        if body:
            half = body[: len(body) // 2]
            exchange.down_bytes += len(half)
            self.client.send(answer.raw + half)
        else:
            # Not half of the head: Python's http.client takes that for a whole one.
            self.client.send(answer.raw[: len(answer.first) // 2])


Length = int | Literal["chunked"] | None
"""Of a body: its size, or how its end is known (None: the connection is closed)."""


class _Head:
    """The first line and the headers of a request or an answer."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        lines = raw.decode("latin-1").split("\r\n")
        self.first = lines[0]
        pairs = (line.split(":", 1) for line in lines[1:] if line)
        self.headers = {name.strip().lower(): value.strip() for name, value in pairs}

    @property
    def expects_continue(self) -> bool:
        return self.headers.get("expect", "").lower() == "100-continue"

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close" or "HTTP/1.0" in self.first

    @property
    def status(self) -> int:
        return int(self.first.split(" ", 2)[1])

    @property
    def is_interim(self) -> bool:
        return self.status < 200

    @property
    def request_length(self) -> Length:
        return 0 if self._length() is None else self._length()

    def answer_length(self, method: str) -> Length:
        none = method == "HEAD" or self.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
        return 0 if none else self._length()

    def _length(self) -> Length:
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            return "chunked"
        size = self.headers.get("content-length")
        return None if size is None else int(size)


class _Answered(Exception):
    """The server has answered a request that is not yet at its end."""

    def __init__(self, head: _Head) -> None:
        super().__init__(head.first)
        self.head = head


class _Stream:
    """A socket with what was read of it too far, and something to do before more is received."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.buffer = b""
        self.before_receive: Callable[[], None] | None = None

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Close with RST in place of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def finish(self) -> None:
        """Say that nothing more comes, and wait for the other side to close.

        To close at once, while it still sends, would reset the connection, and it might never see
        what it was sent.
        """
        self.socket.shutdown(socket.SHUT_WR)
        self.socket.settimeout(2)
        while self.socket.recv(PIECE):
            pass

    def head(self) -> _Head | None:
        """The next head; None at the end of the stream."""
        raw = self._until(b"\r\n\r\n")
        return _Head(raw) if raw else None

    def body(self, length: Length) -> Iterator[tuple[bytes, int]]:
        """A body in pieces as they come: the bytes, and how many of them are not framing."""
        if isinstance(length, int):
            yield from self._exactly(length)
        elif length is None:
            while piece := self._some(PIECE):
                yield piece, len(piece)
        else:
            while True:
                line = self._until(b"\r\n")
                yield line, 0
                size = int(line.split(b";")[0], 16)
                if size == 0:
                    break
                yield from self._exactly(size)
                yield self._until(b"\r\n"), 0
            while (line := self._until(b"\r\n")) != b"\r\n":  # trailers
                yield line, 0
            yield line, 0

    def _exactly(self, size: int) -> Iterator[tuple[bytes, int]]:
        left = size
        while left:
            piece = self._some(min(left, PIECE))
            if not piece:
                raise ConnectionResetError("the connection was closed in the middle of a body")
            left -= len(piece)
            yield piece, len(piece)

    def _some(self, limit: int) -> bytes:
        data = self.buffer or self._receive(limit)
        self.buffer = data[limit:]
        return data[:limit]

    def _receive(self, limit: int) -> bytes:
        if self.before_receive:
            self.before_receive()
        return self.socket.recv(limit)

    def _until(self, end: bytes) -> bytes:
        """Up to and with `end`; nothing if the stream ends before the first byte."""
        while end not in self.buffer:
            more = self._receive(64 * 1024)
            if not more:
                if self.buffer or end == b"\r\n":
                    raise ConnectionResetError("the connection was closed in the middle")
                return b""
            self.buffer += more
        found, self.buffer = self.buffer.split(end, 1)
        return found + end


def _readable(*streams: _Stream, timeout_s: float | None) -> list[_Stream]:
    """Those with something to read, or whose other side has closed; waits for one of them."""
    if buffered := [stream for stream in streams if stream.buffer]:
        return buffered
    poll = select.poll()
    for stream in streams:
        poll.register(stream.socket, select.POLLIN)
    ready = {number for number, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
    return [stream for stream in streams if stream.socket.fileno() in ready]


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        connection.shutdown(socket.SHUT_RDWR)


def operation_name(method: str, path: str, query: dict[str, str], headers: dict[str, str]) -> str:
    """What S3 calls a request with these, as far as this project makes such requests."""
    copies = "x-amz-copy-source" in headers
    has_key = bool(path.strip("/").partition("/")[2])
    if "uploadId" in query:
        part = "UploadPartCopy" if copies else "UploadPart"
        names = {
            "PUT": part,
            "POST": "CompleteMultipartUpload",
            "DELETE": "AbortMultipartUpload",
            "GET": "ListParts",
        }
    elif "uploads" in query:
        names = {"POST": "CreateMultipartUpload", "GET": "ListMultipartUploads"}
    elif has_key:
        names = {
            "PUT": "CopyObject" if copies else "PutObject",
            "GET": "GetObject",
            "HEAD": "HeadObject",
            "DELETE": "DeleteObject",
        }
    elif "delete" in query:
        names = {"POST": "DeleteObjects"}
    elif path.strip("/"):
        names = {
            "GET": "ListObjectsV2" if query.get("list-type") == "2" else "ListObjects",
            "HEAD": "HeadBucket",
            "PUT": "CreateBucket",
            "DELETE": "DeleteBucket",
        }
    else:
        names = {"GET": "ListBuckets"}
    return names.get(method, method)
