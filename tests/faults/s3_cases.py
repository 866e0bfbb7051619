"""What can be wrong with a job at `s3://`, and what must be said of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memedit.checkpoint import INDEX_NAME
from tests.faults.s3_world import EDITED, KEYS, SHARD, Case, World
from tests.s3.server import Identity
from tests.workflows.runs import FACTS

# --- Who asks ------------------------------------------------------------------------------------


def _without_keys(world: World) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    world.environment(world.server.environment() | keys)


def _wrong_secret(world: World) -> None:
    key = world.server.admin.access_key
    world.use(Identity(access_key=key, secret_key="an0ther/secret+than=his"))


def _away(world: World) -> None:
    address = "http://127.0.0.1:9"  # the port "discard", where nobody listens
    world.use(world.server.admin, AWS_ENDPOINT_URL_S3=address, MEMEDIT_S3_PATIENCE_S="0.5")


WHO = {
    "wrong secret": Case(
        change=_wrong_secret, says="access denied (SignatureDoesNotMatch)", source="/out/"
    ),
    "unknown key": Case(
        change=lambda w: w.use(Identity(access_key="AKIANOBODY", secret_key="n0body/knows+it")),
        says="access denied (InvalidAccessKeyId)",
        source="/out/",
    ),
    "session that is not known": Case(
        change=lambda w: w.use(w.server.admin, AWS_SESSION_TOKEN="t0k3n/0f+n0body"),
        says="access denied (",
        source="/out/",
    ),
    "no keys": Case(change=_without_keys, says="no AWS keys were found", source="/out/"),
    "keys that may only read": Case(
        change=lambda w: w.use(w.server.reader),
        says="access denied (AccessDenied)",
        source=".lock",
    ),
    "no such profile": Case(
        change=lambda w: w.use(w.server.admin, AWS_PROFILE="nobody"),
        says="nobody",
        source="S3",
        field="AWS_PROFILE",
    ),
    "no address": Case(
        change=lambda w: w.use(w.server.admin, AWS_ENDPOINT_URL_S3="nonsense"),
        says="nonsense",
        source="S3",
    ),
    # Not the input's fault as far as anybody knows: the same command may work in a minute.
    "nobody at the address": Case(
        change=_away,
        says="did not answer for 0.5 s",
        source="/out/",
        code=1,
        kind="MemeditError",
    ),
}

# --- Places --------------------------------------------------------------------------------------


def _set(name: str, value: str) -> Callable[[World], object]:
    return lambda world: setattr(world, name, value.format(place=world.place))


def _more(*flags: str) -> Callable[[World], object]:
    return lambda world: world.more.extend(flag.format(place=world.place) for flag in flags)


PLACES = {
    "no bucket for the model": Case(
        change=_set("base", "s3://no-such-bucket/base"),
        says="there is no such bucket",
        source="s3://no-such-bucket/base/",
    ),
    "no bucket for the output": Case(
        change=_set("out", "s3://no-such-bucket/out"),
        says="there is no such bucket",
        source="s3://no-such-bucket/out/",
    ),
    "no model": Case(
        change=_set("base", "{place}/nowhere"), says="nothing lies here", source="/nowhere"
    ),
    "no facts": Case(
        change=_set("facts", "{place}/none.jsonl"), says="no such file", source="/none.jsonl"
    ),
    "facts that are a prefix": Case(
        change=_set("facts", "{place}/base"), says="no such file", source="/base"
    ),
    "facts of a bucket": Case(
        change=_set("facts", "s3://memedit-test"),
        says="a whole bucket; a fact table is one object in it",
        source="s3://memedit-test",
    ),
    "no corpus": Case(
        change=_more("--corpus", "{place}/none/*.parquet"), says="no such file", source="*.parquet"
    ),
    "a delta for a model": Case(
        change=lambda w: w.delta(), says="a delta, no checkpoint", source="/delta", field="model"
    ),
    "no stats": Case(
        change=_more("--stats", "{place}/none"), says="no", source="/none", field="stats"
    ),
    "out that is not empty": Case(
        change=_set("out", "{place}/base"), says="is not empty", source="/base", field="out"
    ),
    "a whole bucket": Case(
        change=_set("out", "s3://memedit-test"),
        says="a whole bucket; name a prefix in it",
        source="s3://memedit-test",
        field="out",
    ),
    "a bucket that cannot be": Case(
        change=_set("out", "s3://Bad_Bucket/x"),
        says="not s3://bucket/prefix",
        source="s3://Bad_Bucket/x",
    ),
    "a path that goes up": Case(
        change=_set("out", "{place}/../x"), says=". or .. in it", source="/../x"
    ),
    "two places": Case(
        change=_more("--registry", "{place}/reg"), says="not both", field="registry"
    ),
    "no such encryption": Case(
        change=_more("--set", "storage.server_side_encryption=rot13"),
        says="rot13",
        field="storage.server_side_encryption",
    ),
}
HIDDEN = {
    f"keys in {name} ({start})": Case(
        change=change, says="keys come from the environment or a profile", never_says="wJalrXUtn"
    )
    for start in ("s3://", "S3://")
    for name, change in {
        "out": _set("out", f"{start}{KEYS}@bucket/x"),
        "model": _set("base", f"{start}{KEYS}@bucket/x"),
        "facts": _set("facts", f"{start}{KEYS}@bucket/x.jsonl"),
        "facts at a bucket": _set("facts", f"{start}{KEYS.replace('/', '')}@bucket"),
        "corpus": _more("--corpus", f"{start}{KEYS}@bucket/x"),
        "corpora": _more("--corpus", f"{start}{KEYS}@bucket/x/*.parquet"),
        "stats": _more("--stats", f"{start}{KEYS}@bucket/x"),
        "a setting": _more("--set", f"out={start}{KEYS}@bucket/x"),
    }.items()
}

# --- What lies there -----------------------------------------------------------------------------


def _bad_row(world: World) -> None:
    rows = [FACTS[0], FACTS[1] | {"target_new": " "}, FACTS[2]]
    world.put("facts.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def _huge_header(world: World) -> None:
    raw = world.objects.get(f"{world.base}/{SHARD}")
    world.put(f"base/{SHARD}", struct.pack("<Q", 2**60) + raw[8:])


def _overlap(header: dict[str, Any]) -> None:
    first, second = (n for n in header if n.endswith(("up_proj.weight", "gate_proj.weight")))
    header[second]["data_offsets"] = header[first]["data_offsets"]


def _parquet_without_text(world: World) -> None:
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), table)
    world.put("text/a.parquet", table.getvalue().to_pybytes())
    world.more += ["--corpus", f"{world.place}/text"]


def _lines_without_text(world: World) -> None:
    world.put("lines.jsonl", b'{"text": "Paris"}\n{"body": "Rome"}\n')
    world.more += ["--corpus", f"{world.place}/lines.jsonl"]


def _nan(world: World) -> None:
    raw = world.objects.get(f"{world.base}/{SHARD}")
    world.put(f"base/{SHARD}", raw[:-4] + struct.pack("<f", float("nan")))


CONTENT = {
    "bad row": Case(
        change=_bad_row, says="whitespace", source="/facts.jsonl", row=2, field="target_new"
    ),
    "header of 2^60 bytes": Case(
        change=_huge_header, says=f"the header claims {2**60} bytes", source=SHARD
    ),
    "tensors that overlap": Case(
        change=lambda w: w.header(_overlap), says="the bytes overlap", source=SHARD
    ),
    "offsets beyond the end": Case(
        change=lambda w: w.header(
            lambda h: h.update(x={"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]})
        ),
        says="",
        source=SHARD,
    ),
    "index that goes up": Case(
        change=lambda w: w.index(lambda m: m.update({EDITED: "../x.safetensors"})),
        says="'../x.safetensors' is not the name of a .safetensors file",
        source=INDEX_NAME,
        field=EDITED,
    ),
    "index that names another bucket": Case(
        change=lambda w: w.index(lambda m: m.update({EDITED: "s3://other/x.safetensors"})),
        says="is not the name of a .safetensors file",
        source=INDEX_NAME,
        field=EDITED,
    ),
    "index that disagrees": Case(
        change=lambda w: w.index(lambda m: m.update({EDITED: "model-00001-of-00006.safetensors"})),
        says=f"disagrees with {INDEX_NAME}",
        source=".safetensors",
        field=EDITED,
    ),
    "shard that is gone": Case(
        change=lambda w: w.objects.delete(f"{w.base}/{SHARD}"),
        says=f"the shard {SHARD} is missing",
        source=INDEX_NAME,
    ),
    "NaN": Case(change=_nan, says="NaN", source=SHARD),
    "Parquet without text": Case(
        change=_parquet_without_text,
        says="no column 'text'; columns found: title, body",
        source="/text/a.parquet",
        field="text",
    ),
    "lines without text": Case(
        change=_lines_without_text,
        says="no column 'text'; columns found: body",
        source="/lines.jsonl",
        row=2,
        field="text",
    ),
    "stats of another model": Case(
        change=lambda w: w.stats(model={"name": "other", "digest": "0" * 64}),
        says="the statistics of another model (other",
        source="/stats/stats.json",
        field="model",
    ),
    "stats of other layers": Case(
        change=lambda w: w.stats(moments={"1": "0" * 64}),
        says="no statistics of layers 2",
        source="/stats/stats.json",
        field="layers",
    ),
    "stats under another name": Case(
        change=lambda w: w.stats(moments={"1": "0" * 64, "2": "1" * 64}),
        says="not the file that stats.json lists",
        source="/stats/layer-1.safetensors",
    ),
    "stats that are damaged": Case(
        change=lambda w: (w.stats(), w.put("stats/layer-2.safetensors", b"nothing of the kind")),
        says="not a second moment",
        source="/stats/layer-2.safetensors",
    ),
    "stats that lead out of the cache": Case(
        change=lambda w: w.stats(moments={"1": "../../../../evil", "2": "../../../../evil"}),
        says="not what `memedit stats` writes",
        source="/stats/stats.json",
    ),
    "stats that name no digest": Case(
        change=lambda w: w.stats(moments={"1": 1, "2": None}),
        says="not what `memedit stats` writes",
        source="/stats/stats.json",
    ),
}

CASES = WHO | PLACES | HIDDEN | CONTENT
