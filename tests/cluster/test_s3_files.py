"""Files read from a real S3 server: their bytes, and always of one version."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import s3 as s3_objects
from cluster import s3_files, s3_requests
from cluster.s3 import Entry, Place
from cluster.s3_files import S3Files
from cluster.store import open_file
from memedit.errors import InputError
from tests.cluster.s3_places import MIB, Bucket, bytes_of, child_environment
from tests.s3.proxy import DisturbingProxy
from tests.s3.server import SeaweedServer


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Bucket:
    return Bucket(s3_server)


# Bytes


def test_reads_any_range(s3: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_objects, "RANGE_BYTES", MIB)
    content = bytes_of(5 * MIB + 13)
    bucket.put(f"{s3}/a", content)
    files = S3Files.at(s3)
    assert files.size("a") == len(content) and files.read("a") == content
    chance = random.Random(0)
    for _ in range(10):
        start, stop = sorted(chance.choices(range(len(content) + 1), k=2))
        assert files.read("a", start, stop - start) == content[start:stop]
    assert files.read("a", MIB - 1, 2 * MIB + 2) == content[MIB - 1 : 3 * MIB + 1]
    assert files.read("a", len(content), 0) == b""
    # Wherever the memory lies, and whatever its owner keeps there.
    numbers = np.zeros(MIB // 2, dtype=np.float32)
    files.read_into("a", 5, memoryview(numbers))
    assert numbers.tobytes() == content[5 : 2 * MIB + 5]
    with pytest.raises(InputError, match=f"{s3}/a: is shorter"):
        files.read("a", len(content) - 3, 4)
    for look in (files.read, files.open, files.fingerprint):
        with pytest.raises(InputError, match=rf"{s3}/(b: there is no such object|b: no such file)"):
            look("b")
    assert files.size("b") is None and files.checksum("b") is None


def test_the_bytes_come_once(s3_proxy: DisturbingProxy, s3: str, bucket: Bucket) -> None:
    bucket.put(f"{s3}/a", bytes_of(20 * MIB))
    S3Files.at(s3).read("a", 0, 20 * MIB)
    assert s3_proxy.down_bytes == 20 * MIB
    assert s3_proxy.operations == {"HeadObject": 1, "GetObject": 3}


def test_sizes(s3: str, bucket: Bucket) -> None:
    for name in ("a", "b/c", "b/d/e", "b/folder/", "bc/f"):
        bucket.put(f"{s3}/{name}", b"x" * len(name))
    bucket.put(f"{s3}x/other", b"")
    for places in (S3Files.at(s3), S3Files.at(f"{s3}/")):
        assert places.sizes() == {"a": 1}
        assert places.sizes(deep=True) == {"a": 1, "b/c": 3, "b/d/e": 5, "bc/f": 4}
        assert places.sizes("b") == {"b/c": 3}
        assert places.sizes("b", deep=True) == {"b/c": 3, "b/d/e": 5}
        assert places.sizes("none") == {} == places.sizes("a")


def test_a_listing_of_many_pages(s3: str, bucket: Bucket) -> None:
    for number in range(7):
        bucket.put(f"{s3}/d{number}/n", b"")
        bucket.put(f"{s3}/n{number}", b"")

    def two_at_once(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 2

    events = s3_requests._requests(os.getpid()).client.meta.events
    events.register("provide-client-params.s3.ListObjectsV2", two_at_once)
    place = S3Files.at(s3).place
    assert len(place.listing("", deep=True)[0]) == 14
    entries, folders = place.listing("", deep=False)
    assert list(entries) == [f"n{i}" for i in range(7)]
    assert folders == [f"d{i}" for i in range(7)]


# One version


LOOKS: dict[str, Callable[[S3Files], Any]] = {
    "size": lambda files: files.size("a"),
    "sizes": lambda files: files.sizes(),
    "read": lambda files: files.read("a", 0, 1),
    "fingerprint": lambda files: files.fingerprint("a"),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("new", [b"two", b"longer", b""])
def test_one_version_is_read(s3: str, bucket: Bucket, look: str, new: bytes) -> None:
    bucket.put(f"{s3}/a", b"one")
    files = S3Files.at(s3)
    LOOKS[look](files)
    before = files.fingerprint("a")
    bucket.put(f"{s3}/a", new)
    with pytest.raises(InputError, match=f"{s3}/a: has changed since"):
        files.read("a")
    with pytest.raises(InputError, match=f"{s3}/a: has changed since"):
        files.open("a").read()
    assert files.size("a") == 3 and files.sizes() == {"a": 3}
    # Who looks for the first time sees the new one, and that it is another one.
    again = S3Files.at(s3)
    assert again.read("a") == new and again.fingerprint("a") != before
    bucket.delete(f"{s3}/a")
    with pytest.raises(InputError, match=f"{s3}/a: there is no such object"):
        files.read("a")


@pytest.mark.slow
def test_one_version_is_read_in_another_process_too(s3: str, bucket: Bucket) -> None:
    for name in ("a", "b"):
        bucket.put(f"{s3}/{name}", b"one")
    files = S3Files.at(s3)
    files.size("a")
    sent = pickle.dumps(files)
    assert len(sent) < 2000
    assert b"secret" not in sent
    for name in ("a", "b"):
        bucket.put(f"{s3}/{name}", b"two")
    code = (
        "import pickle, sys\n"
        "files = pickle.load(sys.stdin.buffer)\n"
        "print(bytes(files.read('b')))\n"
        "files.read('a')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=sent, capture_output=True, env=child_environment()
    )
    assert done.stdout.decode().strip() == "b'two'", done.stderr.decode()
    assert f"InputError: {s3}/a: has changed since".encode() in done.stderr
    assert b"memedit-admin" not in done.stderr


# As a file


def test_a_file_like_any_other(s3: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_files, "_READ_AHEAD_BYTES", 1000)
    content = bytes_of(50_000)
    bucket.put(f"{s3}/a", content)
    chance = random.Random(0)
    with S3Files.at(s3).open("a") as file, io.BytesIO(content) as other:
        assert file.readable() and file.seekable() and not file.writable()
        for _ in range(60):
            whence = chance.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
            offset = chance.randint(0, 30_000) * (-1 if whence == os.SEEK_END else 1)
            size = chance.choice([0, 1, 999, 5_000, 60_000])
            assert file.seek(offset, whence) == other.seek(offset, whence)
            assert file.read(size) == other.read(size)
            assert file.tell() == other.tell()
        assert file.seek(0) == 0 and file.read() == content
        assert file.read(1) == b"" and file.readline() == b""


def test_lines_and_tables(s3: str, bucket: Bucket) -> None:
    table = pa.table({"number": range(10_000), "text": [f"text {i}" for i in range(10_000)]})
    raw = io.BytesIO()
    pq.write_table(table, raw, row_group_size=1000)
    bucket.put(f"{s3}/t.parquet", raw.getvalue())
    with open_file(f"{s3}/t.parquet").open() as file:
        found = pq.ParquetFile(file)
        assert found.read_row_group(7)["number"].to_pylist() == list(range(7_000, 8_000))
        assert found.read() == table
    bucket.put(f"{s3}/facts.jsonl", "é\nzwei\n".encode())
    with open_file(f"{s3}/facts.jsonl").open() as file:
        assert list(io.TextIOWrapper(file, "utf-8")) == ["é\n", "zwei\n"]


# As a folder


def test_side_files_are_fetched_once(
    s3_proxy: DisturbingProxy, s3: str, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put(f"{s3}/config.json", b"{}")
    bucket.put(f"{s3}/sub/a", b"text")
    names = ["config.json", "sub/a"]
    folder = S3Files.at(s3, cache=tmp_path).folder(names)
    assert folder.is_relative_to(tmp_path)
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "sub" / "a").read_bytes() == b"text"
    assert s3_proxy.operations["GetObject"] == 2
    s3_proxy.forget()
    assert S3Files.at(s3, cache=tmp_path).folder(reversed(names)) == folder
    assert s3_proxy.operations == {"HeadObject": 2}
    # Another version of one of them is another folder.
    bucket.put(f"{s3}/config.json", b"[]")
    other = S3Files.at(s3, cache=tmp_path).folder(names)
    assert other != folder and (other / "config.json").read_bytes() == b"[]"
    assert (folder / "config.json").read_bytes() == b"{}"
    # Without a cache, or where it cannot be written to, the process has a folder of its own.
    blocked = tmp_path / "file"
    blocked.touch()
    for cache in (None, blocked):
        elsewhere = S3Files.at(s3, cache=cache).folder(names)
        assert not elsewhere.is_relative_to(tmp_path)
        assert (elsewhere / "sub" / "a").read_bytes() == b"text"
    assert not [p.name for p in (tmp_path / "side-files").iterdir() if "partial" in p.name]


def test_hostile_names_are_refused(
    s3: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    for name in ("../outside", "a/../../outside", "/outside", "a\\..\\outside", "a\0b", ""):
        entry = Entry(size_bytes=1, etag='"e"')
        files = S3Files(Place.of(s3), cache, _seen={name: entry})
        with pytest.raises(InputError, match=rf"{s3}/.*: is not the name of a file"):
            files.folder([name])
    monkeypatch.setattr(s3_files, "_LARGEST_SIDE_FILE_BYTES", 3)
    bucket.put(f"{s3}/big", b"1234")
    with pytest.raises(InputError, match=f"{s3}/big: 4 bytes, too many"):
        S3Files.at(s3, cache=cache).folder(["big"])
    assert not list(tmp_path.rglob("*outside*")) and not cache.exists()
