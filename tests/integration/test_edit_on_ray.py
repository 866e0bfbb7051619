"""One whole job, `memedit edit --executor ray`, against the same job in this process.

With one thread each, what does not depend on the order of a sum is the same bit for bit: sampled
text, z vectors, facts. Second moments are float64 sums taken in another order, so they agree to
1e-12 (see test_ray_equals_inline.py). What that changes of an update mostly vanishes where the
weight is rounded to float32; where it does not, the layer above sees keys that differ in float32's
last bits. So updates agree to 1e-5, and everything else of the checkpoint bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.executors import open_executor
from memedit import collect, stages
from memedit.checkpoint import Checkpoint
from memedit.manifest import Manifest, read_manifest
from memedit.moments import load_moment
from memedit.worker import Worker
from tests.tiny import save_tiny
from tests.workflows.runs import (
    FACTS,
    Ran,
    contents,
    edit,
    measured,
    memedit,
    shards,
    without_plots,
    write_rows,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KINDS = {"inline": ("--executor", "inline"), "ray": ("--executor", "ray", "--workers", "2")}
PLACES = ("Paris", "Rome", "London", "Berlin", "Warsaw")
MORE_FACTS = [
    {"subject": subject, "prompt": "The {} is located in", "target_new": place}
    for subject, place in zip(
        ("Big Ben", "Colosseum", "capital of France", "official language of Spain", "twin city"),
        PLACES,
        strict=True,
    )
]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run with everything of its own."""

    ran: Ran
    out: Path
    cache: Path

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.out)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", bos=True)


@pytest.fixture(scope="module")
def jobs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    folder = tmp_path_factory.mktemp("jobs")
    facts = write_rows(folder / "facts.jsonl", [*FACTS, *MORE_FACTS])
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        patch.setattr("workflows.session.open_executor", partial(open_executor, threads=1))
        # Several units for each worker, though there is little to do.
        patch.setattr(collect, "TOKENS_PER_COUNT", 128)
        patch.setattr(stages, "_BATCHES_PER_UNIT", 1)
        patch.setattr(stages, "FACTS_PER_KEY_UNIT", 3)
        patch.setattr(stages, "FACTS_PER_SCORE_UNIT", 3)
        jobs = {}
        threads = torch.get_num_threads()
        for kind, flags in KINDS.items():
            if kind == "ray":
                patch.setattr(Worker, "__init__", _not_here)
            out, cache = folder / kind / "out", folder / kind / "cache"
            ran = edit(base, facts, out, cache, "--set", "targets.tokens_per_batch=64", *flags)
            assert ran.code == 0, ran.stderr
            jobs[kind] = Job(ran=ran, out=out, cache=cache)
        torch.set_num_threads(threads)
        yield jobs


def _not_here(worker: Worker, *arguments: Any, **more: Any) -> None:
    raise AssertionError("the work was to be done in Ray's processes")


def pairs(jobs: dict[str, Job], part: str) -> Iterator[tuple[Path, Path]]:
    """The files of the two caches that have the same name, which says what they were made of."""
    inline, ray = (job.cache / part for job in jobs.values())
    assert contents(inline).keys() == contents(ray).keys() != set()
    for name in contents(inline):
        yield inline / name, ray / name


def test_the_same_identities(jobs: dict[str, Job]) -> None:
    inline, ray = (job.manifest for job in jobs.values())
    assert inline.moments == ray.moments and inline.moments.keys() == {"1", "2"}
    assert inline.facts == ray.facts and inline.facts.count == 8
    assert inline.model == ray.model
    assert inline.settings == ray.settings
    assert inline.tensors.keys() == ray.tensors.keys()
    assert inline.run_id != ray.run_id


def test_the_same_facts(jobs: dict[str, Job]) -> None:
    inline, ray = ((job.out / "facts.jsonl").read_bytes() for job in jobs.values())
    assert inline == ray and inline.count(b"\n") == 8


def test_the_same_text_and_the_same_z_vectors(jobs: dict[str, Job]) -> None:
    # Windows that are counted, and those that are held out.
    for part, count in (("windows", 2), ("targets", 8)):
        found = list(pairs(jobs, part))
        assert len(found) == count
        for inline, ray in found:
            assert inline.read_bytes() == ray.read_bytes()


def test_the_same_second_moments(jobs: dict[str, Job]) -> None:
    for inline, ray in pairs(jobs, "moments"):
        a, b = load_moment(inline), load_moment(ray)
        assert a.tokens == b.tokens >= 1024
        assert a.spread.batches == b.spread.batches >= 8
        assert (a.sum_II - b.sum_II).norm() <= 1e-12 * a.sum_II.norm()


def test_the_same_checkpoint(jobs: dict[str, Job], base: Path) -> None:
    inline, ray = (job.out for job in jobs.values())
    assert contents(inline).keys() == contents(ray).keys()
    was, a, b = map(Checkpoint.open, (base, inline, ray))
    assert was.tensors == a.tensors == b.tensors
    edited = jobs["inline"].manifest.tensors
    for name in was.names:
        before, one, other = (checkpoint.read(name) for checkpoint in (was, a, b))
        if name not in edited:
            assert torch.equal(one, before) and torch.equal(other, before)
            continue
        update = one.double() - before
        assert update.norm() > 0.01 * before.norm()
        assert (one.double() - other).norm() <= 1e-5 * update.norm()
    untouched = {a.shard_of(name) for name in was.names} - {a.shard_of(name) for name in edited}
    assert untouched
    for shard in untouched:
        assert shards(inline)[shard] == shards(ray)[shard] == shards(base)[shard]


def test_the_same_judgement(jobs: dict[str, Job]) -> None:
    inline, ray = (job.ran.result["metrics"] for job in jobs.values())
    assert inline["before"] == ray["before"]
    assert measured(inline["after"]) == pytest.approx(measured(ray["after"]), rel=1e-4)
    assert inline["after"]["efficacy"] > inline["before"]["efficacy"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_verifies(jobs: dict[str, Job], kind: str) -> None:
    assert memedit("verify", jobs[kind].out, "--json").result["ok"]
