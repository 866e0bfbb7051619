"""A publication that is killed leaves nothing or the whole version, and can be run again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memedit.checkpoint import Checkpoint
from memedit.files import LocalFiles
from memedit.patching import write_patched
from memedit.publication import Publication
from memedit.verify import verify
from tests.memedit.test_manifest import manifest_of
from tests.patches import each_row
from tests.tiny import save_tiny

EDITED = ("model.layers.0.mlp.down_proj.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base") / "model"
    base = Checkpoint.open(save_tiny(folder, max_shard_size="100KB"))
    assert len(base.shards) == 3 and len({base.shard_of(name) for name in EDITED}) == 2
    return base


def publish(base: Checkpoint, out: Path, run_id: str) -> None:
    with Publication(out, run_id=run_id) as publication:
        patched = write_patched(
            base, publication.sink, {name: each_row(torch.neg) for name in EDITED}
        )
        (publication.staging / "report.html").write_text("<html>")
        publication.publish(
            manifest_of(run_id=run_id, files=patched.files, tensors=patched.tensors)
        )


def in_child(work: Callable[[], None]) -> int:
    """Fork, do `work`, and give the child's process id; the child's exit code is 0 or 1."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def die_at_call(number: int, within: Path) -> None:
    """Send SIGKILL to this process before its `number`-th file system call below `within`."""
    calls = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        if event in ("import", "compile", "exec") or str(within) not in str(arguments):
            return
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def check_nothing_or_all(base: Checkpoint, out: Path) -> bool:
    """Whether `out` is there; then it is whole. Otherwise a second run makes it."""
    present = out.exists()
    if not present:
        publish(base, out, "second")
    assert verify(LocalFiles(out)) == []
    found = Checkpoint.open(out)
    for name in base.names:
        assert torch.equal(found.read(name), (-1 if name in EDITED else 1) * base.read(name))
    # Not even hidden left-overs, once a run has ended well.
    left = {p.name for p in out.parent.iterdir()} - {".out.lock"}
    assert left == {"out"}
    return present


@pytest.mark.slow
def test_killed_before_each_call_to_the_file_system(base: Checkpoint, tmp_path: Path) -> None:
    seen = {True: 0, False: 0}
    for number in range(1, 1000):
        parent = tmp_path / str(number)

        def work(number: int = number, parent: Path = parent) -> None:
            die_at_call(number, parent)
            publish(base, parent / "out", "first")

        _, status = os.waitpid(in_child(work), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        seen[check_nothing_or_all(base, parent / "out")] += 1
        shutil.rmtree(parent)
    else:
        pytest.fail("the publication never ended")
    # Kills both before and after the version appeared, or the test has not tested.
    assert seen[False] > 20 and seen[True] > 0
    assert verify(LocalFiles(parent / "out")) == []


@pytest.mark.slow
def test_killed_at_random_moments(base: Checkpoint, tmp_path: Path) -> None:
    chance = random.Random(0)
    started = time.perf_counter()
    os.waitpid(in_child(lambda: publish(base, tmp_path / "whole" / "out", "first")), 0)
    duration_s = time.perf_counter() - started
    for number in range(25):
        out = tmp_path / str(number) / "out"
        child = in_child(lambda out=out: publish(base, out, "first"))  # type: ignore[misc]
        time.sleep(chance.uniform(0, 1.2 * duration_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check_nothing_or_all(base, out)


def test_a_lock_does_not_outlive_its_process(base: Checkpoint, tmp_path: Path) -> None:
    ready, told = os.pipe()

    def hold() -> None:
        with Publication(tmp_path / "out", run_id="first"):
            os.write(told, b"x")
            time.sleep(60)

    child = in_child(hold)
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".out.partial-first").is_dir()
    publish(base, tmp_path / "out", "second")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
