"""What `benchmarks.publish` measures of publishing: from a folder, and from one prefix to another.

Each side runs in processes of its own. Does not know how results are shown.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import aws_copy, disk_bytes, forget_objects, job, s3_server
from benchmarks.publish_material import (
    Material,
    at,
    edited_names,
    edited_names_of_llama,
    memory_of,
)
from benchmarks.publish_times import beside_whole_copy
from benchmarks.shapes import neox_20b, upload, write_sparse
from tests.s3.proxy import DisturbingProxy
from tests.s3.server import SeaweedServer

PART_SLACK_BYTES = 5 << 20
"""What an edited tensor may take along, by the rules for parts (docs/publishing.md)."""


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
            materials.append(
                Material(name=model.name, prefix="model", names=edited_names_of_llama(model))
            )
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
    """Publish through a proxy that counts the bytes of all bodies; not timed.

    Slack is what a part takes along beside an edited tensor: it is downloaded to be uploaded.
    """
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
    # The process says what its reads were for, the proxy how much was read; the rest is the lock.
    lock = got - sum(read.values())
    if not 0 <= lock < 10_000:
        raise RuntimeError(f"{got} bytes were read, and the process knows of {read}")
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
        "down_bytes": {"whole": down, **read, "lock": lock, "answers": down - got},
        "slack_allowed_bytes": most,
        "up_ratio": up / edited,
        "up_ratio_without_slack": (up - slack) / edited,
        "down_ratio": down / edited,
        "down_ratio_without_slack": (down - read["slack"]) / edited,
        "met": {
            "up <= 1.05 x edited + slack": slack <= most and up - slack <= 1.05 * edited,
            "down <= 1.1 x edited + slack": down - read["slack"] <= 1.1 * edited,
        },
        "operations": operations,
        "memory": memory_of(found),
    }
