"""`memedit apply` of what is no delta, or not that of this base: exit code 2, nothing written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memedit.delta import DELTA_NAME
from memedit.manifest import MANIFEST_NAME, read_manifest
from tests.s3.objects import Objects
from tests.tiny import save_tiny
from tests.workflows.made_deltas import Made, make
from tests.workflows.runs import FACTS, contents, memedit, shards


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llama"), "llama", FACTS)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What is wrong with a copy of the delta, and what the error says."""

    change: Callable[[Path, Made], object]
    says: str
    source: str = ""
    field: str | None = None


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def listed(folder: Path, name: str) -> None:
    """Let the manifest list a file as it is now."""
    content = (folder / name).read_bytes()
    record = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(folder, lambda m: m["files"].update({name: record}))


def flip(path: Path, offset: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def _flip_and_list(folder: Path, made: Made) -> None:
    flip(folder / DELTA_NAME)
    listed(folder, DELTA_NAME)


def _scale(folder: Path, made: Made) -> None:
    """A well-formed delta of other numbers, listed as it should be."""
    path = folder / DELTA_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata=metadata)
    listed(folder, DELTA_NAME)


def _swap_layers(folder: Path, made: Made) -> None:
    path = folder / DELTA_NAME
    raw = path.read_bytes()
    for old, new in (
        (b"layers.1.", b"layers.7."),
        (b"layers.2.", b"layers.1."),
        (b"layers.7.", b"layers.2."),
    ):
        raw = raw.replace(old, new)
    path.write_bytes(raw)
    listed(folder, DELTA_NAME)


def _weights_instead(folder: Path, made: Made) -> None:
    (folder / DELTA_NAME).write_bytes(next(iter(shards(made.full).values())))
    listed(folder, DELTA_NAME)


def _shard_of_the_base(folder: Path, made: Made) -> None:
    name = "model-00001-of-00006.safetensors"
    (folder / name).write_bytes(b"not what the base has")
    listed(folder, name)


REFUSED = {
    "delta that was changed": Refused(
        change=lambda folder, made: flip(folder / DELTA_NAME),
        says="was changed since it was published",
        source=DELTA_NAME,
    ),
    "facts that were changed": Refused(
        change=lambda folder, made: flip(folder / "facts.jsonl"),
        says="was changed since it was published",
        source="facts.jsonl",
    ),
    "delta that is gone": Refused(
        change=lambda folder, made: (folder / DELTA_NAME).unlink(),
        says="is missing",
        source=DELTA_NAME,
    ),
    "delta of other numbers": Refused(
        change=_scale, says="does not give the tensor that its manifest lists", source="changed"
    ),
    "delta of other layers": Refused(change=_swap_layers, says="does not", source="changed"),
    "delta that does not say itself what it is": Refused(
        change=lambda folder, made: (
            (folder / DELTA_NAME).write_bytes(
                (made.full / sorted(shards(made.full))[1]).read_bytes()
            ),
            listed(folder, DELTA_NAME),
        ),
        says="not a delta file of memedit",
        source=DELTA_NAME,
    ),
    "other tensors in the manifest": Refused(
        change=lambda folder, made: rewrite_manifest(folder, lambda m: m["tensors"].popitem()),
        says="is not what its manifest lists",
        source="changed",
        field="tensors",
    ),
    "file named as one of the base's": Refused(
        change=_shard_of_the_base,
        says="is no part of a delta",
        source="model-00001-of-00006.safetensors",
    ),
    "file outside": Refused(
        change=lambda folder, made: rewrite_manifest(
            folder, lambda m: m["files"].update({"../x": m["files"]["facts.jsonl"]})
        ),
        says="does not stay inside the folder",
        source=MANIFEST_NAME,
    ),
    "no manifest": Refused(
        change=lambda folder, made: (folder / MANIFEST_NAME).unlink(),
        says="not a version of memedit",
        source="changed",
    ),
    "full version": Refused(
        change=lambda folder, made: (
            shutil.rmtree(folder),
            shutil.copytree(made.full, folder),
        ),
        says="has the format full; only a delta can be applied",
        source="changed",
        field="delta",
    ),
    "nothing there": Refused(
        change=lambda folder, made: shutil.rmtree(folder), says="", source="changed"
    ),
}


@pytest.mark.parametrize("where", ["folder", pytest.param("s3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(
    llama: Made, tmp_path: Path, request: pytest.FixtureRequest, name: str, where: str
) -> None:
    refused = REFUSED[name]
    folder = tmp_path / "changed"
    shutil.copytree(llama.delta, folder)
    refused.change(folder, llama)
    delta, out = str(folder), str(tmp_path / "out")
    if where == "s3":
        s3, server = map(request.getfixturevalue, ("s3", "s3_server"))
        objects = Objects(server)
        delta, out = f"{s3}/changed", f"{s3}/out"
        if folder.exists():
            objects.put_folder(folder, delta)
        there = objects.all()
    here, base = contents(tmp_path), contents(llama.base)
    ran = llama.apply(out, "--model", llama.base, delta=delta)
    assert ran.code == 2, ran.stderr
    assert refused.says in ran.error["message"]
    source = ran.error["source"]
    assert source.startswith(delta) and source.endswith(refused.source), source
    if refused.field is not None:
        assert ran.error["field"] == refused.field
    assert source in ran.stderr and "Traceback" not in ran.stderr
    assert contents(tmp_path) == here and contents(llama.base) == base
    if where == "s3":
        assert objects.all() == there and objects.uploads() == []


def test_another_base_is_refused_by_its_name(llama: Made, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    here = contents(tmp_path)
    ran = llama.apply(tmp_path / "out", "--model", other)
    assert (ran.code, ran.error["field"], ran.error["source"]) == (2, "model", str(other))
    assert f"which is {llama.base}" in ran.error["message"]
    assert read_manifest(llama.delta).model.digest[:12] in ran.error["message"]
    assert contents(tmp_path) == here
    # A copy of the base under another name is the base.
    shutil.copytree(llama.base, tmp_path / "copy")
    assert llama.apply(tmp_path / "out", "--model", tmp_path / "copy").code == 0


def test_a_delta_is_no_model(llama: Made, tmp_path: Path) -> None:
    """Whoever takes a delta for a checkpoint is told what to do."""
    for command in (
        ("evaluate", "--facts", llama.facts),
        ("generate", "Rome is"),
        ("edit", "--facts", llama.facts, "--out", tmp_path / "out"),
        ("plan", "--facts", llama.facts),
    ):
        name, *rest = command
        ran = memedit(name, "--model", llama.delta, *rest, "--cache", llama.cache, "--json")
        assert (ran.code, ran.error["source"]) == (2, str(llama.delta)), ran.stderr
        assert "a delta" in ran.error["message"] and "memedit apply" in ran.error["message"]
    assert not (tmp_path / "out").exists()
