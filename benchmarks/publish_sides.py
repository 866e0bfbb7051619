"""What `benchmarks.publish` measures of publishing: bytes, memory, and time against whole copies.

Each side runs in processes of its own. Does not know how results are shown.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import (
    aws_copy,
    disk_bytes,
    forget_objects,
    job,
    s3_server,
)
from benchmarks.shapes import WEIGHT, Shape, made_updates, neox_20b, upload, write_sparse
from memedit.checkpoint import Checkpoint
from memedit.defaults import defaults_for
from memedit.patching import PatchedTensor
from tests.s3.proxy import DisturbingProxy
from tests.s3.server import SeaweedServer
from workflows.product import patches_of

MEMORY_FACTOR, MEMORY_BYTES = 3, 200_000_000
"""Of the largest edited tensor, and beyond: what publishing may hold at most."""
PART_SLACK_BYTES = 10 << 20
"""What an edited tensor may take along, by the rules for parts (docs/publishing.md)."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """A checkpoint under a prefix, and what of it is edited."""

    name: str
    prefix: str
    names: list[str]


def publish_locally(data: Path, *, blocks: int, rank: int) -> dict[str, Any]:
    """Publish the whole of GPT-NeoX-20B's shape from a folder to a folder; holes for weights."""
    shape = neox_20b(blocks)
    names = edited_names(shape)
    with tempfile.TemporaryDirectory(dir=data, prefix="local-") as made:
        folder = Path(made)
        base, out, cache = folder / "base", folder / "out", str(folder / "cache")
        write_sparse(shape, base)
        base_bytes = disk_bytes(base)
        first = job("publish_job", {}, work="identify", base=str(base), cache=cache)
        found = job(
            "publish_job",
            {},
            work="publish",
            base=str(base),
            out=str(out),
            cache=cache,
            names=names,
            rank=rank,
        )
        return {
            "identify": first,
            "publish": found,
            "memory": memory_of(found),
            "disk_bytes": {"base": base_bytes, "with the version": disk_bytes(folder)},
            "file_bytes": shape.size_bytes,
            "hard_linked": sum(1 for p in out.iterdir() if p.stat().st_nlink > 1),
        }


def publish_on_s3(
    data: Path, *, blocks: int, rank: int, rounds: int, model: Path | None
) -> dict[str, Any]:
    """Publish from a prefix to another: the bytes, then the time, in turns with whole copies."""
    shape = neox_20b(blocks)
    with s3_server(data) as server:
        s3 = server.client(read_timeout=300)
        started = time.perf_counter()
        upload(shape, s3, server.bucket, "neox")
        print(f"{shape.size_bytes / 1e9:.2f} GB are there ({time.perf_counter() - started:.0f} s)")
        materials = [Material(name="GPT-NeoX-20B", prefix="neox", names=edited_names(shape))]
        if model is not None:
            aws_copy(server.environment(), "--recursive", str(model), at(server, "model"))
            materials.append(Material(name=model.name, prefix="model", names=_down(model)))
        with tempfile.TemporaryDirectory(dir=data, prefix="cache-") as cache:
            counted = {}
            for m in materials:
                first = job(
                    "publish_job",
                    server.environment(),
                    work="identify",
                    base=at(server, m.prefix),
                    cache=cache,
                )
                counted[m.name] = {
                    "identify": first,
                    **count_bytes(server, m, cache=cache, rank=rank),
                }
                forget_objects(server, "counted")
            whole = beside_whole_copy(
                data, server, materials[0], cache=cache, rank=rank, rounds=rounds
            )
        return {
            "bytes": counted,
            "time": whole | {"file_bytes": shape.size_bytes, "blocks": blocks},
        }


def count_bytes(
    server: SeaweedServer, material: Material, *, cache: str, rank: int
) -> dict[str, Any]:
    """Publish through a proxy that counts the bytes of all bodies; not timed."""
    with DisturbingProxy(server.endpoint) as proxy:
        found = job(
            "publish_job",
            server.environment(endpoint=proxy.endpoint),
            work="publish",
            base=at(server, material.prefix),
            out=at(server, "counted"),
            cache=cache,
            names=material.names,
            rank=rank,
        )
        exchanges = list(proxy.exchanges)
    weights = [e for e in exchanges if e.path.endswith(".safetensors")]
    sent = sum(e.up_bytes for e in weights if e.operation in ("UploadPart", "PutObject"))
    got = sum(e.down_bytes for e in exchanges if e.operation == "GetObject")
    up, down = sum(e.up_bytes for e in exchanges), sum(e.down_bytes for e in exchanges)
    edited, read = found["edited_bytes"], found["read_bytes"]
    # The process says what its reads were for, the proxy how much they were.
    own = got - sum(read.values())  # the lock, which is read in another way
    slack = sent - edited
    most = len(material.names) * PART_SLACK_BYTES
    operations: dict[str, dict[str, int]] = {}
    for e in exchanges:
        row = operations.setdefault(e.operation, {"requests": 0, "up_bytes": 0, "down_bytes": 0})
        row["requests"] += 1
        row["up_bytes"] += e.up_bytes
        row["down_bytes"] += e.down_bytes
    return {
        "edited_bytes": edited,
        "size_bytes": found["size_bytes"],
        "up_bytes": {"whole": up, "edited": edited, "slack": slack, "else": up - sent},
        "down_bytes": {"whole": down, **read, "lock": own, "answers": down - got},
        "slack_allowed_bytes": most,
        "up_ratio": up / edited,
        "up_ratio_without_slack": (up - slack) / edited,
        "down_ratio": down / edited,
        "down_ratio_to_reads": down / sum(read.values()),
        "met": {
            "up <= 1.05 x edited + slack": slack <= most and up - slack <= 1.05 * edited,
            "down <= 1.1 x read for the edit": down <= 1.1 * sum(read.values()),
        },
        "operations": operations,
        "memory": memory_of(found),
    }


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
        return median(sum(each[part] for part in parts) for each in taken[side])

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


def memory_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The peak of a process that publishes, against what it may be."""
    allowed = MEMORY_FACTOR * found["largest_edited_bytes"] + MEMORY_BYTES
    peak = found["memory_bytes"]["peak"]
    return {**found["memory_bytes"], "allowed": allowed, "met": peak <= allowed}


def aws_start_up(server: SeaweedServer, data: Path) -> float:
    """Seconds that `aws s3 cp` takes for one byte."""
    server.client().put_object(Bucket=server.bucket, Key="byte", Body=b"1")
    target = data / "byte"
    try:
        return float(aws_copy(server.environment(), at(server, "byte"), str(target)).wall_s)
    finally:
        target.unlink(missing_ok=True)


def at(server: SeaweedServer, name: str) -> str:
    """The location of a name in the server's bucket."""
    return f"s3://{server.bucket}/{name}"


def edited_names(shape: Shape) -> list[str]:
    """The weights that an edit changes: of the default layers, or of the last one there is."""
    from transformers import GPTNeoXConfig

    blocks = shape.config["num_hidden_layers"]
    layers = defaults_for(GPTNeoXConfig(**neox_20b().config), 100).settings.layers
    return [WEIGHT.format(layer) for layer in layers if layer < blocks] or [WEIGHT.format(0)]


def _down(model: Path) -> list[str]:
    """The weights that an edit of a Llama changes."""
    from transformers import AutoConfig

    layers = defaults_for(AutoConfig.from_pretrained(model), 100).settings.layers
    return [f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers]
