"""The time of publishing against download-edit-upload of the whole, in turns on one server.

Each side runs in processes of its own. Does not know how results are shown.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import aws_copy, disk_bytes, forget_objects, job
from benchmarks.publish_material import Material, at, memory_of
from benchmarks.shapes import made_updates, neox_20b
from memedit.checkpoint import Checkpoint
from memedit.patching import PatchedTensor
from tests.s3.server import SeaweedServer
from workflows.product import patches_of


def beside_whole_copy(
    data: Path, server: SeaweedServer, material: Material, *, cache: str, rank: int, rounds: int
) -> dict[str, Any]:
    """Memedit and download-edit-upload in turns (A B, B A, …), without a proxy."""
    base = at(server, material.prefix)
    taken: dict[str, list[dict[str, Any]]] = {"memedit": [], "whole copy": []}
    start_ups = [aws_start_up(server, data) for _ in range(3)]
    disk = 0
    for number in range(rounds):
        for side in sorted(taken, reverse=bool(number % 2)):
            os.sync()
            if side == "memedit":
                found = job(
                    "publish_job",
                    server.environment(),
                    work="publish",
                    base=base,
                    out=at(server, "published"),
                    cache=cache,
                    names=material.names,
                    rank=rank,
                )
            else:
                found = copy_whole(data, server, material, rank=rank)
            taken[side].append(found)
            disk = max(disk, disk_bytes(server.folder))
            print(f"round {number + 1}, {side}: {found['wall_s']:.1f} s")
            forget_objects(server, "published")
    if taken["memedit"][0]["sha256"] != taken["whole copy"][0]["sha256"]:
        raise RuntimeError("the two sides did not make the same tensors")
    memedit_s = median(each["wall_s"] for each in taken["memedit"])
    whole_s = median(each["wall_s"] for each in taken["whole copy"])
    # Both without what their programs need to start.
    inner_s = median(each["open_s"] + each["publish_s"] for each in taken["memedit"])
    whole_inner_s = whole_s - 2 * median(start_ups)
    return {
        "memedit_s": memedit_s,
        "whole_copy_s": whole_s,
        "ratio": whole_s / memedit_s,
        "memedit_without_start_up_s": inner_s,
        "whole_copy_without_start_up_s": whole_inner_s,
        "ratio_without_start_up": whole_inner_s / inner_s,
        "aws_start_up_s": median(start_ups),
        "estimate_for_46_shards": estimate(taken, median(start_ups)),
        "memory": memory_of(taken["memedit"][0]),
        "server_disk_bytes": disk,
        "rounds": taken,
    }


def copy_whole(
    data: Path, server: SeaweedServer, material: Material, *, rank: int
) -> dict[str, Any]:
    """Download all, patch the files in place, upload all."""
    variables = server.environment()
    with tempfile.TemporaryDirectory(dir=data, prefix="whole-") as folder:
        down = aws_copy(variables, "--recursive", at(server, material.prefix), folder)
        base = Checkpoint.open(Path(folder))
        shapes = {name: base.info(name).shape for name in material.names}
        patches = patches_of(made_updates(shapes, rank=rank), transposed=False)
        started = time.perf_counter()
        sha256 = {}
        for name in material.names:
            tensor = PatchedTensor(base, name, patches[name])
            with (Path(folder) / tensor.info.shard).open("r+b") as file:
                for offset, raw in tensor:
                    file.seek(offset)
                    file.write(raw)
            sha256[name] = tensor.record.sha256
        patch_s = time.perf_counter() - started
        up = aws_copy(variables, "--recursive", folder, at(server, "published"))
    return {
        "wall_s": down.wall_s + patch_s + up.wall_s,
        "down_s": down.wall_s,
        "patch_s": patch_s,
        "up_s": up.wall_s,
        "cpu_s": down.cpu_s + up.cpu_s,
        "sha256": sha256,
    }


def estimate(taken: Mapping[str, Sequence[Mapping[str, Any]]], start_up_s: float) -> dict[str, Any]:
    """What the rates of this run make of the whole: 46 shards, five tensors; not measured.

    Copies on the storage's side go at the rate of the unchanged shards; an edited tensor costs what
    its shard took beyond that. A transfer of the whole costs its seconds per byte.
    """
    whole = neox_20b()
    edited_bytes = 5 * 2 * 6144 * 24576
    copied_bytes = whole.size_bytes - edited_bytes

    def seconds(side: str, *parts: str) -> float:
        return float(median(sum(each[part] for part in parts) for each in taken[side]))

    one = taken["memedit"][0]
    unchanged_bytes = one["size_bytes"] - one["rewritten_bytes"]
    copy_s = seconds("memedit", "copy_s") / unchanged_bytes
    beside_bytes = one["rewritten_bytes"] - one["edited_bytes"]
    edit_s = (seconds("memedit", "patch_s") - copy_s * beside_bytes) / one["edited_bytes"]
    memedit_s = seconds("memedit", "wall_s") - seconds("memedit", "copy_s", "patch_s")
    memedit_s += copy_s * copied_bytes + edit_s * edited_bytes
    transfer_s = (seconds("whole copy", "down_s", "up_s") - 2 * start_up_s) / one["size_bytes"]
    patch_s = seconds("whole copy", "patch_s") / one["edited_bytes"]
    whole_s = 2 * start_up_s + transfer_s * whole.size_bytes + patch_s * edited_bytes
    return {"memedit_s": memedit_s, "whole_copy_s": whole_s, "ratio": whole_s / memedit_s}


def aws_start_up(server: SeaweedServer, data: Path) -> float:
    """Seconds that `aws s3 cp` takes for one byte."""
    server.client().put_object(Bucket=server.bucket, Key="byte", Body=b"1")
    target = data / "byte"
    try:
        return float(aws_copy(server.environment(), at(server, "byte"), str(target)).wall_s)
    finally:
        target.unlink(missing_ok=True)
