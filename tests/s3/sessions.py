"""A server in front of the tests' own that takes keys of a session, which that one does not know.

It signs each request anew, with the keys of the server behind it, and leaves the token out.
"""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.s3.server import HOST, REGION, Identity, SeaweedServer, aws_environment

_NOT_HANDED_ON = {"host", "authorization", "x-amz-security-token", "x-amz-date", "connection"}


class SessionServer:
    """Takes requests that carry `identity` and `token`, while the `with` block runs."""

    def __init__(self, server: SeaweedServer, identity: Identity, token: str) -> None:
        self.identity, self.token = identity, token
        self.requests = 0
        keys = Credentials(server.access_key, server.secret_key)
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                known = f"Credential={identity.access_key}/" in self.headers["Authorization"]
                if not known or self.headers["X-Amz-Security-Token"] != token:
                    self.send_error(403)
                    return
                front.requests += 1
                kept = {k: v for k, v in self.headers.items() if k.lower() not in _NOT_HANDED_ON}
                request = AWSRequest(self.command, server.endpoint + self.path, kept, body)
                S3SigV4Auth(keys, "s3", REGION).add_auth(request)
                behind = http.client.HTTPConnection(HOST, server.port)
                behind.request(self.command, self.path, body, dict(request.headers.items()))
                answer = behind.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                behind.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((HOST, 0), Handler)

    @property
    def environment(self) -> dict[str, str]:
        endpoint = f"http://{HOST}:{self._server.server_address[1]}"
        return aws_environment(endpoint, self.identity) | {"AWS_SESSION_TOKEN": self.token}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
