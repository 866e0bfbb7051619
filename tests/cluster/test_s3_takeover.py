"""Publications to a real S3 server whose run has died, or stood still while another took over."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import pytest
from torch import Tensor

from cluster import compose
from cluster.publication import LOCK_NAME, S3Publication, open_publication
from cluster.store import open_files
from memedit.checkpoint import Checkpoint
from memedit.errors import LockError, MemeditError
from memedit.manifest import MANIFEST_NAME, UNFINISHED_NAME, Manifest
from memedit.patching import write_patched
from memedit.verify import verify
from tests.cluster.s3_places import Bucket, publish, write
from tests.cluster.test_lease import LEASE_S, die
from tests.memedit.test_manifest import manifest_of
from tests.s3.proxy import DisturbingProxy
from tests.s3.server import SeaweedServer
from tests.tiny import save_tiny

EDITED = ("model.layers.0.mlp.down_proj.weight", "lm_head.weight")


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Bucket:
    return Bucket(s3_server)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEDIT_LEASE_S", str(LEASE_S))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_tiny(tmp_path_factory.mktemp("base"), max_shard_size="100KB"))


@pytest.fixture
def remote(base: Checkpoint, s3: str, bucket: Bucket) -> Checkpoint:
    assert base.files.here is not None
    bucket.put_folder(base.files.here, f"{s3}/base")
    return Checkpoint.open(open_files(f"{s3}/base"))


def stopped(out: str) -> S3Publication:
    """A publication that has begun and then renews its lock no longer."""
    made: Any = open_publication(out, run_id="stopped").__enter__()
    assert isinstance(made, S3Publication) and made._own is not None
    die(made._own)
    return made


def manifest(written: Any, run_id: str) -> Manifest:
    return manifest_of(run_id=run_id, files=written.files, tensors=written.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("begun", [True, False])
def test_who_was_stopped_spoils_nothing(
    s3: str, bucket: Bucket, base: Checkpoint, when: str, begun: bool
) -> None:
    """It wakes before, or after, the next run has published; with, or without, its own files."""
    out = f"{s3}/out"
    first = stopped(out)
    if begun:
        written = write(base, first, EDITED)
    with open_publication(out, run_id="second") as second:
        again = write(base, second, EDITED)
        if when == "after":
            second.publish(manifest(again, "second"))
        before = bucket.named(out)
        with pytest.raises(LockError), ExitStack() as stack:
            stack.push(first)
            if not begun:
                written = write(base, first, EDITED)
            first.publish(manifest(written, "stopped"))
        assert bucket.named(out) == before
        if when == "before":
            second.publish(manifest(again, "second"))
    assert json.loads(bucket.get(f"{out}/{MANIFEST_NAME}"))["run_id"] == "second"
    assert verify(open_files(out), base=base) == []
    assert LOCK_NAME not in bucket.named(out) and not bucket.uploads_to(out)


def test_who_was_stopped_and_knows_it_writes_nothing(
    s3: str, bucket: Bucket, base: Checkpoint, remote: Checkpoint
) -> None:
    out = f"{s3}/out"
    first = stopped(out)
    with open_publication(out, run_id="second"):
        assert first._own is not None
        with pytest.raises(LockError):
            first._own.check()
        for source in (base, remote):
            with pytest.raises(LockError, match="another run has taken over"):
                write(source, first, EDITED)
        assert bucket.named(out) == {LOCK_NAME, UNFINISHED_NAME}
        first.__exit__(None, None, None)
        assert bucket.named(out) == {LOCK_NAME, UNFINISHED_NAME}
    assert bucket.is_clean(out)


def test_who_comes_to_know_it_stops_in_the_middle_of_a_file(
    s3_proxy: DisturbingProxy, s3: str, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "PART_BYTES", 1000)
    with (
        pytest.raises(LockError, match="taken"),
        open_publication(f"{s3}/out", run_id="r") as publication,
    ):

        def lose(rows: Tensor, start: int) -> Tensor:
            publication._own._lost = LockError("taken")  # type: ignore[attr-defined]
            return rows

        write_patched(base, publication.sink, {EDITED[0]: lose})
    size = base.files.size(base.shard_of(EDITED[0]))
    assert size is not None and 0 < s3_proxy.operations["UploadPart"] < 0.8 * size / 1000


@pytest.mark.parametrize("name", ["facts.jsonl", MANIFEST_NAME])
def test_what_a_stopped_run_writes_late_is_noticed_and_goes(
    s3: str, bucket: Bucket, base: Checkpoint, name: str
) -> None:
    out = f"{s3}/out"
    first = stopped(out)
    with (
        pytest.raises(MemeditError, match=out),
        open_publication(out, run_id="second") as second,
    ):
        written = write(base, second, EDITED)
        first.place.put(name, b"late", absent=True)
        second.publish(manifest(written, "second"))
    first.__exit__(None, None, None)
    assert bucket.is_clean(out)


@pytest.mark.slow
def test_what_a_dead_run_left_is_cleaned_up(s3: str, bucket: Bucket, base: Checkpoint) -> None:
    out = f"{s3}/out"
    dead = stopped(out)
    write(base, dead, EDITED)
    dead.place.begin("sub/unended").put(1, b"part")
    bucket.put(f"{out}/of-an-older-run", b"")
    assert bucket.uploads_to(out) and LOCK_NAME in bucket.named(out)
    publish(base, out, EDITED)
    assert verify(open_files(out), base=base) == []
    assert not bucket.uploads_to(out) and "of-an-older-run" not in bucket.named(out)
