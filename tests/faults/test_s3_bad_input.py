"""Bad input at `s3://`, as in test_bad_input.py: the object is named, and nothing is written."""

from __future__ import annotations

import json
import struct

import pytest

from tests.faults.s3_cases import CASES
from tests.faults.s3_world import SHARD, World
from tests.s3.secrets import search
from tests.workflows.runs import contents, memedit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
def test_bad_input(s3_world: World, name: str) -> None:
    case, world = CASES[name], s3_world
    case.change(world)
    there, here = world.objects.all(), outside_of_the_cache(world)
    ran = world.run()
    assert ran.code == case.code, ran.stderr
    error = ran.error
    assert error["kind"] == case.kind
    assert case.says in error["message"] and case.source in error["message"]
    if case.kind == "InputError":
        assert (error["source"] or "").endswith(case.source)
    if case.row is not None:
        assert error["row"] == case.row and f"{case.source}:{case.row}" in ran.stderr
    if case.field is not None:
        assert error["field"] == case.field and f"[{case.field}]" in ran.stderr
    # People read the same, and no traceback.
    assert error["message"].splitlines()[0] in ran.stderr
    assert case.never_says not in ran.stderr + ran.stdout and "Traceback" not in ran.stderr
    # No secret is told, even if all is told.
    world.more += ["--debug", "--log-format", "json"]
    loud = world.run()
    assert loud.code == case.code and "Traceback" in loud.stderr
    assert search(world.secrets, world.here(ran, loud)) == []
    # Nothing was written, there or here.
    assert world.objects.all() == there and world.objects.uploads() == []
    assert outside_of_the_cache(world) == here
    assert not [n for n in contents(world.folder) if n.endswith(".partial")]
    assert not list(world.folder.parent.glob("*evil*"))


def outside_of_the_cache(world: World) -> dict[str, bytes]:
    return {n: c for n, c in contents(world.folder).items() if not n.startswith("cache/")}


def test_the_job_that_each_case_changes_is_good(s3_world: World) -> None:
    s3_world.stats()
    ran = s3_world.run()
    assert ran.code == 0, ran.stderr
    assert "memedit.json" in s3_world.objects.names(s3_world.out)


def test_statistics_that_were_refused_are_not_kept(s3_world: World) -> None:
    """A matrix under the digest of another must not be what a later run takes for it."""
    world = s3_world
    world.stats()
    stats = json.loads(world.objects.get(f"{world.place}/stats/stats.json"))
    one, two = stats["moments"].values()
    stats["moments"] = {"1": two, "2": one}
    world.put("stats/stats.json", json.dumps(stats).encode())
    ran = world.run()
    assert ran.code == 2 and "not the file that stats.json lists" in ran.error["message"]
    assert [p for p in (world.cache / "moments").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("command", ["evaluate", "generate", "plan", "verify", "apply", "history"])
def test_other_commands(s3_world: World, command: str) -> None:
    """Each refuses as edit does, and names the object."""
    world = s3_world
    raw = world.objects.get(f"{world.base}/{SHARD}")
    world.put(f"base/{SHARD}", struct.pack("<Q", 2**60) + raw[8:])
    there = world.objects.all()
    facts = ("--facts", world.facts)
    arguments: dict[str, tuple[object, ...]] = {
        "evaluate": ("--model", world.base, *facts),
        "generate": ("--model", world.base, "Rome is"),
        "plan": ("--model", world.base, *facts),
        "verify": (world.base,),
        "apply": (world.base, "--out", world.out),
        "history": ("--registry", world.base),
    }
    ran = memedit(command, *arguments[command], "--cache", world.cache, "--json")
    assert ran.code == 2 and ran.error["source"].startswith(world.base), ran.stderr
    missing = {"verify": "memedit.json", "apply": "memedit.json", "history": "no registry"}
    assert missing.get(command, "the header claims") in ran.error["message"]
    assert world.objects.all() == there
