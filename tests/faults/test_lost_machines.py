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
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.dispatch import Rules
from cluster.executors import open_executor, prepare_ray
from memedit.executor import InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from tests.cluster.processes import comes_true, processes_with
from tests.cluster.s3_places import child_environment
from tests.heard import Heard
from tests.tiny import save_tiny
from tests.workflows.runs import FACTS, quick, write_rows

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


def test_a_lost_machine_is_done_without_and_a_new_one_is_used(cluster: Any, folder: Path) -> None:
    spec = ModelSpec(files=LocalFiles(folder))
    units = [(1, 20, seed) for seed in range(200)]
    threads = torch.get_num_threads()
    with InlineExecutor(spec, threads=1) as inline:
        expected = dict(inline.map("sample", units))
    torch.set_num_threads(threads)
    heard = Heard()
    rules = Rules(wait_s=0.1)
    opened: Any = open_executor("ray", spec, workers=2, threads=1, rules=rules, progress=heard)
    with opened as executor:
        assert len(executor.seats) == 2
        found: dict[int, Any] = {}
        for done, (index, item) in enumerate(executor.map("sample", units)):
            found[index] = item
            if done == 20:
                cluster.remove_node(cluster.second, allow_graceful=False)
        assert found == expected
        assert len(executor.seats) == 1  # for another there is no room
        assert len(heard.texts) == 1 and "another one takes its place" in heard.texts[0]
        cluster.add_node(**cluster.machine)

        def both_work() -> bool:
            assert dict(executor.map("sample", units[:4])) == {i: expected[i] for i in range(4)}
            return len(executor.seats) == 2

        assert comes_true(both_work, within_s=60)


def test_a_driver_that_is_killed_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    facts = write_rows(
        tmp_path / "facts.jsonl",
        [
            row | {"subject": f"{row['subject']} {number}"}
            for number in range(8)
            for row in ({k: v for k, v in fact.items() if k != "id"} for fact in FACTS)
        ],
    )
    cache, out = tmp_path / "cache", tmp_path / "out"
    more = ["--executor", "ray", "--workers", "2", "--set", "targets.tokens_per_batch=64"]
    # Slow enough to be killed in the middle.
    flags = [*quick(folder, cache), *more, "--set", "targets.steps=60", "--set", "targets.lr=0.01"]
    command = [sys.executable, "-m", "workflows.cli", "edit", *flags]
    command += ["--facts", str(facts), "--out", str(out)]
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
