"""Publishing to and from an S3 server that is disturbed, goes away, refuses or changes."""

from __future__ import annotations

import logging
import resource
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.publication import LOCK_NAME
from cluster.store import open_files
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError, MemeditError
from memedit.files import LocalFiles
from memedit.manifest import MANIFEST_NAME
from memedit.verify import verify
from tests.cluster.s3_places import Bucket, publish
from tests.faults.s3_publisher import EDITED
from tests.s3.fixtures import use_aws_environment
from tests.s3.proxy import DisturbingProxy, Kind
from tests.s3.server import Identity, SeaweedServer


def check(bucket: Bucket, out: str, base: Checkpoint, expected: dict[str, bytes]) -> None:
    """The version is whole, and there is nothing else."""
    found = bucket.below(out)
    found.pop(MANIFEST_NAME)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not bucket.uploads_to(out)
    assert verify(open_files(out), base=base) == []


# Disturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_request_in_ten_is_disturbed(
    s3_proxy: DisturbingProxy,
    s3: str,
    bucket: Bucket,
    base: Checkpoint,
    base_location: str,
    expected: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    seed: int,
) -> None:
    caplog.set_level(logging.INFO)
    s3_proxy.delay_s = 0.05
    s3_proxy.disturb(0.1, seed=seed)
    publish(Checkpoint.open(open_files(base_location)), f"{s3}/on-the-server", EDITED)
    publish(base, f"{s3}/from-a-folder", EDITED)
    publish(Checkpoint.open(open_files(base_location)), str(tmp_path / "out"), EDITED)
    assert sum(s3_proxy.disturbed.values()) >= 5
    for name in ("on-the-server", "from-a-folder"):
        check(bucket, f"{s3}/{name}", base, expected)
    s3_proxy.disturb(0)
    assert {n: (tmp_path / "out" / n).read_bytes() for n in expected} == expected
    assert verify(LocalFiles(tmp_path / "out")) == []
    written = b"".join(bucket.below(s3).values())
    assert not [secret for secret in SECRETS if secret in caplog.text or secret.encode() in written]


SECRETS = ("memedit-admin", "memedit-reader", "wrong-and-secret")
"""Parts of every key of these tests."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lost answer", "truncate", "reset", "503"])
def test_every_kind_of_trouble_at_every_request(
    s3_proxy: DisturbingProxy,
    s3: str,
    bucket: Bucket,
    base: Checkpoint,
    base_location: str,
    expected: dict[str, bytes],
    kind: Kind,
) -> None:
    """Once each: of a lost answer nobody knows, with the next try, whether it was granted."""
    seen: set[tuple[str, ...]] = set()
    s3_proxy.delay_s = 0.02

    def first_time(method: str, path: str, query: dict[str, str]) -> Kind | None:
        # Every upload has an id of its own, and every part a number.
        key = (
            method,
            path,
            *sorted(k for k in query if k != "uploadId"),
            query.get("partNumber", ""),
        )
        known = key in seen
        seen.add(key)
        return None if known else kind

    s3_proxy.on_request = first_time
    publish(Checkpoint.open(open_files(base_location)), s3, EDITED)
    s3_proxy.on_request = None
    assert sum(s3_proxy.disturbed.values()) == len(seen) > 25
    check(bucket, s3, base, expected)


# Away


def step_of(method: str, path: str, query: dict[str, str]) -> str | None:
    """At which step of the publication of `base_location` it makes this request."""
    if query.get("partNumber"):
        return {"1": "UploadPartCopy", "2": "UploadPart"}[query["partNumber"]]
    if method == "POST" and "uploadId" in query:
        return "CompleteMultipartUpload"
    if method == "PUT" and path.endswith("/model-00002-of-00002.safetensors"):
        return "copy of a shard"
    return "lock" if method == "PUT" and path.endswith(LOCK_NAME) else None


@contextmanager
def away(
    server: SeaweedServer, proxy: DisturbingProxy, downtime_s: float, *, at: str
) -> Iterator[None]:
    """Kill the server at the first request of this kind; it is started again after a while."""
    reached = threading.Event()

    def on_request(method: str, path: str, query: dict[str, str]) -> Kind | None:
        if step_of(method, path, query) == at:
            reached.set()
        return None

    def control() -> None:
        if reached.wait(60):
            server.stop(kill=True)
            time.sleep(downtime_s)
            server.start()

    proxy.on_request = on_request
    controller = threading.Thread(target=control)
    controller.start()
    try:
        yield
    finally:
        proxy.on_request = None
        controller.join()
        assert reached.is_set()


@pytest.mark.slow
@pytest.mark.parametrize(("at", "downtime_s"), [("UploadPart", 2), ("copy of a shard", 30)])
def test_the_server_goes_and_comes_back(
    s3_proxy: DisturbingProxy,
    s3_server: SeaweedServer,
    s3: str,
    bucket: Bucket,
    base: Checkpoint,
    base_location: str,
    expected: dict[str, bytes],
    at: str,
    downtime_s: float,
) -> None:
    there = Checkpoint.open(open_files(base_location))
    with away(s3_server, s3_proxy, downtime_s, at=at):
        publish(there, s3, EDITED)
    check(bucket, s3, base, expected)


@pytest.mark.slow
def test_the_server_stays_away(
    s3_proxy: DisturbingProxy,
    s3: str,
    bucket: Bucket,
    base: Checkpoint,
    base_location: str,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends soon; what it left is cleaned up by the next one."""
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "1")
    monkeypatch.setenv("MEMEDIT_LEASE_S", "0.3")
    there = Checkpoint.open(open_files(base_location))

    def go(method: str, path: str, query: dict[str, str]) -> Kind | None:
        if step_of(method, path, query) == "CompleteMultipartUpload":
            s3_proxy.down()
        return None

    s3_proxy.on_request = go
    began = time.monotonic()
    with pytest.raises(MemeditError, match=f"{s3}/.*: the storage did not answer for 1 s"):
        publish(there, s3, EDITED)
    assert time.monotonic() - began < 30
    s3_proxy.on_request = None
    assert not bucket.is_clean(s3)
    s3_proxy.up()
    publish(there, s3, EDITED)
    check(bucket, s3, base, expected)


# Changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("lock", "model-00001-of-00002.safetensors"),
        ("UploadPartCopy", "model-00001-of-00002.safetensors"),
        ("UploadPart", "tokenizer.json"),
        ("copy of a shard", "model-00002-of-00002.safetensors"),
    ],
)
def test_the_source_changes(
    s3_proxy: DisturbingProxy,
    s3: str,
    bucket: Bucket,
    base: Checkpoint,
    tmp_path: Path,
    step: str,
    name: str,
) -> None:
    assert base.files.here is not None
    bucket.put_folder(base.files.here, f"{s3}/base")
    there = Checkpoint.open(open_files(f"{s3}/base"))

    def change(method: str, path: str, query: dict[str, str]) -> Kind | None:
        if step_of(method, path, query) == step:
            s3_proxy.on_request = None
            bucket.flip(f"{s3}/base/{name}", -1)
        return None

    s3_proxy.on_request = change
    with pytest.raises(InputError, match=f"^{s3}/base/{name}: has changed since this run"):
        publish(there, f"{s3}/out", EDITED)
    assert s3_proxy.on_request is None and bucket.is_clean(f"{s3}/out")
    with pytest.raises(InputError, match=f"{s3}/base/{name}: has changed since this run"):
        publish(there, str(tmp_path / "out"), EDITED)
    assert not list(tmp_path.iterdir())


# Refused


def test_nothing_is_left_of_what_is_refused(
    s3: str,
    s3_server: SeaweedServer,
    bucket: Bucket,
    base: Checkpoint,
    base_location: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    there = Checkpoint.open(open_files(base_location))
    wrong = Identity(access_key=s3_server.access_key, secret_key="wrong-and-secret")
    unknown = Identity(access_key="wrong-and-secret-id", secret_key="wrong-and-secret")
    tries = [
        (s3_server.reader, s3, rf"{s3}/\S+: access denied \(AccessDenied\)"),
        (wrong, s3, rf"{s3}\S*: access denied \(SignatureDoesNotMatch\)"),
        (unknown, s3, rf"{s3}\S*: access denied \(InvalidAccessKeyId\)"),
        (s3_server.admin, "s3://no-such-bucket/out", r"s3://no-such-bucket/\S*: .*no such bucket"),
    ]
    for identity, out, says in tries:
        use_aws_environment(monkeypatch, s3_server.environment(identity=identity))
        for source in (base, there):
            with pytest.raises(InputError, match=says) as caught:
                publish(source, out, EDITED)
            shown = "".join(traceback.format_exception(caught.value))
            assert not [secret for secret in SECRETS if secret in shown]
        assert bucket.is_clean(s3)
    said = caplog.text + "".join(capfd.readouterr())
    assert not [secret for secret in SECRETS if secret in said]


@pytest.mark.parametrize("remote", [True, False])
def test_a_disk_that_is_full(
    s3: str, base: Checkpoint, base_location: str, tmp_path: Path, remote: bool
) -> None:
    source = Checkpoint.open(open_files(base_location)) if remote else base
    out = tmp_path / "sub" / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1000, 7 << 20):  # a side file has no room, or a shard has not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(InputError, match=rf"{out.parent}/\.out\.partial-.*File too large"):
                publish(source, str(out), EDITED)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(tmp_path.iterdir())
