"""`memedit verify`: which base a version is compared with, and what is told of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.s3_requests import forget_client
from memedit.checkpoint import Checkpoint
from memedit.manifest import ModelIdentity, write_manifest
from memedit.patching import LocalSink, write_patched
from tests.memedit.test_manifest import manifest_of
from tests.memedit.test_verify import flip, relist
from tests.patches import each_row
from tests.s3.fixtures import use_aws_environment
from tests.tiny import save_tiny
from tests.workflows.runs import Ran, memedit

EDITED = "model.layers.1.mlp.down_proj.weight"
BESIDE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base", max_shard_size="100KB")


@pytest.fixture
def version(base: Path, tmp_path: Path) -> Path:
    """A version that names its base, without links to it."""
    return publish(base, tmp_path / "version", str(base))


def publish(base: Path, folder: Path, name: str) -> Path:
    folder.mkdir()
    checkpoint = Checkpoint.open(base)
    patched = write_patched(checkpoint, LocalSink(folder), {EDITED: each_row(torch.neg)})
    for path in list(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    model = ModelIdentity(name=name, digest=checkpoint.digest)
    write_manifest(folder, manifest_of(model=model, files=patched.files, tensors=patched.tensors))
    return folder


def verify(version: Path, *more: object) -> Ran:
    return memedit("verify", version, "--json", "--cache", version.parent / "cache", *more)


def kinds(ran: Ran) -> list[str]:
    assert ran.code == 1, ran.stderr
    return [problem["kind"] for problem in json.loads(ran.stdout)["problems"]]


def wrong_copy(version: Path) -> None:
    """A tensor that was not edited is another, and was when the version was published."""
    relist(version, flip(version, BESIDE))


def test_the_base_that_the_version_names_is_compared_with(version: Path, base: Path) -> None:
    result = verify(version).result
    assert result == {
        "ok": True,
        "version": str(version),
        "run_id": "20260101-abc",
        "format": "full",
        "files": len(list(version.iterdir())) - 1,
        "tensors": 1,
        "base": str(base),
        "problems": [],
    }
    wrong_copy(version)
    assert kinds(verify(version)) == ["base"]
    assert kinds(verify(version, "--base", base)) == ["base"]
    assert verify(version, "--quick").result["base"] is None


def test_people_are_told_each_problem(version: Path) -> None:
    shard = flip(version, EDITED)
    ran = memedit("verify", version, "--cache", version.parent / "cache")
    assert ran.code == 1
    assert shard in ran.stdout and "edited tensor" in ran.stdout


def test_a_base_that_has_gone_elsewhere(version: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "moved")
    wrong_copy(version)
    ran = verify(version)
    assert ran.result["base"] is None
    assert f"The base {base} is not at hand" in ran.stderr and "--base" in ran.stderr
    assert kinds(verify(version, "--base", tmp_path / "moved")) == ["base"]


@pytest.mark.parametrize("damage", ["another", "truncated", "no model"])
def test_a_base_that_is_not_what_it_was(version: Path, base: Path, damage: str) -> None:
    if damage == "another":
        flip(base, BESIDE)
    elif damage == "truncated":
        shard = base / Checkpoint.open(base).shard_of(EDITED)
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shutil.rmtree(base)
        base.mkdir()
    ran = verify(version)
    assert ran.result["base"] is None and str(base) in ran.stderr
    # Whoever asks for it must know.
    ran = verify(version, "--base", base)
    assert ran.code == 2 and ran.error["source"].startswith(str(base))
    if damage == "another":
        assert ran.error["field"] == "base"


def test_a_base_that_was_never_there(version: Path, tmp_path: Path) -> None:
    ran = verify(version, "--base", tmp_path / "absent")
    assert (ran.code, ran.error["source"]) == (2, str(tmp_path / "absent"))


def test_a_base_of_the_hub_is_not_fetched_for_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("was asked for")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    version = publish(base, tmp_path / "version", "org/model")
    ran = verify(version)
    assert ran.result["base"] is None and "org/model is not at hand" in ran.stderr


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys for an object storage that does not answer."""
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "key")
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "MEMEDIT_S3_PATIENCE_S": "0.1"}
    use_aws_environment(monkeypatch, {**keys, **nobody})
    yield
    forget_client()


@pytest.mark.usefixtures("away")
def test_a_base_in_a_storage_that_is_away(base: Path, tmp_path: Path) -> None:
    """The version is here, and what can be said of it is said."""
    version = publish(base, tmp_path / "version", "s3://bucket/model")
    assert verify(version, "--base", "s3://bucket/model").code == 1
    ran = verify(version)
    assert ran.result["base"] is None and "s3://bucket/model" in ran.stderr
