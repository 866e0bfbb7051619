"""A machine that is lost in the middle of the work, and a driver that is killed and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.executors import prepare_ray
from cluster.ray_executor import RayExecutor
from memedit import collect
from memedit.checkpoint import Checkpoint
from tests.cluster.processes import comes_true, processes_with
from tests.cluster.s3_places import child_environment
from tests.tiny import save_tiny
from tests.workflows.runs import FACTS, PLAIN, SETTINGS, memedit, quick, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "base", bos=True)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two machines of one CPU, as far as Ray knows."""
    prepare_ray(local=True)
    import ray
    from ray.cluster_utils import Cluster

    before = signal.getsignal(signal.SIGTERM)
    machine = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args=machine | {"include_dashboard": False})
    try:
        made.machine = machine
        made.second = made.add_node(**machine)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, before)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """A table of 24 facts."""
    rows = [
        {k: v for k, v in fact.items() if k != "id"} | {"subject": f"{fact['subject']} {number}"}
        for number in range(8)
        for fact in FACTS
    ]
    return write_rows(tmp_path / "facts.jsonl", rows)


def check_update(found: Path, quiet: Path, base: Path) -> None:
    """The update is that of a quiet run, to 1e-4 (docs/decisions/0005-faults.md)."""
    one, other, before = map(Checkpoint.open, (found, quiet, base))
    edited = 0
    for name in before.names:
        weight = before.read(name).double()
        update = other.read(name).double() - weight
        assert (one.read(name).double() - weight - update).norm() <= 1e-4 * update.norm(), name
        edited += bool(update.any())
    assert edited == 2  # a matrix of each layer


def test_machines_are_lost_during_an_edit(
    cluster: Any, folder: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One among the statistics, and the one in its place among the z vectors."""
    monkeypatch.setattr(collect, "TOKENS_PER_COUNT", 128)
    settings = (*SETTINGS, "targets.steps=30", "targets.lr=0.01", "targets.tokens_per_batch=64")

    def flags(name: str) -> list[object]:
        places = ["--facts", facts, "--out", tmp_path / name]
        return [*PLAIN, *quick(folder, tmp_path / f"{name}-cache", settings=settings), *places]

    lost: list[str] = []
    left: list[int] = []
    undisturbed = RayExecutor.map

    def disturbed(self: RayExecutor, method: str, units: Any, **more: Any) -> Iterator[Any]:
        if lost == ["count"] and method == "targets":
            left.append(len(self.seats))  # for another there was no room
            cluster.second = cluster.add_node(**cluster.machine)
            assert comes_true(lambda: both_work(self), within_s=60)
        for number, found in enumerate(undisturbed(self, method, units, **more)):
            wanted = method in ("count", "targets") and method not in lost
            if wanted and number >= 1 and len(self.seats) == 2:
                both = [seat.pid for seat in self.seats]
                cluster.remove_node(cluster.second, allow_graceful=False)
                lost.append(method)
                # Its worker ends a little later, and might have done all the rest until then.
                assert comes_true(partial(one_has_ended, both), within_s=60)
            yield found

    def one_has_ended(processes: list[int]) -> bool:
        return not set(processes) <= processes_with("RAY_").keys()

    def both_work(executor: RayExecutor) -> bool:
        for slot in executor.crew.slots:
            executor.crew.welcome(slot)
        return len(executor.seats) == 2

    monkeypatch.setattr(RayExecutor, "map", disturbed)
    ran = memedit("edit", *flags("lost"), "--executor", "ray", "--workers", 2)
    assert ran.code == 0, ran.stderr
    assert lost == ["count", "targets"] and left == [1]
    assert ran.stderr.count("another one takes its place") == 2
    assert memedit("edit", *flags("quiet")).code == 0
    check_update(tmp_path / "lost", tmp_path / "quiet", folder)


def test_a_driver_that_is_killed_goes_on_where_it_was(
    folder: Path, facts: Path, tmp_path: Path
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    # Slow enough to be killed in the middle.
    settings = (*SETTINGS, "targets.steps=60", "targets.lr=0.01", "targets.tokens_per_batch=64")
    command = [sys.executable, "-m", "workflows.cli", "edit", *PLAIN, "--facts", str(facts)]
    command += [*quick(folder, cache, settings=settings), "--out", str(out)]
    command += ["--executor", "ray", "--workers", "2"]
    environment = child_environment() | {"RAY_AUTH_TOKEN": os.urandom(32).hex()}

    def kept() -> int:
        return len(list((cache / "targets").rglob("*.safetensors")))

    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        assert comes_true(lambda: kept() >= 6 or driver.poll() is not None, within_s=120)
        assert driver.poll() is None, driver.communicate()[1].decode()
    finally:
        driver.kill()
        driver.wait()
    before = kept()
    assert 6 <= before < 24 and not out.exists()
    token = environment["RAY_AUTH_TOKEN"]
    # Ray's own agents may outlive a Ray that lost its driver; no worker does.
    working = "ray::Actor"
    assert comes_true(
        lambda: not any(working in command for command in processes_with(token).values()),
        within_s=60,
    )
    for process in processes_with(token):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    started = time.time()
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["facts"]["accepted"] == 24
    assert f"reused {before}" in ran.stderr
    new = [p for p in (cache / "targets").rglob("*.safetensors") if p.stat().st_mtime > started]
    assert len(new) == 24 - before
    again = quick(folder, tmp_path / "quiet-cache", settings=settings)
    assert memedit("edit", *PLAIN, *again, "--facts", facts, "--out", tmp_path / "quiet").code == 0
    check_update(out, tmp_path / "quiet", folder)
