"""`memedit edit` that is killed, stopped or run twice: nothing half done, and it can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memedit.files import LocalFiles
from memedit.verify import verify
from memedit.worker import Worker
from tests.faults.test_publish_kill import in_child
from tests.tiny import save_tiny
from tests.workflows.runs import PLAIN, edit, one_thread, quick, shards, without_plots, write_rows

ENDLESS = ("--set", "targets.steps=10000000", "--set", "targets.loss_threshold=0")
"""An optimisation that takes as long as a test wants."""
POINTS = 11


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_plots(monkeypatch)
    return write_rows(tmp_path / "facts.jsonl")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many z vectors and batches of windows this process has computed."""
    done, targets, count = {"targets": 0, "count": 0}, Worker.targets, Worker.count

    def counting_targets(worker: Worker, requests: Sequence[Any], *rest: Any) -> Iterator[Any]:
        done["targets"] += len(requests)
        yield from targets(worker, requests, *rest)

    def counting_count(worker: Worker, *arguments: Any) -> Iterator[Any]:
        done["count"] += 1
        yield from count(worker, *arguments)

    monkeypatch.setattr(Worker, "targets", counting_targets)
    monkeypatch.setattr(Worker, "count", counting_count)
    return done


def kept(cache: Path, kind: str) -> int:
    return len(list((cache / kind).rglob("*.safetensors")))


def at_file_calls(within: Path, act: Callable[[int], None]) -> None:
    """Call `act` with 1, 2, … before each file system call below a folder, in this process."""
    calls = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        if event in ("import", "compile", "exec") or str(within) not in str(arguments):
            return
        calls += 1
        act(calls)

    sys.addaudithook(count)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 300  # starting a process takes a while on a busy machine
    while not condition():
        assert time.monotonic() < until, "it never came so far"
        time.sleep(0.01)


def left_overs(out: Path) -> set[str]:
    return {p.name for p in out.parent.iterdir()} - {"out"}


def same_weights(folder: Path, expected: Path) -> None:
    """The same tensors but for the last bits, which depend on the batch of a z vector."""
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in folder.glob("*.safetensors"))
    for name in names:
        tensors, wanted = load_file(folder / name), load_file(expected / name)
        assert tensors.keys() == wanted.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_killed_at_many_moments(
    base: Path, facts: Path, tmp_path: Path, computed: dict[str, int]
) -> None:
    """Killed before file system calls that are spread evenly over the whole run."""
    reader, writer = os.pipe()

    def tell(number: int) -> None:
        os.write(writer, b".")

    def whole() -> None:
        at_file_calls(tmp_path / "whole", tell)
        edit(base, facts, tmp_path / "whole" / "to" / "out", tmp_path / "whole" / "cache")

    _, status = os.waitpid(in_child(whole), 0)
    assert os.WEXITSTATUS(status) == 0
    os.close(writer)
    calls = len(os.read(reader, 1 << 16))
    assert calls > 4 * POINTS
    whole_out = tmp_path / "whole" / "to" / "out"
    assert shards(whole_out) != shards(base)

    seen = []
    for point in range(POINTS + 1):
        number = 1 + point * calls // POINTS
        folder = tmp_path / str(point)
        out, cache = folder / "to" / "out", folder / "cache"

        def die(at: int, point: int = point, number: int = number, out: Path = out) -> None:
            # The last point is where the version has just appeared.
            if out.exists() if point == POINTS else at == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def killed(folder: Path = folder, out: Path = out, cache: Path = cache) -> None:
            at_file_calls(folder, die)
            edit(base, facts, out, cache)

        _, status = os.waitpid(in_child(killed), 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        there, z, moments = out.exists(), kept(cache, "targets"), kept(cache, "moments")
        seen.append((there, z, moments))
        if not there:
            computed.update(targets=0, count=0)
            ran = edit(base, facts, out, cache)
            assert ran.code == 0, ran.stderr
            # What was finished is used again.
            assert computed["targets"] == 3 - z
            assert (computed["count"] == 0) == (moments == 2)
            assert left_overs(out) == set()
        assert verify(LocalFiles(out)) == []
        same_weights(out, whole_out)
    # Before and after the statistics and the z vectors, and after the version appeared.
    assert {moments for _, _, moments in seen} >= {0, 2}
    assert {z for _, z, _ in seen} >= {0, 3}
    assert {there for there, _, _ in seen} == {False, True}


@pytest.mark.slow
def test_control_c_leaves_nothing_half_done(base: Path, facts: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "new" / "out", tmp_path / "cache"

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = edit(base, facts, out, cache, *ENDLESS).code
        (tmp_path / "code").write_text(str(code))

    child = in_child(work)
    wait_until(lambda: kept(cache, "moments") == 2)
    time.sleep(0.2)
    assert list(out.parent.glob(".out.partial-*"))
    os.kill(child, signal.SIGINT)
    os.waitpid(child, 0)
    assert (tmp_path / "code").read_text() == "1"
    assert not out.parent.exists()
    assert edit(base, facts, out, cache).code == 0


@pytest.mark.slow
def test_sigterm_to_a_real_process(base: Path, facts: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "new" / "out", tmp_path / "cache"
    command = [sys.executable, "-m", "workflows.cli", "edit", *PLAIN, *quick(base, cache), *ENDLESS]
    process = subprocess.Popen(
        [*command, "--facts", str(facts), "--out", str(out)],
        cwd=Path(__file__).parents[2],
        env=one_thread(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: kept(cache, "moments") == 2 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, stderr
    assert json.loads(stdout)["error"]["kind"] == "Stopped"
    assert "run the same command again" in stderr and "Traceback" not in stderr
    assert not out.parent.exists()
    assert not list(cache.rglob("*.partial"))


@pytest.mark.slow
def test_two_runs_to_one_place(base: Path, facts: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "new" / "out", tmp_path / "cache"

    def work() -> None:
        edit(base, facts, out, cache, *ENDLESS)

    child = in_child(work)
    try:
        wait_until(lambda: bool(list(out.parent.glob(".out.partial-*"))))
        ran = edit(base, facts, out, cache)
        assert ran.code == 4
        assert ran.error["kind"] == "LockError"
        assert "another run" in ran.error["message"]
        assert list(out.parent.glob(".out.partial-*")), "the first run must not be disturbed"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not out.exists()
    assert edit(base, facts, out, cache).code == 0
    assert left_overs(out) == set()
