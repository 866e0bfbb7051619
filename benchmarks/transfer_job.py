"""One file read, downloaded or uploaded by memedit, in a process of its own.

    python -m benchmarks.transfer_job '{"work": "read", "base": "s3://…", "name": …}'

Prints the seconds of the transfer as JSON; the client and a first connection are made before.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.s3 import Place
from cluster.s3_sink import S3Sink
from cluster.store import open_files
from memedit.files import File, LocalFiles
from memedit.patching import LocalSink


def read(*, base: str, name: str) -> dict[str, float]:
    """Read an object into memory, as a weight is read."""
    files = open_files(base)
    size = files.size(name)
    assert size is not None
    clock = Clock()
    raw: Any = torch.empty(size, dtype=torch.uint8).numpy()
    files.read_into(name, 0, memoryview(raw))
    return clock.taken()


def download(*, base: str, name: str, out: str) -> dict[str, float]:
    """Download an object to a folder, as an unchanged shard is; it is hashed too."""
    files = open_files(base)
    files.size(name)
    sink = LocalSink(Path(out))
    clock = Clock()
    sink.copy(File(files, name), None)
    return clock.taken()


def upload(*, base: str, name: str, out: str) -> dict[str, float]:
    """Upload a file, as an unchanged shard is; it is hashed too."""
    place = Place.of(out)
    place.head(name)
    sink = S3Sink(place)
    clock = Clock()
    sink.copy(File(LocalFiles(Path(base)), name), None)
    return clock.taken()


class Clock:
    """Wall time and this process's own time on the processor, from its making on."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def taken(self) -> dict[str, float]:
        """Seconds so far."""
        return {
            "transfer_s": time.perf_counter() - self._wall,
            "transfer_cpu_s": time.process_time() - self._cpu,
        }


WORKS: Mapping[str, Callable[..., dict[str, float]]] = {
    "read": read,
    "download": download,
    "upload": upload,
}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(WORKS[arguments.pop("work")](**arguments)))
