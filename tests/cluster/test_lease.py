"""A lock in a real S3 server: held, left behind, taken over, and lost without harm."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from cluster.lease import Lease
from cluster.s3 import Place
from memedit.errors import InputError, LockError, MemeditError
from tests.cluster.processes import comes_true
from tests.cluster.s3_places import Bucket
from tests.s3.proxy import DisturbingProxy, Kind
from tests.s3.server import SeaweedServer

LEASE_S = 0.8
NAME = "lock"


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Bucket:
    return Bucket(s3_server)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEDIT_LEASE_S", str(LEASE_S))


def lease(s3: str) -> Lease:
    return Lease(Place.of(s3), NAME)


def die(holder: Lease) -> None:
    """As if its process had been killed, or stopped: it renews no longer."""
    holder._ended.set()
    holder._thread.join()


def owner(bucket: Bucket, s3: str) -> str:
    return str(json.loads(bucket.get(f"{s3}/{NAME}"))["owner"])


def test_taken_renewed_and_released(s3: str, bucket: Bucket) -> None:
    with lease(s3) as held:
        first = bucket.head(f"{s3}/{NAME}")["ETag"]
        holder = json.loads(bucket.get(f"{s3}/{NAME}"))
        assert holder.keys() == {"owner", "host", "process", "renewed_at"}
        assert comes_true(lambda: bucket.head(f"{s3}/{NAME}")["ETag"] != first, within_s=LEASE_S)
        assert owner(bucket, s3) == holder["owner"] == held._owner
        held.check()
        assert not held.taken_over
    assert bucket.is_clean(s3)
    with lease(s3) as again:
        assert not again.taken_over


@pytest.mark.slow
def test_it_is_held_as_long_as_it_is_renewed(s3: str, bucket: Bucket) -> None:
    with lease(s3) as held:
        began = time.monotonic()
        while time.monotonic() - began < 3 * LEASE_S:
            asked = time.monotonic()
            with pytest.raises(LockError, match=rf"{s3}/{NAME}: process \d+ on .* holds this"):
                lease(s3).__enter__()
            assert time.monotonic() - asked < LEASE_S  # by a sign of life, not by waiting
        held.check()


def test_who_waits_gets_it_when_it_is_released(s3: str) -> None:
    with ExitStack() as stack:
        held = stack.enter_context(lease(s3))
        die(held)
        threading.Timer(LEASE_S / 3, stack.close).start()
        with lease(s3) as next_one:
            assert not next_one.taken_over
            next_one.check()


@pytest.mark.slow
def test_the_lock_of_a_dead_run_is_taken_over(s3: str, bucket: Bucket) -> None:
    # Whatever it holds, should it be of another version of memedit.
    for content in (b"", b"\xff", b"[]", b'{"process": 1}'):
        bucket.put(f"{s3}/{NAME}", content)
        began = time.monotonic()
        with lease(s3) as held:
            assert held.taken_over and time.monotonic() - began >= LEASE_S
        assert bucket.is_clean(s3)


def test_one_of_many_takes_over(s3: str, bucket: Bucket) -> None:
    bucket.put(f"{s3}/{NAME}", b"dead")
    outcomes: list[str] = []
    all_asked = threading.Barrier(4)

    def ask() -> None:
        try:
            with lease(s3) as held:
                outcomes.append("held")
                all_asked.wait(10)
                held.check()
        except LockError:
            outcomes.append("refused")
            all_asked.wait(10)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]
    assert bucket.is_clean(s3)


def overwritten(bucket: Bucket, s3: str) -> None:
    bucket.put(f"{s3}/{NAME}", b'{"owner": "another"}')


def deleted(bucket: Bucket, s3: str) -> None:
    bucket.delete(f"{s3}/{NAME}")


@pytest.mark.parametrize("lose", [overwritten, deleted])
def test_a_lost_lease_is_noticed(
    s3: str, bucket: Bucket, lose: Callable[[Bucket, str], None]
) -> None:
    with lease(s3) as asks:
        lose(bucket, s3)
        with pytest.raises(LockError, match=rf"{s3}/{NAME}: another run has taken over"):
            asks.check()
    with lease(s3) if lose is deleted else lease(f"{s3}/2") as renews:
        place = str(renews.place)
        lose(bucket, place)

        def known() -> bool:
            try:
                renews.check_known()
            except LockError:
                return True
            return False

        assert comes_true(known, within_s=2 * LEASE_S)
        with pytest.raises(LockError, match="another run has taken over"):
            renews.check()
    # Who has lost it takes nothing from the next holder.
    assert (lose is overwritten) == (NAME in bucket.named(place))


def test_it_is_not_taken_from_who_took_it_at_the_last_moment(
    s3_proxy: DisturbingProxy, s3: str, bucket: Bucket
) -> None:
    def overtake(method: str, path: str, query: dict[str, str]) -> Kind | None:
        if method == "DELETE":
            overwritten(bucket, s3)
        return None

    s3_proxy.on_request = overtake
    with lease(s3):
        pass
    assert owner(bucket, s3) == "another"


def test_a_storage_without_conditional_deletes(
    s3: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = Place.delete

    def refuse(self: Place, names: list[str], *, etag: str | None = None) -> None:
        if etag is not None:
            raise MemeditError("NotImplemented")
        delete(self, names)

    monkeypatch.setattr(Place, "delete", refuse)
    with lease(s3):
        pass
    assert bucket.is_clean(s3)


def test_a_renewal_whose_answer_is_lost(
    s3_proxy: DisturbingProxy, s3: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one finds its own lock with an ETag that it does not know."""
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "0")
    kinds: Iterator[Kind | None] = iter([None, "lost answer"])
    s3_proxy.on_request = lambda method, path, query: next(kinds, None) if method == "PUT" else None
    with lease(s3) as held:
        assert comes_true(lambda: s3_proxy.requests["PUT"] >= 5, within_s=5)
        held.check()
        puts = [e.status for e in s3_proxy.exchanges if e.method == "PUT"]
        assert puts[:4] == [200, 200, 412, 200]
    assert bucket.is_clean(s3)


@pytest.mark.slow
def test_a_storage_that_is_away(
    s3_proxy: DisturbingProxy, s3: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "0.1")
    with lease(s3) as held:
        s3_proxy.down()
        time.sleep(1.5 * LEASE_S)
        with pytest.raises(MemeditError, match="did not answer"):
            held.check()
        s3_proxy.up()
        # Nobody has taken it over meanwhile.
        first = bucket.head(f"{s3}/{NAME}")["ETag"]
        assert comes_true(lambda: bucket.head(f"{s3}/{NAME}")["ETag"] != first, within_s=LEASE_S)
        held.check()
        s3_proxy.down()
    # It could not be released, and runs out.
    assert bucket.named(s3) == {NAME}
    s3_proxy.up()
    with lease(s3) as other:
        assert other.taken_over


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_number_is_wanted(s3: str, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MEMEDIT_LEASE_S", text)
    with pytest.raises(InputError, match=r"\[MEMEDIT_LEASE_S\]"):
        lease(s3)
