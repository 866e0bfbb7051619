"""Reading a base or publishing from it, in a process of its own, so that it is weighed alone.

    python -m benchmarks.publish_job '{"work": "publish", "base": "s3://…", "out": "s3://…", …}'

Prints what it measured as JSON. The process holds what `memedit edit` and `memedit apply` hold when
they publish: torch, transformers and the updates as factors.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shapes import made_updates
from cluster.publication import open_publication
from cluster.s3 import Place
from cluster.s3_files import S3Files
from cluster.store import is_remote, open_files
from memedit.checkpoint import Checkpoint
from memedit.checksums import FileRecord
from memedit.files import File
from memedit.manifest import FactsIdentity, Manifest, ModelIdentity
from memedit.patching import Sink, write_patched
from workflows.product import patches_of


@dataclass(frozen=True)
class Noted(S3Files):
    """Objects under a prefix; notes what is read of them."""

    reads: list[tuple[str, int, int]] = field(default_factory=list, compare=False)
    """(name, start, size)."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """See `Files`."""
        self.reads.append((name, start, len(buffer)))
        super().read_into(name, start, buffer)


@dataclass
class Timed(Sink):
    """Another sink; adds up how long patching takes, which goes on shard by shard."""

    sink: Sink
    patching_s: float = 0.0

    def copy(self, source: File, known: FileRecord | None) -> FileRecord:
        """See `Sink`."""
        return self.sink.copy(source, known)

    def patch(
        self,
        source: File,
        ranges: Sequence[tuple[int, int]],
        edits: Iterator[tuple[int, memoryview]],
    ) -> FileRecord:
        """See `Sink`."""
        started = time.perf_counter()
        try:
            return self.sink.patch(source, ranges, edits)
        finally:
            self.patching_s += time.perf_counter() - started


def identify(*, base: str, cache: str) -> dict[str, Any]:
    """Read every byte once, as the first edit of a base does, and remember what it is."""
    started = time.perf_counter()
    checkpoint = Checkpoint.open(open_files(base), cache=Path(cache))
    checkpoint.check_finite()
    return {"digest": checkpoint.digest, "seconds": time.perf_counter() - started}


def publish(*, base: str, out: str, cache: str, names: list[str], rank: int) -> dict[str, Any]:
    """Publish a base with some tensors patched, as `memedit edit` does once it has the updates."""
    memory = {"imports": resident_bytes("VmRSS")}
    began = time.perf_counter()
    files = Noted(Place.of(base), Path(cache)) if is_remote(base) else open_files(base)
    checkpoint = Checkpoint.open(files, cache=Path(cache))
    digest = checkpoint.digest
    opened = time.perf_counter()
    updates = made_updates({name: checkpoint.info(name).shape for name in names}, rank=rank)
    memory["updates"] = resident_bytes("VmRSS")
    started = time.perf_counter()
    with open_publication(out, run_id="benchmark") as publication:
        sink = Timed(publication.sink)
        patches = patches_of(updates, transposed=False)
        patched = write_patched(checkpoint, sink, patches)
        written = time.perf_counter()
        publication.publish(
            Manifest(
                run_id="benchmark",
                method="memit",
                model=ModelIdentity(name=base, digest=digest),
                layers=tuple(range(len(names))),
                facts=FactsIdentity(digest="0" * 64, file="facts.jsonl", count=rank),
                files=patched.files,
                tensors=patched.tensors,
            )
        )
        published = time.perf_counter()
    ended = time.perf_counter()
    return {
        "open_s": opened - began,
        "patch_s": sink.patching_s,
        "copy_s": written - started - sink.patching_s,
        "commit_s": published - written,
        "publish_s": ended - started,
        "memory_bytes": memory | {"peak": resident_bytes("VmHWM")},
        "edited_bytes": sum(checkpoint.info(name).size_bytes for name in names),
        "largest_edited_bytes": max(checkpoint.info(name).size_bytes for name in names),
        "size_bytes": checkpoint.size_bytes,
        "shards": len(checkpoint.shards),
        "rewritten_bytes": sum(patched.files[shard].size_bytes for shard in patched.rewritten),
        "sha256": {name: patched.tensors[name].sha256 for name in names},
        "read_bytes": sorted_reads(checkpoint, names, files.reads)
        if isinstance(files, Noted)
        else None,
    }


def sorted_reads(
    checkpoint: Checkpoint, names: Sequence[str], reads: Sequence[tuple[str, int, int]]
) -> dict[str, int]:
    """Bytes that were read: of headers, of the tensors `names`, beside those, of other files."""
    starts: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        starts[info.shard] = min(info.offset, starts.get(info.shard, info.offset))
    edited = [checkpoint.info(name) for name in names]
    found = {"headers": 0, "edited": 0, "slack": 0, "other files": 0}
    header_read: set[str] = set()
    for shard, start, size in reads:
        if shard not in starts:
            kind = "other files"
        elif start < starts[shard] and (start or shard not in header_read):
            # Only the first read of a header is one; what a part takes along comes later.
            header_read.add(shard)
            kind = "headers"
        elif any(
            i.shard == shard and i.offset <= start and start + size <= i.offset + i.size_bytes
            for i in edited
        ):
            kind = "edited"
        else:
            kind = "slack"
        found[kind] += size
    return found


def resident_bytes(what: str) -> int:
    """This process's resident memory (VmRSS), or the most that it has been (VmHWM).

    Not `ru_maxrss`: that one begins with what the parent held when it started this process.
    """
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "Linux only"
    return int(found[1]) * 1024


WORKS: Mapping[str, Callable[..., dict[str, Any]]] = {"identify": identify, "publish": publish}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(WORKS[arguments.pop("work")](**arguments)))
