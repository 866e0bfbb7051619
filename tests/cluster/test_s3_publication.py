"""Publishing to and from a real S3 server: the same bytes as locally, and few of them sent."""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from cluster import compose, s3_sink
from cluster.compose import MIN_PART_BYTES
from cluster.publication import S3Publication, open_publication
from cluster.storage import StorageSettings
from cluster.store import open_files
from memedit.checkpoint import Checkpoint
from memedit.files import LocalFiles
from memedit.manifest import MANIFEST_NAME, Manifest, read_manifest
from memedit.verify import verify
from tests.cluster.s3_places import MIB, Bucket, publish, saved_model
from tests.s3.proxy import DisturbingProxy
from tests.s3.server import SeaweedServer
from tests.tiny import save_tiny

# In the middle of the second shard, and near the beginning of the first; the third stays.
EDITED = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight")
UNEDITED_SHARD = "model-00003-of-00003.safetensors"


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Bucket:
    return Bucket(s3_server)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ text }}")
    base = saved_model(folder, layers=3, max_shard_size="17MB")
    assert len(base.shards) == 3
    assert {base.shard_of(name) for name in EDITED} == {*base.shards} - {UNEDITED_SHARD}
    return base


@pytest.fixture(scope="module")
def expected(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the version, as a folder gets them; without the manifest."""
    out = tmp_path_factory.mktemp("expected") / "out"
    publish(base, str(out), EDITED)
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != MANIFEST_NAME}


@pytest.fixture(scope="module")
def base_location(base: Checkpoint, s3_server: SeaweedServer) -> Iterator[str]:
    """The base on the server, where no test changes it."""
    bucket = Bucket(s3_server)
    location = f"s3://{bucket.bucket}/the-base"
    assert base.files.here is not None
    bucket.put_folder(base.files.here, location)
    yield location
    for name in bucket.named(location):
        bucket.delete(f"{location}/{name}")


def check(bucket: Bucket, out: str, manifest: Manifest, expected: dict[str, bytes]) -> None:
    """The version is the expected one, and its manifest says the truth."""
    found = bucket.below(out)
    found.pop(MANIFEST_NAME)
    assert found.keys() == expected.keys()
    assert [n for n, content in found.items() if content != expected[n]] == []
    assert not bucket.uploads_to(out)
    assert read_manifest(open_files(out)).files == manifest.files
    assert manifest.files.keys() == expected.keys()
    for name, record in manifest.files.items():
        crc32 = zlib.crc32(expected[name]).to_bytes(4, "big")
        assert record.checksum == f"CRC32:{b64encode(crc32).decode()}"
        assert record.size_bytes == len(expected[name])
        assert record.sha256 in (None, sha256(expected[name]).hexdigest())


@pytest.mark.slow
def test_from_a_folder(
    s3_proxy: DisturbingProxy,
    s3: str,
    bucket: Bucket,
    base: Checkpoint,
    expected: dict[str, bytes],
) -> None:
    manifest = publish(base, s3, EDITED)
    assert s3_proxy.operations["UploadPartCopy"] == s3_proxy.operations["CopyObject"] == 0
    assert 0 <= s3_proxy.up_bytes - sum(map(len, expected.values())) < MIB // 8
    check(bucket, s3, manifest, expected)
    assert all(record.sha256 for record in manifest.files.values())
    assert verify(open_files(s3), base=base) == []


@pytest.mark.slow
def test_on_the_server(
    s3_proxy: DisturbingProxy,
    s3: str,
    bucket: Bucket,
    base_location: str,
    base: Checkpoint,
    expected: dict[str, bytes],
) -> None:
    there = Checkpoint.open(open_files(base_location))
    s3_proxy.forget()
    manifest = publish(there, s3, EDITED)
    edited = sum(base.info(name).size_bytes for name in EDITED)
    assert edited < s3_proxy.up_bytes < edited + len(EDITED) * MIN_PART_BYTES + MIB // 8
    # The edited tensors as they were, and what else is in the parts that they are in.
    assert s3_proxy.down_bytes <= s3_proxy.up_bytes + MIB // 8
    # What is before, and behind, the edited range of one; what is behind that of the other.
    assert s3_proxy.operations["UploadPartCopy"] == 3
    assert s3_proxy.operations["UploadPart"] == 2
    assert s3_proxy.operations["CopyObject"] == 1 + len(base.side_files)
    check(bucket, s3, manifest, expected)
    assert verify(open_files(s3), base=there) == [] == verify(open_files(s3), quick=True)


@pytest.mark.slow
def test_copied_in_parts_and_stored_as_is_asked(
    s3_proxy: DisturbingProxy,
    s3: str,
    bucket: Bucket,
    base_location: str,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (compose, s3_sink):
        monkeypatch.setattr(module, "MAX_COPY_BYTES", 10 * MIB)
    storage = StorageSettings(server_side_encryption="AES256", storage_class="STANDARD_IA")
    there = Checkpoint.open(open_files(base_location))
    manifest = publish(there, s3, EDITED, storage=storage)
    # The unedited shard in two.
    assert s3_proxy.operations["UploadPartCopy"] == 3 + 2
    assert s3_proxy.operations["CopyObject"] == len(there.side_files)
    check(bucket, s3, manifest, expected)
    for name in bucket.named(s3):
        head = bucket.head(f"{s3}/{name}")
        assert head["ServerSideEncryption"] == "AES256", name
        assert head["StorageClass"] == "STANDARD_IA", name


@pytest.mark.slow
def test_to_a_folder(
    s3_proxy: DisturbingProxy,
    s3: str,
    base_location: str,
    base: Checkpoint,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    there = Checkpoint.open(open_files(base_location))
    s3_proxy.forget()
    publish(there, str(tmp_path / "out"), EDITED)
    found = {name: (tmp_path / "out" / name).read_bytes() for name in expected}
    assert found == expected
    # Every byte once, be it to be kept or to be changed.
    assert 0 <= s3_proxy.down_bytes - sum(base.files.sizes(deep=True).values()) < MIB // 8
    assert verify(LocalFiles(tmp_path / "out"), base=base) == []


@pytest.mark.slow
def test_a_version_of_a_version(
    s3: str, bucket: Bucket, base: Checkpoint, base_location: str
) -> None:
    """What was composed can be copied, and composed, again."""
    there = Checkpoint.open(open_files(base_location))
    publish(there, f"{s3}/1", EDITED[:1])
    publish(Checkpoint.open(open_files(f"{s3}/1")), f"{s3}/2", EDITED[:1])
    for shard in base.shards:
        assert bucket.get(f"{s3}/2/{shard}") == bucket.get(f"{base_location}/{shard}")
    assert verify(open_files(f"{s3}/2"), quick=True) == []


def test_storage_settings_as_arguments() -> None:
    assert StorageSettings().arguments == {}
    settings = StorageSettings(server_side_encryption="aws:kms", kms_key_id="k")
    assert settings.arguments == {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k"}


@pytest.mark.slow
def test_one_changed_byte_is_found(
    s3: str, bucket: Bucket, base: Checkpoint, base_location: str
) -> None:
    publish(Checkpoint.open(open_files(base_location)), s3, EDITED)
    info = base.info(EDITED[0])
    places = [
        (info.shard, info.offset + 1),
        (info.shard, info.offset - MIB),
        (info.shard, 9),
        (UNEDITED_SHARD, 12 * MIB),
        ("tokenizer.json", 3),
        ("additional_chat_templates/tool.jinja", 0),
        ("report.html", 0),
    ]
    for number, (name, position) in enumerate(places):
        bucket.flip(f"{s3}/{name}", position)
        for quick in (True, False) if number in (1, 3) else (True,):
            problems = verify(open_files(s3), quick=quick)
            assert (name, "checksum") in {(p.file, p.kind) for p in problems}, (name, quick)
            assert all(name in p.file for p in problems if p.kind != "damaged")
        bucket.flip(f"{s3}/{name}", position)
    assert verify(open_files(s3), quick=True) == []
    bucket.put(f"{s3}/more", b"")
    bucket.delete(f"{s3}/report.html")
    found = {(p.file, p.kind) for p in verify(open_files(s3), quick=True)}
    assert found == {("more", "unlisted"), ("report.html", "missing")}


def test_what_has_no_checksum_gets_one(s3: str, bucket: Bucket, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    for path in tmp_path.iterdir():
        bucket.put_without_checksum(f"{s3}/base/{path.name}", path.read_bytes())
    there = Checkpoint.open(open_files(f"{s3}/base"))
    manifest = publish(there, f"{s3}/out", ())
    assert all((r.checksum or "").startswith("CRC32:") for r in manifest.files.values())


def test_a_changed_byte_is_found_where_the_checksum_is_gone(
    s3: str, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put_folder(save_tiny(tmp_path), f"{s3}/base")
    there = Checkpoint.open(open_files(f"{s3}/base"))
    publish(there, f"{s3}/out", ("lm_head.weight",))
    shard = there.shard_of("model.layers.0.mlp.down_proj.weight")
    content = bytearray(bucket.get(f"{s3}/out/{shard}"))
    content[-1] ^= 1
    bucket.put_without_checksum(f"{s3}/out/{shard}", bytes(content))
    problems = verify(open_files(f"{s3}/out"))
    assert {(p.file, p.kind) for p in problems} == {(shard, "checksum")}
    # A quick look reads no shard whole.
    assert verify(open_files(f"{s3}/out"), quick=True) == []


def test_what_says_that_a_place_is_finished_appears_last(
    s3: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay: list[set[str]] = []
    commit = S3Publication._commit

    def watched(publication: S3Publication, name: str, content: bytes) -> None:
        lay.append({name, *bucket.below(s3)})
        commit(publication, name, content)

    monkeypatch.setattr(S3Publication, "_commit", watched)
    with open_publication(s3, run_id="r") as publication:
        for name in ("results.json", "settings.yaml", "z/last"):
            (publication.staging / name).parent.mkdir(exist_ok=True)
            (publication.staging / name).write_text(name)
        publication.appear()
    (seen,) = lay
    assert seen >= {"results.json", "settings.yaml", "z/last"}


def test_a_folder_appears_as_it_is(s3: str, bucket: Bucket) -> None:
    with open_publication(s3, run_id="r") as publication:
        (publication.staging / "sub").mkdir()
        for name in ("a.safetensors", "stats.json", "sub/b"):
            (publication.staging / name).write_text(name)
        publication.appear()
    assert bucket.below(s3) == {n: n.encode() for n in ("a.safetensors", "stats.json", "sub/b")}
