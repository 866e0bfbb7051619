"""Checkpoints on a real S3 server: damage is named, and no more is read than is needed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.store import open_files
from memedit.checkpoint import Checkpoint
from memedit.errors import InputError
from memedit.files import LocalFiles
from memedit.model import ModelSpec, load_model
from tests.cluster.s3_places import Bucket
from tests.s3.proxy import DisturbingProxy
from tests.s3.server import SeaweedServer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Bucket:
    return Bucket(s3_server)


def shard_of(header: object, data: bytes = b"", *, claimed: int | None = None) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data


def tensor(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


HOSTILE: dict[str, tuple[dict[str, bytes], str, str]] = {
    "a header of 2^60 bytes": (
        {"model.safetensors": shard_of({}, claimed=1 << 60)},
        "model.safetensors",
        f"claims {1 << 60} bytes",
    ),
    "overlapping offsets": (
        {"model.safetensors": shard_of({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12))},
        "model.safetensors",
        "overlap",
    ),
    "a shard in another folder": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "../other.safetensors"}}'},
        "model.safetensors.index.json",
        "is not the name of a .safetensors file",
    ),
    "an index that disagrees": (
        {
            "model.safetensors.index.json": b'{"weight_map": {"a": "1.safetensors"}}',
            "1.safetensors": shard_of({"b": tensor(0, 1)}, b"x"),
        },
        "1.safetensors",
        "disagrees with",
    ),
    "an index with more": (
        {
            "model.safetensors.index.json": b'{"weight_map": {"a": "1.safetensors",'
            b' "b": "1.safetensors"}}',
            "1.safetensors": shard_of({"a": tensor(0, 1)}, b"x"),
        },
        "1.safetensors",
        "lacks it",
    ),
    "a shard that is missing": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "1.safetensors"}}'},
        "model.safetensors.index.json",
        "missing",
    ),
    "a shard that breaks off": (
        {"model.safetensors": shard_of({"a": tensor(0, 100)}, bytes(99))},
        "model.safetensors",
        "truncated",
    ),
    "an empty shard": ({"model.safetensors": b""}, "model.safetensors", "truncated"),
    "no JSON": ({"model.safetensors.index.json": b"\xff"}, "model.safetensors.index", "not JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_refused_by_name(s3: str, bucket: Bucket, name: str) -> None:
    objects, culprit, says = HOSTILE[name]
    bucket.put(f"{s3}/config.json", b"{}")
    for key, content in objects.items():
        bucket.put(f"{s3}/{key}", content)
    with pytest.raises(InputError, match=says) as caught:
        Checkpoint.open(open_files(s3))
    assert str(caught.value).startswith(f"{s3}/{culprit}")


def test_nothing_there(s3: str, bucket: Bucket) -> None:
    with pytest.raises(InputError, match=f"{s3}: nothing lies here"):
        Checkpoint.open(open_files(s3))
    with pytest.raises(InputError, match=r"s3://no-such-bucket/a.*: there is no such bucket"):
        Checkpoint.open(open_files("s3://no-such-bucket/a"))


@pytest.mark.slow
def test_a_model_is_loaded_and_no_more_than_is_needed(
    s3_proxy: DisturbingProxy, s3: str, bucket: Bucket, tmp_path: Path
) -> None:
    model = tiny_model("llama", hidden_size=256, intermediate_size=512)
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    tiny_tokenizer().save_pretrained(tmp_path)
    bucket.put_folder(tmp_path, s3)
    local, remote = LocalFiles(tmp_path), open_files(s3)
    base = Checkpoint.open(remote)
    assert len(base.shards) > 3 and base.digest == Checkpoint.open(local).digest
    headers_bytes = len(base.shards) * (1 << 16)
    for until_layer in (None, 1):
        here = load_model(ModelSpec(files=local, until_layer=until_layer)).model.state_dict()
        s3_proxy.forget()
        there = load_model(ModelSpec(files=open_files(s3), until_layer=until_layer))
        assert here.keys() == there.model.state_dict().keys()
        assert all(torch.equal(here[k], t) for k, t in there.model.state_dict().items())
        needed = sum(base.info(name).size_bytes for name in here if name in base.tensors)
        beside = sum(n for name, n in base.files.sizes().items() if name not in base.shards)
        xml_bytes = 20_000
        assert needed < s3_proxy.down_bytes < needed + headers_bytes + 2 * beside + xml_bytes
    assert needed < 0.7 * base.size_bytes
