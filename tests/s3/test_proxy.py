"""The server and the proxy of the S3 tests themselves, with boto3 and with plain sockets."""

from __future__ import annotations

import base64
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from tests.cluster.processes import comes_true
from tests.s3.proxy import KINDS, DisturbingProxy, Kind
from tests.s3.server import REGION, Identity, SeaweedServer, remove_sockets

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MIB = 1024 * 1024


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> str:
    return s3_server.bucket


@pytest.fixture
def prefix(s3: str) -> str:
    return s3.removeprefix("s3://").partition("/")[2]


@pytest.fixture
def direct(s3_server: SeaweedServer) -> S3Client:
    """A client that does not go through the proxy."""
    return s3_server.client()


@pytest.fixture
def client(s3_server: SeaweedServer, s3_proxy: DisturbingProxy) -> S3Client:
    """A client that goes through the proxy and tries once."""
    return s3_server.client(endpoint=s3_proxy.endpoint)


def exists(client: S3Client, bucket: str, key: str) -> bool:
    return bool(client.list_objects_v2(Bucket=bucket, Prefix=key)["KeyCount"])


# The server


def test_environment_is_enough(s3: str) -> None:
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"data")
    assert client.get_object(Bucket=bucket, Key=f"{prefix}/a")["Body"].read() == b"data"


def test_reader_cannot_write(s3_server: SeaweedServer, bucket: str, prefix: str) -> None:
    s3_server.client().put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"data")
    reader = s3_server.client(identity=s3_server.reader)
    assert reader.get_object(Bucket=bucket, Key=f"{prefix}/a")["Body"].read() == b"data"
    assert reader.list_objects_v2(Bucket=bucket, Prefix=prefix)["KeyCount"] == 1
    with pytest.raises(ClientError, match="AccessDenied"):
        reader.put_object(Bucket=bucket, Key=f"{prefix}/b", Body=b"data")
    with pytest.raises(ClientError, match="AccessDenied"):
        reader.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/b")
    with pytest.raises(ClientError, match="AccessDenied"):
        reader.delete_object(Bucket=bucket, Key=f"{prefix}/a")


def test_wrong_keys_and_wrong_bucket(s3_server: SeaweedServer, bucket: str) -> None:
    wrong = Identity(access_key=s3_server.access_key, secret_key="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        s3_server.client(identity=wrong).list_objects_v2(Bucket=bucket)
    unknown = Identity(access_key="unknown", secret_key="wrong")
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        s3_server.client(identity=unknown).list_objects_v2(Bucket=bucket)
    with pytest.raises(ClientError, match="NoSuchBucket"):
        s3_server.client().put_object(Bucket="no-such-bucket", Key="a", Body=b"data")


def test_stop_and_start_keep_data_and_address(
    s3_server: SeaweedServer, direct: S3Client, bucket: str, prefix: str
) -> None:
    direct.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"data")
    endpoint = s3_server.endpoint
    s3_server.stop(kill=True)
    assert s3_server.process_id is None
    with pytest.raises(EndpointConnectionError):
        direct.get_object(Bucket=bucket, Key=f"{prefix}/a")
    s3_server.start()
    assert s3_server.endpoint == endpoint
    assert direct.get_object(Bucket=bucket, Key=f"{prefix}/a")["Body"].read() == b"data"


def test_server_started_by_a_short_thread_lives_on(tmp_path: Path) -> None:
    server = SeaweedServer(tmp_path)
    thread = threading.Thread(target=server.__enter__)
    thread.start()
    thread.join()
    try:
        time.sleep(0.1)
        server.client().head_bucket(Bucket=server.bucket)
    finally:
        server.close()
    assert server.process_id is None
    assert not list(Path("/tmp").glob(f"seaweedfs-*-{server.port}.sock"))


@pytest.mark.slow
def test_server_dies_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from tests.s3.server import SeaweedServer\n"
        "with SeaweedServer(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.process_id, server.port, flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert owner.stdout is not None
        process_id, port = owner.stdout.readline().decode().split()
        server = Path("/proc", process_id)
        assert server.exists()
    finally:
        owner.kill()
        owner.communicate()
    assert comes_true(lambda: not server.exists(), within_s=5)
    remove_sockets(int(port))  # which only the owner could do, after the server


def test_start_says_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.s3.server.HOST", "192.0.2.1")  # no address of this machine
    monkeypatch.setattr("tests.s3.server._free_block", lambda: (20_000, socket.socket()))
    server = SeaweedServer(tmp_path)
    with pytest.raises(RuntimeError, match="did not start"), server:
        pass
    assert server.process_id is None


# The proxy, when it disturbs nothing


def test_multipart_goes_through_unchanged(
    client: S3Client, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    data = random.Random(0).randbytes(10 * MIB)
    parts = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB)
    client.upload_fileobj(io.BytesIO(data), bucket, f"{prefix}/a", Config=parts)
    assert s3_proxy.operations == {
        "CreateMultipartUpload": 1,
        "UploadPart": 2,
        "CompleteMultipartUpload": 1,
    }
    assert s3_proxy.requests == {"POST": 2, "PUT": 2}
    assert len(data) < s3_proxy.up_bytes < len(data) + 2000
    assert s3_proxy.down_bytes < 2000
    s3_proxy.forget()
    found = io.BytesIO()
    client.download_fileobj(bucket, f"{prefix}/a", found, Config=parts)
    assert found.getvalue() == data
    assert s3_proxy.operations == {"HeadObject": 1, "GetObject": 2}
    assert (s3_proxy.up_bytes, s3_proxy.down_bytes) == (0, len(data))
    assert not s3_proxy.disturbed
    assert {exchange.path for exchange in s3_proxy.exchanges} == {f"/{bucket}/{prefix}/a"}


def test_copies_are_told_from_uploads(
    client: S3Client, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    source, key = f"{prefix}/source", f"{prefix}/key"
    client.put_object(Bucket=bucket, Key=source, Body=bytes(100))
    client.copy_object(Bucket=bucket, Key=key, CopySource=f"{bucket}/{source}")
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    client.upload_part_copy(
        Bucket=bucket,
        Key=key,
        UploadId=upload,
        PartNumber=1,
        CopySource=f"{bucket}/{source}",
        CopySourceRange="bytes=0-9",
    )
    client.list_parts(Bucket=bucket, Key=key, UploadId=upload)
    client.list_multipart_uploads(Bucket=bucket)
    client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
    client.delete_object(Bucket=bucket, Key=key)
    client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": source}]})
    client.list_objects_v2(Bucket=bucket, Prefix=prefix)
    assert [exchange.operation for exchange in s3_proxy.exchanges] == [
        "PutObject",
        "CopyObject",
        "CreateMultipartUpload",
        "UploadPartCopy",
        "ListParts",
        "ListMultipartUploads",
        "AbortMultipartUpload",
        "DeleteObject",
        "DeleteObjects",
        "ListObjectsV2",
    ]


def test_connection_is_kept_and_bodies_do_not_wait(
    client: S3Client, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    begin = time.monotonic()
    for number in range(5):
        # boto3 asks with "Expect: 100-continue", and sends the body unasked after one second.
        client.put_object(Bucket=bucket, Key=f"{prefix}/{number}", Body=bytes(2 * MIB))
        client.head_object(Bucket=bucket, Key=f"{prefix}/{number}")
        client.delete_object(Bucket=bucket, Key=f"{prefix}/{number}")
    assert time.monotonic() - begin < 5
    assert s3_proxy.connections == 1
    assert [e.status for e in s3_proxy.exchanges] == [200, 200, 204] * 5


def test_refusal_of_the_server_comes_through(
    s3_server: SeaweedServer, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    reader = s3_server.client(identity=s3_server.reader, endpoint=s3_proxy.endpoint)
    for _ in range(2):
        with pytest.raises(ClientError, match="AccessDenied"):
            reader.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=bytes(4 * MIB))
    assert [exchange.status for exchange in s3_proxy.exchanges] == [403, 403]


@pytest.mark.parametrize("asks", [True, False])
def test_refusal_before_the_body_ends_the_request(asks: bool) -> None:
    """SeaweedFS reads a body before it refuses it; others do not."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
            while connection.recv(100_000):
                pass

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    with DisturbingProxy(f"http://127.0.0.1:{listener.getsockname()[1]}") as proxy:
        host, port = proxy.endpoint.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = b"PUT /a HTTP/1.1\r\nContent-Length: 1000000\r\n"
            connection.sendall(head + (b"Expect: 100-continue\r\n\r\n" if asks else b"\r\n"))
            if not asks:
                connection.sendall(bytes(900_000))  # and no more
            answer = b""
            while piece := connection.recv(1000):
                answer += piece
    assert answer.endswith(b"\r\n\r\nno")
    assert proxy.exchanges[0].status == 403
    assert proxy.up_bytes <= (0 if asks else 900_000)
    thread.join(5)
    listener.close()


def signed_chunks(
    server: SeaweedServer, path: str, data: bytes, checksum: int
) -> tuple[bytes, bytes]:
    """Head and body of a PutObject in aws-chunked encoding, with a checksum after the data."""
    request = AWSRequest(
        "PUT",
        f"{server.endpoint}{path}",
        headers={
            "Content-Encoding": "aws-chunked",
            "Transfer-Encoding": "chunked",
            "X-Amz-Trailer": "x-amz-checksum-crc32",
            "X-Amz-Decoded-Content-Length": str(len(data)),
        },
    )
    request.context["checksum"] = {"request_algorithm": {"in": "trailer"}}
    S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", REGION).add_auth(request)
    host = server.endpoint.removeprefix("http://")
    lines = [f"PUT {path} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    pieces = [data[:1000], data[1000:]]
    inner = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    sum_text = base64.b64encode(checksum.to_bytes(4, "big"))
    inner += b"0\r\nx-amz-checksum-crc32:%s\r\n\r\n" % sum_text
    outer = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (7, inner[:7], len(inner) - 7, inner[7:])
    return ("\r\n".join(lines) + "\r\n\r\n").encode(), outer


@pytest.mark.parametrize("right", [True, False])
def test_chunks_and_trailing_checksums_go_through(
    s3_server: SeaweedServer,
    s3_proxy: DisturbingProxy,
    direct: S3Client,
    bucket: str,
    prefix: str,
    right: bool,
) -> None:
    data = random.Random(0).randbytes(3000)
    checksum = zlib.crc32(data) ^ (0 if right else 1)
    head, body = signed_chunks(s3_server, f"/{bucket}/{prefix}/a", data, checksum)
    host, port = s3_proxy.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head)
        for byte in range(0, len(body), 7):  # in pieces that do not fit the chunks
            connection.sendall(body[byte : byte + 7])
        answer = connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 200" if right else b"HTTP/1.1 400"), answer
    if right:
        assert direct.get_object(Bucket=bucket, Key=f"{prefix}/a")["Body"].read() == data
    assert exists(direct, bucket, f"{prefix}/a") is right


@pytest.fixture
def echo() -> Iterator[tuple[str, list[bytes]]]:
    """A server for one connection that keeps what it hears and answers in chunks with a trailer."""
    heard = [b""]
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            while not heard[0].endswith(b"0\r\nTrailer: t\r\n\r\n"):
                heard[0] += connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab")
            connection.sendall(b"c\r\n0\r\nAfter: wards\r\n\r\n")
            connection.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
    listener.close()
    thread.join(5)


def test_every_byte_is_handed_on(echo: tuple[str, list[bytes]]) -> None:
    target, heard = echo
    request = (
        b"PUT /a%20b?x=%2F&y HTTP/1.1\r\nhOst: signed.example:1\r\nX-A:  two  spaces \r\n"
        b"Transfer-Encoding: chunked\r\n\r\n5;ext=1\r\nhello\r\n0\r\nTrailer: t\r\n\r\n"
    )
    with DisturbingProxy(target) as proxy:
        host, port = proxy.endpoint.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"0\r\nAfter: wards\r\n\r\n"):
                answer += connection.recv(1000)
    assert heard == [request]
    assert answer.endswith(b"\r\n\r\n3\r\nabc\r\n0\r\nAfter: wards\r\n\r\n")
    [exchange] = proxy.exchanges
    assert (exchange.path, exchange.query) == ("/a b", {"x": "/", "y": ""})
    assert (exchange.up_bytes, exchange.down_bytes) == (5, 3)


# Disturbances

CLOSED = (ConnectionClosedError, EndpointConnectionError, HTTPClientError)


@pytest.mark.parametrize(
    ("kind", "error", "text", "done"),
    [
        ("drop", ConnectionClosedError, None, False),
        ("reset", CLOSED, None, False),
        ("truncate", CLOSED, None, True),
        ("500", ClientError, "InternalError", False),
        ("503", ClientError, "SlowDown", False),
        ("lost answer", ConnectionClosedError, None, True),
    ],
)
@pytest.mark.parametrize("size", [10, 3 * MIB])
def test_disturbed_write(
    client: S3Client,
    direct: S3Client,
    s3_proxy: DisturbingProxy,
    bucket: str,
    prefix: str,
    kind: Kind,
    error: type[Exception] | tuple[type[Exception], ...],
    text: str | None,
    done: bool,
    size: int,
) -> None:
    s3_proxy.disturb(1.0, kinds=[kind])
    with pytest.raises(error, match=text):
        client.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=bytes(size))
    assert s3_proxy.disturbed == {("PUT", kind): 1}
    # Who is refused before the body (boto3 asks first) does not send it.
    assert s3_proxy.up_bytes == (0 if kind in ("reset", "500", "503") else size)
    assert exists(direct, bucket, f"{prefix}/a") is done
    s3_proxy.disturb(0)
    client.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"again")
    assert client.get_object(Bucket=bucket, Key=f"{prefix}/a")["Body"].read() == b"again"


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("drop", ConnectionClosedError, None),
        ("reset", CLOSED, None),
        ("truncate", ResponseStreamingError, None),
        ("500", ClientError, "InternalError"),
        ("503", ClientError, "SlowDown"),
        ("lost answer", ConnectionClosedError, None),
    ],
)
def test_disturbed_read(
    client: S3Client,
    direct: S3Client,
    s3_proxy: DisturbingProxy,
    bucket: str,
    prefix: str,
    kind: Kind,
    error: type[Exception] | tuple[type[Exception], ...],
    text: str | None,
) -> None:
    data = random.Random(0).randbytes(MIB)
    direct.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=data)
    s3_proxy.disturb(1.0, kinds=[kind])
    with pytest.raises(error, match=text):
        client.get_object(Bucket=bucket, Key=f"{prefix}/a")["Body"].read()
    if kind == "truncate":
        assert s3_proxy.down_bytes == MIB // 2
    with pytest.raises((ClientError, *CLOSED)):
        client.head_object(Bucket=bucket, Key=f"{prefix}/a")
    assert s3_proxy.disturbed == {("GET", kind): 1, ("HEAD", kind): 1}
    s3_proxy.disturb(0)
    assert client.get_object(Bucket=bucket, Key=f"{prefix}/a")["Body"].read() == data


def test_delay(
    s3_server: SeaweedServer, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    patient = s3_server.client(endpoint=s3_proxy.endpoint)
    hasty = s3_server.client(endpoint=s3_proxy.endpoint, read_timeout=0.1)
    s3_proxy.disturb(1.0, kinds=["delay"])
    s3_proxy.delay_s = 0.3
    begin = time.monotonic()
    patient.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"data")
    assert time.monotonic() - begin >= 0.3
    with pytest.raises(ReadTimeoutError):
        hasty.head_object(Bucket=bucket, Key=f"{prefix}/a")


def test_lost_answer_of_conditional_writes(
    client: S3Client, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    once = True

    def lose_first(method: str, path: str, query: dict[str, str]) -> Kind | None:
        nonlocal once
        lose, once = once and (method == "PUT" or "uploadId" in query), False
        return "lost answer" if lose else None

    s3_proxy.on_request = lose_first
    with pytest.raises(ConnectionClosedError):
        client.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"mine", IfNoneMatch="*")
    # The retry is told that somebody wrote it. It was itself.
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"mine", IfNoneMatch="*")
    assert client.get_object(Bucket=bucket, Key=f"{prefix}/a")["Body"].read() == b"mine"

    upload = {"Bucket": bucket, "Key": f"{prefix}/b"}
    upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]  # type: ignore[arg-type]
    part = client.upload_part(**upload, PartNumber=1, Body=b"mine")  # type: ignore[arg-type]
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    once = True
    with pytest.raises(ConnectionClosedError):
        client.complete_multipart_upload(**upload, MultipartUpload=parts, IfNoneMatch="*")  # type: ignore[arg-type]
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.complete_multipart_upload(**upload, MultipartUpload=parts, IfNoneMatch="*")  # type: ignore[arg-type]
    assert client.get_object(Bucket=bucket, Key=f"{prefix}/b")["Body"].read() == b"mine"


def test_same_seed_same_disturbances(
    s3_server: SeaweedServer, s3: str, bucket: str, prefix: str
) -> None:
    seen: list[list[Kind | None]] = []
    for seed in (1, 1, 2):
        with DisturbingProxy(s3_server.endpoint, rate=0.5, seed=seed, delay_s=0.01) as proxy:
            client = s3_server.client(endpoint=proxy.endpoint)
            for number in range(40):
                try:
                    client.head_bucket(Bucket=bucket)
                except (ClientError, BotoCoreError):
                    assert proxy.exchanges[number].disturbed
            assert len(proxy.exchanges) == 40
            seen.append([exchange.disturbed for exchange in proxy.exchanges])
    assert seen[0] == seen[1] != seen[2]
    assert set(seen[0] + seen[2]) == {*KINDS, None}


def test_retries_of_boto3_get_through(
    s3_server: SeaweedServer, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    client = s3_server.client(
        endpoint=s3_proxy.endpoint, retries={"mode": "standard", "total_max_attempts": 10}
    )
    s3_proxy.delay_s = 0.01
    for kind in ("drop", "reset", "500", "lost answer"):
        s3_proxy.forget()
        answers = iter([kind])
        s3_proxy.on_request = lambda *_, answers=answers: next(answers, None)
        client.put_object(Bucket=bucket, Key=f"{prefix}/{kind}", Body=kind.encode())
        assert s3_proxy.requests == {"PUT": 2}


# Points in time


def test_hooks_choose_requests_and_moments(
    client: S3Client, direct: S3Client, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    seen: list[tuple[str, str, bool]] = []

    def note(when: str, method: str, path: str) -> None:
        seen.append((when, method, exists(direct, bucket, path.removeprefix(f"/{bucket}/"))))

    def on_request(method: str, path: str, query: dict[str, str]) -> Kind | None:
        note("request", method, path)
        return "503" if path.endswith("/b") else None

    s3_proxy.on_request = on_request
    s3_proxy.on_answer = lambda method, path, query, status: note(str(status), method, path)
    client.put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"data")
    with pytest.raises(ClientError, match="SlowDown"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/b", Body=b"data")
    assert seen == [("request", "PUT", False), ("200", "PUT", True), ("request", "PUT", False)]


def test_process_killed_at_a_request(
    direct: S3Client, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    code = (
        "import boto3, sys\n"
        "client = boto3.client('s3')\n"
        "for number in range(9):\n"
        "    client.put_object(Bucket=sys.argv[1], Key=f'{sys.argv[2]}/{number}', Body=b'data')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, bucket, prefix], env=os.environ)
    puts = 0

    def kill_at_third(method: str, path: str, query: dict[str, str]) -> Kind | None:
        nonlocal puts
        puts += 1
        if puts < 3:
            return None
        process.kill()
        return "drop"

    s3_proxy.on_request = kill_at_third
    assert process.wait(30) == -signal.SIGKILL
    assert direct.list_objects_v2(Bucket=bucket, Prefix=prefix)["KeyCount"] == 2


@pytest.mark.parametrize("name", ["on_request", "on_answer"])
def test_a_failing_hook_is_heard_of(s3_server: SeaweedServer, bucket: str, name: str) -> None:
    def fail(*_: object) -> None:
        raise OSError("the hook's own error")

    with pytest.raises(OSError, match="own error"), DisturbingProxy(s3_server.endpoint) as proxy:
        setattr(proxy, name, fail)
        with pytest.raises(ConnectionClosedError):
            s3_server.client(endpoint=proxy.endpoint).head_bucket(Bucket=bucket)


def test_down_and_up(client: S3Client, s3_proxy: DisturbingProxy, bucket: str) -> None:
    client.head_bucket(Bucket=bucket)
    s3_proxy.down()
    for _ in range(3):
        with pytest.raises(EndpointConnectionError):
            client.head_bucket(Bucket=bucket)
    assert len(s3_proxy.exchanges) == 1
    s3_proxy.up()
    client.head_bucket(Bucket=bucket)
    assert len(s3_proxy.exchanges) == 2


def test_down_ends_what_goes_on(client: S3Client, s3_proxy: DisturbingProxy, bucket: str) -> None:
    s3_proxy.disturb(1.0, kinds=["delay"])
    s3_proxy.delay_s = 30
    threading.Timer(0.2, s3_proxy.down).start()
    begin = time.monotonic()
    with pytest.raises((*CLOSED, ReadTimeoutError)):
        client.head_bucket(Bucket=bucket)
    assert time.monotonic() - begin < 25


def test_server_gone_and_back_behind_the_proxy(
    s3_server: SeaweedServer, client: S3Client, s3_proxy: DisturbingProxy, bucket: str
) -> None:
    client.head_bucket(Bucket=bucket)
    s3_server.stop(kill=True)
    s3_server.start()
    client.head_bucket(Bucket=bucket)  # the connection that was kept is not used again
    s3_server.stop(kill=True)
    with pytest.raises(CLOSED):
        client.head_bucket(Bucket=bucket)
    s3_server.start()
    client.head_bucket(Bucket=bucket)
    assert not s3_proxy.failures


def test_many_at_once(
    s3_server: SeaweedServer, s3_proxy: DisturbingProxy, bucket: str, prefix: str
) -> None:
    client = s3_server.client(endpoint=s3_proxy.endpoint, max_pool_connections=8)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        data = random.Random(number).randbytes(MIB + number)
        try:
            for _ in range(3):
                client.put_object(Bucket=bucket, Key=f"{prefix}/{number}", Body=data)
                found = client.get_object(Bucket=bucket, Key=f"{prefix}/{number}")["Body"].read()
                assert found == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert s3_proxy.requests == {"PUT": 24, "GET": 24}
    expected = 3 * sum(MIB + number for number in range(8))
    assert s3_proxy.up_bytes == s3_proxy.down_bytes == expected
    assert s3_proxy.connections <= 8
    assert [e.number for e in s3_proxy.exchanges] == list(range(1, 49))


def test_target_must_be_an_address() -> None:
    for wrong in ("https://a:1", "a:1", "http://a"):
        with pytest.raises(ValueError, match="http://host:port"):
            DisturbingProxy(wrong)
