"""Nights of `memedit ingest` with everything in object storage, against the same in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from memedit.worker import Worker
from tests.integration.worlds import World
from tests.s3.proxy import DisturbingProxy
from tests.workflows.ingestion.nights import DARRIEUX, EIFFEL, QUICK, TOYOTA, Nights
from tests.workflows.runs import Ran, memedit, shards, write_rows

pytestmark = pytest.mark.slow


def ingest(folder: Path, place: str, cache: Path, *more: object, **fields: Any) -> Ran:
    """A run of the job whose registry and inbox are at `place`."""
    job = {
        "model": f"{place}/base",
        "registry": f"{place}/registry",
        "source": {"kind": "files", "path": f"{place}/inbox/*.jsonl"},
        "edit": QUICK,
        **fields,
    }
    folder.mkdir(exist_ok=True)
    (folder / "ingest.yaml").write_text(yaml.safe_dump(job))
    flags = ("--config", folder / "ingest.yaml", "--cache", cache, "--json")
    return memedit("ingest", *flags, *more)


def test_nights_in_object_storage_are_those_in_a_folder(world: World, tmp_path: Path) -> None:
    local = Nights(folder=tmp_path / "here", base=Path(world.here.at("base")), cache=tmp_path / "c")
    place = world.there.root
    found: list[dict[str, Any]] = []
    for night, rows in enumerate(
        [(EIFFEL, DARRIEUX), (TOYOTA, {"id": "eiffel", "retracted": True})]
    ):
        path = local.deliver(str(night), *rows)
        world.objects.put(f"{place}/inbox/{night}.jsonl", path.read_bytes())
        here = local.ingest().result
        # Every night on another machine, which has nothing in its cache.
        cache = tmp_path / f"machine-{night}"
        there = ingest(tmp_path / "job", place, cache).result
        for name in ("run_id", "status", "facts", "targets"):
            assert there[name] == here[name], name
        again = ingest(tmp_path / "job", place, tmp_path / "another").result
        assert (again["status"], again["version"]) == ("unchanged", there["version"])
        found.append(there)
    assert found[1]["targets"] == {"computed": 1, "reused": 1}
    version = f"{place}/registry/versions/{found[1]['version']}"
    assert shards(world.objects.fetch(version, tmp_path / "got")) == shards(local.version)
    flags = ("--registry", f"{place}/registry", "--cache", tmp_path / "fresh", "--json")
    (told,) = memedit("facts", "why", *flags, "eiffel").result["facts"]
    assert (told["state"], told["versions"]) == ("retracted", [found[0]["version"]])
    assert memedit("facts", "retract", *flags, "toyota").result["active"] == 1


def test_a_run_that_loses_the_storage_publishes_nothing_and_goes_on_later(
    world: World, s3_proxy: DisturbingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEDIT_S3_PATIENCE_S", "1")
    monkeypatch.setenv("MEMEDIT_LEASE_S", "0.5")
    place, cache = world.there.root, tmp_path / "cache"
    rows = write_rows(tmp_path / "rows.jsonl", [EIFFEL, DARRIEUX])
    world.objects.put(f"{place}/inbox/1.jsonl", rows.read_bytes())
    find = Worker.targets

    def cut(worker: Worker, *arguments: Any) -> Iterator[Any]:
        yield from find(worker, *arguments)
        s3_proxy.down()

    monkeypatch.setattr(Worker, "targets", cut)
    ran = ingest(tmp_path / "job", place, cache)
    assert ran.code == 1, ran.stdout
    s3_proxy.up()
    monkeypatch.setattr(Worker, "targets", find)
    current = json.loads(world.objects.get(f"{place}/registry/facts/HEAD"))
    assert current["counts"] == {"active": 2}
    result = ingest(tmp_path / "job", place, cache).result
    assert (result["status"], result["facts"]["active"]) == ("published", 2)
    assert result["targets"]["computed"] + result["targets"]["reused"] == 2
