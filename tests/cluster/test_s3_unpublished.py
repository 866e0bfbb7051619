"""What does not become a version on a real S3 server: it leaves nothing, and nothing else goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster import publication
from cluster.publication import open_publication
from cluster.s3 import Entry, Place
from cluster.store import LOCK_NAME, Guard, open_files, open_store
from memedit.checkpoint import Checkpoint
from memedit.checksums import FileRecord
from memedit.errors import GateError, InputError, LockError, MemeditError
from memedit.files import file_of
from memedit.manifest import MANIFEST_NAME, UNFINISHED_NAME
from memedit.patching import write_patched
from tests.cluster.s3_places import MIB, Bucket, publish, saved_model, write
from tests.memedit.test_manifest import manifest_of
from tests.s3.proxy import DisturbingProxy, Kind
from tests.s3.server import SeaweedServer
from workflows.models import resolve_model

EDITED = ("model.layers.1.self_attn.o_proj.weight",)


@dataclass
class Held(Guard):
    """The lock of a registry, held by the caller until it is lost."""

    taken_over: bool = False
    lost: bool = False

    def check(self) -> None:
        self.check_known()

    def check_known(self) -> None:
        if self.lost:
            raise LockError("taken over")

    def abandon(self) -> None:
        pass


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Bucket:
    return Bucket(s3_server)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    base = saved_model(tmp_path_factory.mktemp("base"), layers=2, max_shard_size="13MB")
    # Something to copy before it, and so its shard is made of parts.
    assert base.info(EDITED[0]).offset > 8 * MIB
    return base


@pytest.fixture(scope="module")
def base_location(base: Checkpoint, s3_server: SeaweedServer) -> Iterator[str]:
    """The base on the server, where no test changes it."""
    bucket = Bucket(s3_server)
    location = f"s3://{bucket.bucket}/the-base-of-what-fails"
    assert base.files.here is not None
    bucket.put_folder(base.files.here, location)
    yield location
    for name in bucket.named(location):
        bucket.delete(f"{location}/{name}")


def fail_at_row(last: int) -> Any:
    def patch(rows: Tensor, start: int) -> Tensor:
        if start >= last:
            raise GateError("no")
        return rows

    return patch


@pytest.mark.slow
def test_nothing_is_left_without_publish(
    s3: str, bucket: Bucket, base: Checkpoint, base_location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memedit.patching.BLOCK_ELEMENTS", 1 << 17)
    for source in (base, Checkpoint.open(open_files(base_location))):
        with open_publication(s3, run_id="r") as publication:
            write(source, publication, EDITED)
            (publication.staging / "report.html").write_text("<html>")
            assert len(bucket.named(s3)) > 5
        assert bucket.is_clean(s3) and not publication.staging.exists()
        # In the middle of a shard.
        for last in (0, 256):
            with (
                pytest.raises(GateError),
                open_publication(s3, run_id="r") as publication,
            ):
                write_patched(source, publication.sink, {EDITED[0]: fail_at_row(last)})
            assert bucket.is_clean(s3)
    publish(base, s3, ())  # and then it can be published to


def test_what_is_not_empty_is_refused_and_left(s3: str, bucket: Bucket) -> None:
    bucket.put(f"{s3}/sub/mine", b"text")
    with (
        pytest.raises(InputError, match=rf"{s3} \[out\]: is not empty"),
        open_publication(s3, run_id="r"),
    ):
        pass
    assert bucket.below(s3) == {"sub/mine": b"text"}
    with pytest.raises(InputError, match="whole bucket"):
        open_publication(f"s3://{bucket.bucket}", run_id="r")


@pytest.mark.parametrize("end", [MANIFEST_NAME, "stats.json"])
def test_a_version_is_refused_and_left(
    s3: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("MEMEDIT_LEASE_S", "0.3")
    for name in (end, "config.json"):
        bucket.put(f"{s3}/{name}", b"{}")
    # Even where its publisher died before it let go of the lock.
    bucket.put(f"{s3}/{publication.LOCK_NAME}", b"dead")
    for guard in (None, Held()):
        with (
            pytest.raises(InputError, match="is not empty"),
            open_publication(s3, run_id="r", guard=guard),
        ):
            pass
        assert bucket.named(s3) >= {end, "config.json"}
    assert bucket.named(s3) == {end, "config.json"}


def test_who_has_lost_the_lock_of_a_registry_removes_nothing(
    s3: str, bucket: Bucket, tmp_path: Path
) -> None:
    """The version may be that of another run by now, under the same name."""
    guard = Held()
    (tmp_path / "a.txt").write_text("a")
    with (
        pytest.raises(LockError, match="taken over"),
        open_publication(s3, run_id="r", guard=guard) as ours,
    ):
        ours.sink.copy(file_of(tmp_path / "a.txt"), None)
        guard.lost = True
        ours.publish(manifest_of(files={}, tensors={}))
    assert bucket.below(s3) == {"a.txt": b"a", UNFINISHED_NAME: b""}
    with open_publication(s3, run_id="r", guard=Held()):
        assert bucket.below(s3) == {
            UNFINISHED_NAME: b""
        }  # left by a dead run, for who holds the lock


def test_the_lock_of_a_registry_is_no_licence_to_clear_it(
    s3: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died while it published into a registry leaves the registry's lock."""
    monkeypatch.setenv("MEMEDIT_LEASE_S", "0.3")
    bucket.put(f"{s3}/versions/a/{MANIFEST_NAME}", b"{}")
    bucket.put(f"{s3}/{LOCK_NAME}", b"dead")
    with pytest.raises(InputError, match="not empty"), open_publication(s3, run_id="r"):
        pass
    assert f"versions/a/{MANIFEST_NAME}" in bucket.named(s3)
    with open_store(s3).lock(), pytest.raises(MemeditError), open_publication(s3, run_id="r"):
        pass


@pytest.mark.parametrize(
    "name",
    [
        *("foreign", "sub/foreign", MANIFEST_NAME),
        # Names that this run writes, too: one that is copied, uploaded, made of parts.
        *("tokenizer.json", "report.html", "model-00002-of-00003.safetensors"),
    ],
)
def test_a_foreign_object_is_noticed_and_left(
    s3: str, bucket: Bucket, base_location: str, name: str
) -> None:
    there = Checkpoint.open(open_files(base_location))
    with (
        pytest.raises(MemeditError, match=s3) as caught,
        open_publication(s3, run_id="r") as publication,
    ):
        bucket.put(f"{s3}/{name}", b"mine")
        (publication.staging / "report.html").write_text("<html>")
        patched = write(there, publication, EDITED)
        publication.publish(manifest_of(files=patched.files, tensors=patched.tensors))
    assert not isinstance(caught.value, InputError)
    assert bucket.below(s3) == {name: b"mine"} and not bucket.uploads_to(s3)


@pytest.mark.parametrize(
    ("at", "name"), [("PUT", "a"), ("PUT", MANIFEST_NAME), ("GET", MANIFEST_NAME)]
)
def test_what_appears_at_the_last_moment_is_noticed_and_left(
    s3_proxy: DisturbingProxy, s3: str, bucket: Bucket, at: str, name: str
) -> None:
    """Between the look and the lock; between the last look and the manifest."""

    def appear(method: str, path: str, query: dict[str, str]) -> Kind | None:
        now = method == at and path.endswith(publication.LOCK_NAME)
        if now and name not in bucket.names(f"{s3}/out"):
            bucket.put(f"{s3}/out/{name}", b"mine")
        return None

    s3_proxy.on_request = appear
    says = "is not empty" if at == "PUT" else "another run has published here"
    with (
        pytest.raises(MemeditError, match=says),
        open_publication(f"{s3}/out", run_id="r") as made,
    ):
        made.publish(manifest_of())
    assert bucket.below(s3) == {f"out/{name}": b"mine"}


def test_an_object_changed_meanwhile_is_noticed(
    s3: str, bucket: Bucket, base_location: str
) -> None:
    there = Checkpoint.open(open_files(base_location))
    with (
        pytest.raises(MemeditError, match=f"{s3}: is not what this run wrote"),
        open_publication(s3, run_id="r") as publication,
    ):
        patched = write(there, publication, EDITED)
        bucket.put(f"{s3}/config.json", b"{}")
        publication.publish(manifest_of(files=patched.files, tensors=patched.tensors))
    assert MANIFEST_NAME not in bucket.named(s3)


def test_what_the_manifest_lists_must_be_there(s3: str, bucket: Bucket) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"report\.html"),
        open_publication(s3, run_id="r") as publication,
    ):
        (publication.staging / "config.json").write_text("{}")
        record = FileRecord(size_bytes=1, sha256=None)
        publication.publish(manifest_of(files={"report.html": record}))
    assert bucket.is_clean(s3)


def test_two_at_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEDIT_LEASE_S", "0.6")
    with (
        open_publication(s3, run_id="a"),
        pytest.raises(LockError, match=r"process .* holds this lock"),
        open_publication(s3, run_id="b"),
    ):
        pass


def test_damage_on_the_way_is_noticed(
    s3: str, bucket: Bucket, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the storage's checksum is not of what was sent, though its size is right."""
    head = Place.head

    def damaged(self: Place, name: str) -> Entry | None:
        found = head(self, name)
        bad = found is not None and name.endswith(".safetensors")
        return replace(found, checksum="CRC32:AAAAAA==") if found and bad else found

    monkeypatch.setattr(Place, "head", damaged)
    with pytest.raises(MemeditError, match=f"{s3}/model.*: arrived damaged"):
        publish(base, s3, EDITED)
    assert bucket.is_clean(s3)


def test_workers_see_what_was_written(s3: str, base_location: str) -> None:
    there = Checkpoint.open(open_files(base_location))
    with open_publication(s3, run_id="r") as publication:
        with publication.probe() as token:
            assert open_files(s3).size(token) == 0
        assert open_files(s3).size(token) is None
        write(there, publication, EDITED)
        again = Checkpoint.open(publication.files)
        assert torch.equal(again.read(EDITED[0]), -there.read(EDITED[0]))
    # It was pinned to what is gone now.
    with pytest.raises(InputError, match=f"{s3}/.*: there is no such object"):
        again.read(EDITED[0])


def test_who_reads_meanwhile_is_told(s3: str, base: Checkpoint) -> None:
    with open_publication(s3, run_id="r") as made:
        written = write(base, made, EDITED)
        with pytest.raises(InputError, match="being published or removed"):
            resolve_model(s3)
        made.publish(manifest_of(files=written.files, tensors=written.tensors))
    assert Checkpoint.open(resolve_model(s3).files).published


def test_a_file_that_changes_while_it_is_uploaded(
    s3: str, bucket: Bucket, base: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("after")
    known = FileRecord(size_bytes=5, sha256="0" * 64)
    with (
        pytest.raises(InputError, match=r"a\.txt: has changed since this run began"),
        open_publication(s3, run_id="r") as made,
    ):
        made.sink.copy(file_of(tmp_path / "a.txt"), known)
    assert bucket.is_clean(s3)


def test_the_manifest_of_who_stood_still_goes_again(
    s3: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run has taken over between the last look and the manifest."""
    guard = Held()
    put = Place.put

    def late(place: Place, name: str, *arguments: Any, **options: Any) -> str:
        written = put(place, name, *arguments, **options)
        guard.lost = guard.lost or name == MANIFEST_NAME
        return written

    monkeypatch.setattr(Place, "put", late)
    with (
        pytest.raises(LockError, match="taken over"),
        open_publication(s3, run_id="r", guard=guard) as made,
    ):
        made.publish(manifest_of(files={}, tensors={}))
    assert MANIFEST_NAME not in bucket.named(s3)
