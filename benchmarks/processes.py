"""Processes that are timed, and a real S3 server in a folder that goes away with it.

Every transfer runs in a process of its own, as a person runs it. The seconds of the processor are
those of the client alone; the server's are nobody's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.s3.server import FOREIGN_VARIABLES, HOST, SeaweedServer

ROOT = Path(__file__).resolve().parents[1]
AWS = Path(sys.executable).with_name("aws")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a process took, and what it printed."""

    wall_s: float
    cpu_s: float
    printed: str


def run(words: Sequence[str | os.PathLike[str]], variables: Mapping[str, str]) -> Ran:
    """Run a program with these variables beside the usual ones; it ends with this process.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=printed, stderr=said, cwd=ROOT, env={**kept, **variables}
        )
        try:
            # wait4 gives the usage of this one process; getrusage(RUSAGE_CHILDREN) mixes all.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        printed.seek(0)
        if process.returncode:
            raise RuntimeError(f"{words[0]} ended with {process.returncode}: {said.read()}")
        return Ran(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime, printed=printed.read())


def job(module: str, variables: Mapping[str, str], **arguments: Any) -> dict[str, Any]:
    """Run a module of this folder; what it printed, and what its process took."""
    words = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(arguments)]
    ran = run(words, variables)
    return {**json.loads(ran.printed), "wall_s": ran.wall_s, "cpu_s": ran.cpu_s}


def aws_copy(variables: Mapping[str, str], *words: str) -> Ran:
    """Run `aws s3 cp` with its own defaults."""
    return run([AWS, "s3", "cp", "--only-show-errors", *words], variables)


@contextmanager
def s3_server(data: Path) -> Iterator[SeaweedServer]:
    """A server that keeps its objects in `data` until the block ends."""
    with ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(dir=data, prefix="s3-"))
        yield undo.enter_context(SeaweedServer(Path(folder), bucket="benchmark"))


def forget_objects(server: SeaweedServer, prefix: str) -> None:
    """Delete what lies under a prefix, and let the server free the room."""
    s3 = server.client()
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=server.bucket, Prefix=prefix)
    for key in [found["Key"] for page in pages for found in page.get("Contents", ())]:
        s3.delete_object(Bucket=server.bucket, Key=key)
    time.sleep(2)  # the server deletes what objects are made of a moment later
    address = f"http://{HOST}:{server.port + 1}/vol/vacuum?garbageThreshold=0.01"
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    without_proxy.open(address, timeout=120).read()


def disk_bytes(folder: Path) -> int:
    """What a folder takes of the disk: holes nothing, a file with two names no more than once."""
    seen = {(s.st_dev, s.st_ino): s.st_blocks * 512 for s in map(os.lstat, folder.rglob("*"))}
    return sum(seen.values())
