"""A job at `s3://`, and a model to be published there, for the tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memedit.checkpoint import Checkpoint
from memedit.manifest import MANIFEST_NAME
from tests.cluster.s3_places import Bucket, publish, saved_model
from tests.faults.s3_publisher import EDITED
from tests.faults.s3_world import World
from tests.s3.fixtures import use_aws_environment
from tests.s3.objects import Objects
from tests.s3.server import SeaweedServer
from tests.tiny import save_tiny
from tests.workflows.runs import stats, without_plots, write_rows


@pytest.fixture(scope="session")
def s3_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("input")
    save_tiny(folder / "base")
    write_rows(folder / "facts.jsonl")
    with tempfile.TemporaryDirectory() as cache:
        assert stats(folder / "base", folder / "stats", Path(cache)).code == 0
    return folder


@pytest.fixture
def s3_world(
    s3_input: Path,
    s3: str,
    s3_server: SeaweedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    without_plots(monkeypatch)
    objects = Objects(s3_server)
    objects.put_folder(s3_input, s3)
    yield World(
        objects=objects,
        server=s3_server,
        environment=lambda variables: use_aws_environment(monkeypatch, variables),
        folder=tmp_path,
        place=s3,
        base=f"{s3}/base",
        facts=f"{s3}/facts.jsonl",
        out=f"{s3}/out",
        cache=tmp_path / "cache",
    )
    objects.clear(s3)  # whoever lists the bucket next is glad


# A model of which one shard is made of parts and one is copied, as test_s3_faults.py and
# test_s3_kill.py publish it.


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Bucket:
    return Bucket(s3_server)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    base = saved_model(tmp_path_factory.mktemp("base"), layers=1, max_shard_size="15MB")
    assert len(base.shards) == 2 and base.info(EDITED[0]).offset > 5 << 20
    return base


@pytest.fixture(scope="session")
def base_location(base: Checkpoint, s3_server: SeaweedServer) -> Iterator[str]:
    """The base on the server; a test that changes it changes a copy."""
    bucket = Bucket(s3_server)
    location = f"s3://{bucket.bucket}/the-base-of-faults"
    assert base.files.here is not None
    bucket.put_folder(base.files.here, location)
    yield location
    if s3_server.process_id is not None:
        for name in bucket.names(location):
            bucket.delete(f"{location}/{name}")


@pytest.fixture(scope="session")
def expected(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the version, as a folder gets them; without the manifest."""
    out = tmp_path_factory.mktemp("expected") / "out"
    publish(base, str(out), EDITED)
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != MANIFEST_NAME}
