"""memedit's readers and writers against `aws s3 cp`: the same file, the same server, in turns.

Three pairs: a file uploaded by both; an object downloaded to a disk by both; and an object read
into memory by memedit, as it reads weights, against the same download. memedit hashes what it
uploads and downloads (sha256), as a manifest needs; aws does not. Does not know how results are
shown.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.processes import aws_copy, forget_objects, job, s3_server

NAME = "file.safetensors"
LEAST_SHARE = 0.8


def compare_throughput(data: Path, *, size_mb: int, rounds: int) -> dict[str, Any]:
    """Transfer one file in turns: A B C, C B A, …; a first round warms up and is dropped."""
    size_bytes = size_mb * 1_000_000
    with tempfile.TemporaryDirectory(dir=data, prefix="file-") as made, s3_server(data) as server:
        folder, target = Path(made) / "from", Path(made) / "to"
        folder.mkdir()
        _write_random(folder / NAME, size_bytes)
        (folder / "byte").write_bytes(b"1")
        variables, root = server.environment(), f"s3://{server.bucket}"
        there = f"{root}/there"
        aws_copy(variables, str(folder / NAME), f"{there}/{NAME}")

        def aws(*words: str) -> dict[str, Any]:
            ran = aws_copy(variables, *words)
            return {"wall_s": ran.wall_s, "cpu_s": ran.cpu_s}

        def memedit(work: str, **arguments: str) -> dict[str, Any]:
            return job("transfer_job", variables, work=work, name=NAME, **arguments)

        turns: dict[str, Callable[[], dict[str, Any]]] = {
            "aws upload": lambda: aws(str(folder / NAME), f"{root}/new/aws/{NAME}"),
            "memedit upload": lambda: memedit(
                "upload", base=str(folder), out=f"{root}/new/memedit"
            ),
            "aws download": lambda: aws(f"{there}/{NAME}", str(target / NAME)),
            "memedit download": lambda: memedit("download", base=there, out=str(target)),
            "memedit read": lambda: memedit("read", base=there),
            "aws start-up": lambda: aws(str(folder / "byte"), f"{root}/new/byte"),
        }
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
        for number in range(rounds + 1):
            for name in list(turns)[:: -1 if number % 2 else 1]:
                target.mkdir()
                os.sync()  # nobody writes back what another left
                bytearray(4 * size_bytes + (1 << 30))  # memory that the host has yet to give
                found = turns[name]()
                if name.endswith("download"):
                    _check_size(target / NAME, size_bytes)
                shutil.rmtree(target)
                if number:
                    taken[name].append(found)
                    print(f"round {number}, {name}: {found['wall_s']:.2f} s")
            forget_objects(server, "new/")
    summary = _summary(taken, size_bytes)
    return {"size_bytes": size_bytes, "rounds": rounds, **summary, "turns": taken}


def _summary(taken: dict[str, list[dict[str, Any]]], size_bytes: int) -> dict[str, Any]:
    """MB/s by the medians, with and without what the programs need to start; shares of aws's."""
    start_s, start_cpu_s = (
        median(each[unit] for each in taken["aws start-up"]) for unit in ("wall_s", "cpu_s")
    )

    def rates(name: str) -> dict[str, float]:
        wall_s = median(each["wall_s"] for each in taken[name])
        if name.startswith("aws"):
            transfer_s = wall_s - start_s
            cpu_s = median(each["cpu_s"] for each in taken[name]) - start_cpu_s
        else:
            transfer_s = median(each["transfer_s"] for each in taken[name])
            cpu_s = median(each["transfer_cpu_s"] for each in taken[name])
        return {
            "mb_per_s": size_bytes / transfer_s / 1e6,
            "mb_per_s_with_start_up": size_bytes / wall_s / 1e6,
            "client_cpu_s_per_gb": cpu_s / size_bytes * 1e9,
        }

    found = {name: rates(name) for name in taken if name != "aws start-up"}
    shares = {}
    for what, beside in (("upload", "upload"), ("download", "download"), ("read", "download")):
        mine, aws = found[f"memedit {what}"], found[f"aws {beside}"]
        share = mine["mb_per_s"] / aws["mb_per_s"]
        shares[what] = {
            "share": share,
            "share_of_aws_with_its_start_up": mine["mb_per_s"] / aws["mb_per_s_with_start_up"],
            "share_both_with_start_up": mine["mb_per_s_with_start_up"]
            / aws["mb_per_s_with_start_up"],
            "met": share >= LEAST_SHARE,
        }
    own_start_s = median(
        each["wall_s"] - each["transfer_s"]
        for turns in taken.values()
        for each in turns
        if "transfer_s" in each
    )
    return {
        "sides": found,
        "shares": shares,
        "start_up_s": {"aws": start_s, "memedit": own_start_s},
    }


def _write_random(path: Path, size_bytes: int) -> None:
    random = torch.Generator().manual_seed(0)
    with path.open("xb") as file:
        while (left := size_bytes - file.tell()) > 0:
            size = min(left, 1 << 24)
            piece: Any = torch.randint(0, 256, (size,), generator=random, dtype=torch.uint8).numpy()
            file.write(memoryview(piece))


def _check_size(path: Path, size_bytes: int) -> None:
    if (found := path.stat().st_size) != size_bytes:
        raise RuntimeError(f"{path} has {found} of {size_bytes} bytes")
