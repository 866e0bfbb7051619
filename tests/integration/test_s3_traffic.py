"""What an edit moves over the network, and the same on Ray, where each worker reads for itself."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.compose import MIN_PART_BYTES
from cluster.executors import open_executor
from memedit.checkpoint import SINGLE_NAME, Checkpoint
from memedit.manifest import read_manifest
from memedit.worker import Worker
from tests.integration.worlds import World
from tests.s3.objects import Objects
from tests.s3.proxy import DisturbingProxy
from tests.s3.server import SeaweedServer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.workflows.runs import (
    PLAIN,
    contents,
    measured,
    memedit,
    quick,
    setting,
    without_plots,
    write_rows,
)

pytestmark = pytest.mark.slow

TEXT = ("Marie Curie was born in Warsaw. " * 400).encode()
FEW = (
    *("moments.tokens=2560", "moments.window=32", "contexts.kind=none", "targets.steps=3"),
    *("solve.lam=1", "evaluation.fluency_facts=0", "evaluation.drift_prompts=0"),
    *("evaluation.heldout_tokens=0", "solve.ridge=1e-6"),
)
HEADER_BYTES = 1 << 16
"""What is read at once to see the header of a shard."""


def moved(proxy: DisturbingProxy, operation: str, way: str) -> Counter[str]:
    """Bytes by the last two parts of the key."""
    found: Counter[str] = Counter()
    for exchange in proxy.exchanges:
        if exchange.operation == operation:
            name = "/".join(exchange.path.split("/")[-2:])
            found[name] += getattr(exchange, f"{way}_bytes")
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 20 MB in one file: its edited tensor lies between parts that can be copied."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("wide") / "base"
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5}
    tiny_model("llama", **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_rows(folder.parent / "facts.jsonl")
    return folder


def test_what_is_read_and_sent(
    wide: Path,
    s3: str,
    s3_server: SeaweedServer,
    s3_proxy: DisturbingProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_plots(monkeypatch)
    objects = Objects(s3_server)
    objects.put_folder(wide.parent, f"{s3}/in")
    base = f"{s3}/in/base"
    text = objects.put(f"{s3}/in/text.txt", TEXT)
    checkpoint = Checkpoint.open(wide)
    weights = checkpoint.size_bytes
    (edited,) = (n for n in checkpoint.names if n.endswith("layers.2.mlp.down_proj.weight"))

    def edit(out: str, model: str = base) -> None:
        flags = quick(model, tmp_path / "cache", layers="2", settings=FEW)
        s3_proxy.forget()
        flags += ["--facts", f"{s3}/in/facts.jsonl", "--corpus", text, "--out", out]
        ran = memedit("edit", *PLAIN, *flags)
        assert ran.code == 0, ran.stderr

    # First: the weights for identity and NaN, once; for the workers, once; and one part, of which
    # the edited tensor is a piece. What was published is loaded once, to be judged.
    edit(f"{s3}/1")
    down = moved(s3_proxy, "GetObject", "down")
    assert 2 * weights < down[f"base/{SINGLE_NAME}"]
    assert down[f"base/{SINGLE_NAME}"] <= 2 * weights + 2 * MIN_PART_BYTES + 4 * HEADER_BYTES
    assert weights <= down[f"1/{SINGLE_NAME}"] <= weights + 2 * HEADER_BYTES
    assert down["in/facts.jsonl"] == (wide.parent / "facts.jsonl").stat().st_size

    # Then: identity and NaN are known by the ETag, and no file of the tokenizer is fetched.
    edit(f"{s3}/2")
    down = moved(s3_proxy, "GetObject", "down")
    assert weights < down[f"base/{SINGLE_NAME}"]
    assert down[f"base/{SINGLE_NAME}"] <= weights + 2 * MIN_PART_BYTES + 4 * HEADER_BYTES
    assert weights <= down[f"2/{SINGLE_NAME}"] <= weights + 2 * HEADER_BYTES
    assert not [name for name in down if name.startswith("base/token")]

    # Of 20 MB, what lies around the edited tensor is sent; the rest is copied by the storage.
    size = (wide / SINGLE_NAME).stat().st_size
    sent = moved(s3_proxy, "UploadPart", "up")
    assert checkpoint.info(edited).size_bytes < sent[f"2/{SINGLE_NAME}"] <= 2 * MIN_PART_BYTES
    assert s3_proxy.operations["UploadPartCopy"] == 2 and s3_proxy.up_bytes < size / 2
    mine, was = (
        load_file(folder / SINGLE_NAME) for folder in (fetch(objects, f"{s3}/2", tmp_path), wide)
    )
    assert [name for name in was if not torch.equal(was[name], mine[name])] == [edited]

    # A base that is other content under the same name is read anew.
    objects.put(f"{base}/{SINGLE_NAME}", (tmp_path / "2" / SINGLE_NAME).read_bytes())
    edit(f"{s3}/3")
    assert moved(s3_proxy, "GetObject", "down")[f"base/{SINGLE_NAME}"] > 2 * weights
    found = [read_manifest(fetch(objects, f"{s3}/{n}", tmp_path)) for n in (1, 2, 3)]
    assert found[0].model == found[1].model and found[0].tensors == found[1].tensors
    assert found[2].model.digest != found[1].model.digest


def fetch(objects: Objects, location: str, folder: Path) -> Path:
    return objects.fetch(location, folder / location.rpartition("/")[2])


def test_plan_and_stats_read_what_they_need(
    wide: Path, s3: str, s3_server: SeaweedServer, s3_proxy: DisturbingProxy, tmp_path: Path
) -> None:
    objects = Objects(s3_server)
    objects.put_folder(wide.parent, f"{s3}/in")
    flags = quick(f"{s3}/in/base", tmp_path / "cache", layers="1", settings=())
    table = ("--facts", f"{s3}/in/facts.jsonl", "--matrix-gflops", "100")
    assert memedit("plan", *flags, *table).code == 0
    down = moved(s3_proxy, "GetObject", "down")
    assert 0 < down[f"base/{SINGLE_NAME}"] <= 2 * HEADER_BYTES

    corpus = objects.put(f"{s3}/in/text.txt", TEXT)
    flags += setting(*FEW[:2])
    found = []
    for seed in (0, 1):
        s3_proxy.forget()
        more = ("--corpus", corpus, "--seed", seed, "--out", f"{s3}/stats-{seed}")
        ran = memedit("stats", *flags, *more)
        assert ran.code == 0, ran.stderr
        found.append(moved(s3_proxy, "GetObject", "down")[f"base/{SINGLE_NAME}"])
    # All for the identity, once and for all; and of five blocks the first two, to be run.
    checkpoint = Checkpoint.open(wide)
    blocks = sum(
        info.size_bytes
        for name, info in checkpoint.tensors.items()
        if name.startswith(("model.layers.0.", "model.layers.1.", "model.embed"))
    )
    assert blocks < checkpoint.size_bytes / 2
    most = blocks + checkpoint.tensors["lm_head.weight"].size_bytes + 3 * HEADER_BYTES
    assert blocks <= found[1] <= most
    assert found[0] - found[1] == pytest.approx(checkpoint.size_bytes, abs=HEADER_BYTES)


# --- Ray -----------------------------------------------------------------------------------------


def _not_here(worker: Worker, *arguments: Any, **more: Any) -> None:
    raise AssertionError("the work was to be done in Ray's processes")


@pytest.mark.ray
def test_from_s3_to_s3_on_ray(
    world: World,
    s3: str,
    s3_proxy: DisturbingProxy,
    input_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in test_edit_on_ray.py: the sums of second moments are taken in another order."""
    monkeypatch.setattr("workflows.session.open_executor", partial(open_executor, threads=1))
    kinds = {"inline": (), "ray": ("--executor", "ray", "--workers", "2")}
    read, results = {}, {}
    for kind, flags in kinds.items():
        if kind == "ray":
            monkeypatch.setattr(Worker, "__init__", _not_here)
        s3_proxy.forget()
        ran = world.there.edit(f"{s3}/{kind}", tmp_path / "caches" / kind, *flags)
        results[kind] = ran.result
        read[kind] = moved(s3_proxy, "GetObject", "down")
        world.objects.fetch(f"{s3}/{kind}", tmp_path / kind)

    # Each of two workers reads the base, and what was published, for itself.
    shards = [p.name for p in (input_folder / "base").glob("*.safetensors")]
    assert len(shards) == 6
    for shard in shards:
        size = (input_folder / "base" / shard).stat().st_size
        for folder in ("base", "ray"):
            inline = read["inline"][f"{'inline' if folder == 'ray' else folder}/{shard}"]
            assert read["ray"][f"{folder}/{shard}"] >= inline + 0.9 * size

    inline, ray = (tmp_path / kind for kind in kinds)
    assert contents(inline).keys() == contents(ray).keys()
    a, b = read_manifest(inline), read_manifest(ray)
    assert (a.model, a.facts, a.moments, a.settings) == (b.model, b.facts, b.moments, b.settings)
    was, one, other = map(Checkpoint.open, (input_folder / "base", inline, ray))
    for name in was.names:
        before, mine, theirs = (each.read(name) for each in (was, one, other))
        if name in a.tensors:
            update = mine.double() - before
            assert update.norm() > 0.01 * before.norm()
            assert (mine.double() - theirs).norm() <= 1e-5 * update.norm()
        else:
            assert torch.equal(mine, before) and torch.equal(theirs, before)
    before, after = (
        [results[kind]["metrics"][when] for kind in kinds] for when in ("before", "after")
    )
    assert before[0] == before[1]
    assert measured(after[0]) == pytest.approx(measured(after[1]), rel=1e-4)
    assert memedit("verify", f"{s3}/ray", "--json").result["ok"]
