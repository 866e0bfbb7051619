"""A job at `s3://` in which the tests of bad input change one thing."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memedit.checkpoint import INDEX_NAME
from memedit.manifest import (
    MANIFEST_NAME,
    FactsIdentity,
    Manifest,
    ModelIdentity,
    manifest_bytes,
)
from tests.s3.objects import Objects
from tests.s3.server import Identity, SeaweedServer
from tests.workflows.runs import Ran, contents, edit

EDITED = "model.layers.1.mlp.down_proj.weight"
SHARD = "model-00002-of-00006.safetensors"
KEYS = "AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG"
"""Part of a location that somebody put his keys into."""
PASSWORD = "p4ssw0rd0fTheEndpoint"


@dataclass(kw_only=True)
class World:
    """A job at `s3://` that would go well; a case changes one thing in it."""

    objects: Objects
    server: SeaweedServer
    environment: Callable[[dict[str, str]], None]
    folder: Path
    place: str
    base: str
    facts: str
    out: str
    cache: Path
    more: list[object] = field(default_factory=list)

    def run(self) -> Ran:
        return edit(self.base, self.facts, self.out, self.cache, *self.more)

    @property
    def secrets(self) -> set[str]:
        """All that must not be seen: what the environment holds, and what its owner typed."""
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        typed = KEYS.partition(":")[2]
        return {
            *filter(None, map(os.environ.get, names)),
            *(self.server.admin.secret_key, self.server.reader.secret_key),
            *(typed, typed.replace("/", ""), PASSWORD),
        }

    def here(self, *runs: Ran) -> dict[str, bytes]:
        """What runs said, and what lies on this machine, the cache among it."""
        said = {
            f"{name} {i}": getattr(ran, name).encode()
            for i, ran in enumerate(runs)
            for name in ("stdout", "stderr")
        }
        return said | {f"here {n}": content for n, content in contents(self.folder).items()}

    def places(self, *runs: Ran) -> dict[str, bytes]:
        """That, and what lies in the bucket."""
        there = {f"s3 {n}": content for n, content in self.objects.below(self.place).items()}
        marks = self.objects.metadata(self.place)
        about = {f"metadata {n}": repr(marks[n]).encode() for n in marks}
        return self.here(*runs) | there | about

    def use(self, identity: Identity, **more: str) -> None:
        self.environment({**self.server.environment(identity=identity), **more})

    def put(self, name: str, content: bytes) -> str:
        return self.objects.put(f"{self.place}/{name}", content)

    def index(self, change: Callable[[dict[str, str]], object]) -> None:
        index = json.loads(self.objects.get(f"{self.base}/{INDEX_NAME}"))
        change(index["weight_map"])
        self.objects.put(f"{self.base}/{INDEX_NAME}", json.dumps(index).encode())

    def header(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Another header in front of the tensors of a shard."""
        raw = self.objects.get(f"{self.base}/{SHARD}")
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        change(header)
        new = json.dumps(header).encode()
        self.objects.put(
            f"{self.base}/{SHARD}", struct.pack("<Q", len(new)) + new + raw[8 + size :]
        )

    def delta(self) -> None:
        """The job is to edit a delta."""
        manifest = Manifest(
            run_id="x",
            method="memit",
            model=ModelIdentity(name="smollm2", digest="0" * 64),
            layers=(1,),
            facts=FactsIdentity(digest="0" * 64, file="facts.jsonl", count=1),
            format="delta",
        )
        self.put(f"delta/{MANIFEST_NAME}", manifest_bytes(manifest))
        self.base = f"{self.place}/delta"

    def stats(self, **changes: Any) -> None:
        """The job uses the second moments that lie there; `changes` win over their stats.json."""
        name = f"{self.place}/stats/stats.json"
        self.objects.put(name, json.dumps(json.loads(self.objects.get(name)) | changes).encode())
        self.more += ["--stats", f"{self.place}/stats"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is wrong, and what the error must say."""

    change: Callable[[World], object]
    says: str
    source: str = ""
    """The end of the object's location."""
    row: int | None = None
    field: str | None = None
    code: int = 2
    kind: str = "InputError"
    never_says: str = "Traceback"
