"""A publication to S3 that is killed, or that is not alone: one whole version, or none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Literal

import pytest

from cluster.publication import LOCK_NAME
from cluster.store import open_files
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError
from memedit.manifest import MANIFEST_NAME, UNFINISHED_NAME, read_manifest
from memedit.verify import verify
from tests.cluster.s3_places import Bucket, publish
from tests.faults.s3_publisher import EDITED, Publisher
from tests.s3.fixtures import use_aws_environment
from tests.s3.proxy import DisturbingProxy, Kind
from tests.s3.server import SeaweedServer

READS = ("GET", "HEAD")


def check_whole(bucket: Bucket, out: str, expected: dict[str, bytes]) -> None:
    """What a reader finds is the version, all of it and nothing else."""
    listed = read_manifest(open_files(out)).files
    found = bucket.below(out)
    notes = {MANIFEST_NAME, LOCK_NAME, UNFINISHED_NAME}
    assert found.keys() - notes == listed.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    sizes = {name: len(content) for name, content in expected.items()}
    assert {name: record.size_bytes for name, record in listed.items()} == sizes


def is_there(bucket: Bucket, out: str, expected: dict[str, bytes]) -> bool:
    """Whether there is a version; then it is whole."""
    present = MANIFEST_NAME in bucket.named(out)
    if present:
        check_whole(bucket, out, expected)
    return present


def stop_at(
    proxy: DisturbingProxy, number: int, when: Literal["before", "after"], do: Callable[[], None]
) -> None:
    """Do something at the `number`-th request that may change something at the server.

    Before it gets there (and then it does not), or after it was answered (which nobody hears).
    """
    lock = threading.Lock()
    begun = ended = 0

    def on_request(method: str, path: str, query: dict[str, str]) -> Kind | None:
        nonlocal begun
        with lock:
            begun += method not in READS
            now = method not in READS and begun == number and when == "before"
        if now:
            do()
        return "drop" if now else None

    def on_answer(method: str, path: str, query: dict[str, str], status: int) -> None:
        nonlocal ended
        with lock:
            ended += method not in READS
            now = method not in READS and ended == number and when == "after"
        if now:
            do()

    proxy.on_request, proxy.on_answer = on_request, on_answer


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_each_change(
    s3_proxy: DisturbingProxy,
    s3_server: SeaweedServer,
    s3: str,
    bucket: Bucket,
    base_location: str,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    when: Literal["before", "after"],
) -> None:
    through_proxy = s3_server.environment(endpoint=s3_proxy.endpoint)
    through_proxy["MEMEDIT_LEASE_S"] = "30"  # and so it is not renewed in the few seconds
    use_aws_environment(monkeypatch, s3_server.environment())
    monkeypatch.setenv("MEMEDIT_LEASE_S", "0.3")
    base = Checkpoint.open(open_files(base_location))
    seen: list[bool] = []
    for number in range(1, 100):
        if when == "before" and 5 < number < 12:
            continue  # one copy is like the other
        out = f"{s3}/{number}"
        publishers: list[Publisher] = []
        stop_at(s3_proxy, number, when, lambda: publishers[0].kill())  # noqa: B023
        publishers.append(Publisher(through_proxy, base_location, out))
        code, text = publishers[0].outcome()
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
        seen.append(is_there(bucket, out, expected))
        # The second run finishes it, or finds it finished.
        try:
            publish(base, out, EDITED, run_id="second")
            assert not seen[-1]
        except InputError as error:
            assert seen[-1] and "is not empty" in str(error)
        check_whole(bucket, out, expected)
        assert bucket.named(out) == {*expected, MANIFEST_NAME} and not bucket.uploads_to(out)
    check_whole(bucket, out, expected)
    assert verify(open_files(out), base=base) == []
    # Kills both before and after the version appeared, or the test has not tested.
    # After the manifest come the note that there is none, and the lock.
    assert len(seen) >= 8 and seen.count(True) == (2 if when == "before" else 3)
    assert seen == sorted(seen)


@pytest.mark.slow
def test_stopped_for_longer_than_the_lease(
    s3_proxy: DisturbingProxy,
    s3_server: SeaweedServer,
    s3: str,
    bucket: Bucket,
    base_location: str,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a laptop that is shut: meanwhile another run publishes here."""
    through_proxy = s3_server.environment(endpoint=s3_proxy.endpoint)
    through_proxy["MEMEDIT_LEASE_S"] = "30"  # and so it is not renewed in the few seconds
    use_aws_environment(monkeypatch, s3_server.environment())
    monkeypatch.setenv("MEMEDIT_LEASE_S", "0.3")
    base = Checkpoint.open(open_files(base_location))
    for number in (2, 8):
        out = f"{s3}/{number}"
        publishers: list[Publisher] = []
        stopped = threading.Event()

        def stop(publishers: list[Publisher] = publishers, stopped=stopped) -> None:  # type: ignore[no-untyped-def]
            os.kill(publishers[0].process_id, signal.SIGSTOP)
            stopped.set()

        stop_at(s3_proxy, number, "after", stop)
        publishers.append(Publisher(through_proxy, base_location, out))
        assert stopped.wait(60)
        try:
            publish(base, out, EDITED, run_id="second")
        finally:
            os.kill(publishers[0].process_id, signal.SIGCONT)
        code, text = publishers[0].outcome()
        assert code == 4 and "LockError" in text, text
        check_whole(bucket, out, expected)
        assert bucket.named(out) == {*expected, MANIFEST_NAME} and not bucket.uploads_to(out)


@pytest.mark.slow
def test_two_publishers_at_once(
    s3_proxy: DisturbingProxy,
    s3_server: SeaweedServer,
    s3: str,
    bucket: Bucket,
    base_location: str,
    expected: dict[str, bytes],
) -> None:
    environment = s3_server.environment(endpoint=s3_proxy.endpoint) | {"MEMEDIT_LEASE_S": "3"}
    both = threading.Event()
    locks = 0

    def on_request(method: str, path: str, query: dict[str, str]) -> Kind | None:
        nonlocal locks
        if method == "PUT" and path.endswith(LOCK_NAME):
            locks += 1
            if locks == 2:
                both.set()
        elif method == "PUT" and path.endswith(MANIFEST_NAME):
            # The winner waits, or it might be ready before the other has begun.
            assert both.wait(60)
            assert lost.wait(60)
        return None

    lost = threading.Event()
    s3_proxy.on_request = on_request
    publishers = [Publisher(environment, base_location, s3, run_id=n) for n in ("a", "b")]

    def told_of_the_lock() -> None:
        while not any(publisher.has_ended(0.1) for publisher in publishers):
            pass
        lost.set()

    threading.Thread(target=told_of_the_lock).start()
    outcomes = sorted(publisher.outcome() for publisher in publishers)
    assert [code for code, _ in outcomes] == [0, 4], outcomes
    assert "holds this lock" in outcomes[1][1]
    check_whole(bucket, s3, expected)
    assert bucket.named(s3) == {*expected, MANIFEST_NAME} and not bucket.uploads_to(s3)
