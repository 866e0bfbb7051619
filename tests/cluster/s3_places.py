"""What tests of S3 need beside a server: objects put and seen without the code under test."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.publication import Publication, open_publication
from memedit.checkpoint import Checkpoint
from memedit.manifest import Manifest
from memedit.patching import PatchedFiles, write_patched
from tests.memedit.test_manifest import manifest_of
from tests.patches import each_row
from tests.s3.objects import Objects
from tests.s3.server import SeaweedServer
from tests.tiny import tiny_model, tiny_tokenizer

MIB = 1 << 20


def bytes_of(size: int, seed: int = 0) -> bytes:
    """Random bytes, quickly."""
    return np.random.default_rng(seed).bytes(size)


class Bucket(Objects):
    """The server's bucket by a client of its own, which never goes through the proxy."""

    def __init__(self, server: SeaweedServer) -> None:
        super().__init__(server)
        self._plain = server.client(request_checksum_calculation="when_required")

    def put_without_checksum(self, location: str, content: bytes) -> None:
        """As an older program writes, which tells the storage no checksum."""
        self._plain.put_object(Bucket=self.bucket, Key=self._key(location), Body=content)

    def head(self, location: str) -> Mapping[str, Any]:
        return self.client.head_object(
            Bucket=self.bucket, Key=self._key(location), ChecksumMode="ENABLED"
        )

    def named(self, location: str) -> set[str]:
        """Names below a location, relative to it."""
        return set(self.names(location))

    def uploads_to(self, location: str) -> list[str]:
        """Keys below a location whose upload began and did not end."""
        return [key for key in self.uploads() if key.startswith(f"{self._key(location)}/")]

    def is_clean(self, location: str) -> bool:
        """Whether nothing lies below a location, and nothing is under way to it."""
        return not self.names(location) and not self.uploads_to(location)

    def flip(self, location: str, position: int) -> None:
        """Change one byte of an object, as somebody would who has the keys."""
        content = bytearray(self.get(location))
        content[position] ^= 1
        self.put(location, bytes(content))


def saved_model(folder: Path, *, layers: int, max_shard_size: str) -> Checkpoint:
    """A model that transformers loads, in shards so large that some are made of parts."""
    model = tiny_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=layers)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return Checkpoint.open(folder)


def write(base: Checkpoint, publication: Publication, edited: Iterable[str]) -> PatchedFiles:
    """Write a version with these tensors negated."""
    patches = {name: each_row(torch.neg) for name in edited}
    return write_patched(base, publication.sink, patches)


def publish(
    base: Checkpoint, out: str, edited: Iterable[str], *, run_id: str = "run-1", **options: Any
) -> Manifest:
    """Publish a version with these tensors negated, and a report."""
    with open_publication(out, run_id=run_id, **options) as publication:
        patched = write(base, publication, edited)
        (publication.staging / "report.html").write_text("<html>")
        return publication.publish(
            manifest_of(run_id=run_id, files=patched.files, tensors=patched.tensors)
        )


def child_environment() -> dict[str, str]:
    """For a Python of its own that imports the project and the tests."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
