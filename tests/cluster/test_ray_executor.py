"""The Ray executor on a small local cluster: who gets what, how errors arrive, what ends when.

The cluster belongs to this module, so an executor must not end it; that it ends what it started
itself is in `tests/integration/test_ray_equals_inline.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.dispatch import Rules
from cluster.executors import open_executor, prepare_ray
from cluster.placement import Placement
from memedit.errors import InputError, MemeditError, NumericalError
from memedit.executor import Failed, InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.solve import Update
from tests.cluster.processes import comes_true
from tests.heard import Heard
from tests.tiny import HIDDEN, INNER, save_tiny

if TYPE_CHECKING:
    from cluster.ray_executor import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WINDOW = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """Four pretended CPUs and two pretended GPUs on this machine."""
    prepare_ray(local=True)
    import ray

    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _system_config={"local_fs_capacity_threshold": 0.0},  # no disk to spill to
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    signal.signal(signal.SIGTERM, before)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def broken_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a NaN in a weight of its second block."""
    folder = tmp_path_factory.mktemp("broken")
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name in tensors:
                if "layers.1.mlp.up_proj" in name:
                    tensors[name][0, 0] = torch.nan
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def executor(ray_cluster: Any, model: Path) -> Iterator[RayExecutor]:
    opened: Any = open_executor("ray", ModelSpec(files=LocalFiles(model)), workers=2, threads=1)
    with opened:
        yield opened
    opened.close()  # again does nothing
    assert ray_cluster.is_initialized()
    # It is not this executor's cluster, but the actors were its own.
    assert comes_true(lambda: not any(_runs(seat.pid) for seat in opened.seats), within_s=20)


@pytest.fixture
def fresh(executor: RayExecutor, model: Path) -> RayExecutor:
    """The executor with an unedited model and no state."""
    executor.broadcast("load", ModelSpec(files=LocalFiles(model)))
    return executor


def windows(count: int) -> list[tuple[int, list[list[int]], tuple[int, ...], bool]]:
    """So many units for `count`."""
    return [(unit, [WINDOW], (1,), True) for unit in range(count)]


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_units_give_what_they_give_inline(fresh: RayExecutor, model: Path) -> None:
    units = [(1, length, length) for length in range(4, 15)]
    threads = torch.get_num_threads()
    try:
        inline = InlineExecutor(ModelSpec(files=LocalFiles(model)), threads=1)
        expected = dict(inline.map("sample", units))
    finally:
        torch.set_num_threads(threads)
    got = list(fresh.map("sample", units))
    assert sorted(unit for unit, _ in got) == list(range(len(units)))
    assert dict(got) == expected
    assert list(fresh.map("sample", [])) == []


def test_all_workers_take_part(fresh: RayExecutor) -> None:
    list(fresh.map("count", windows(20)))
    counted = [held.facts[1].tokens for held in fresh.broadcast("held", "moments")]
    assert sum(counted) == 20 * len(WINDOW)
    assert len(counted) == 2
    assert all(counted)


def test_sticky_units_return_to_their_worker(fresh: RayExecutor) -> None:
    # Powers of two as token counts: the sum at a worker says which units it had.
    sizes = [2, 4, 8, 16, 32, 64]
    units = [(10 + i, [[5] * size], (1,), True) for i, size in enumerate(sizes)]
    for _ in range(2):
        given = dict(fresh.map("count", units, sticky=True))
        assert [given[unit][:2] for unit in range(len(units))] == list(enumerate(sizes, 10))
        parts = fresh.broadcast("held", "moments")
        assert [part.units for part in parts] == [(10, 12, 14), (11, 13, 15)]
        assert [part.facts[1].tokens for part in parts] == [2 + 8 + 32, 4 + 16 + 64]
        fresh.broadcast("forget", "moments")


def test_few_units_go_to_all_workers(fresh: RayExecutor) -> None:
    list(fresh.map("count", windows(2), sticky=True))
    assert [held.units for held in fresh.broadcast("held", "moments")] == [(0,), (1,)]


def test_the_pools_of_a_worker_are_as_small_as_its_share(executor: RayExecutor) -> None:
    for seat in executor.seats:
        assert b"OMP_NUM_THREADS=1\0" in Path(f"/proc/{seat.pid}/environ").read_bytes()


def test_an_error_arrives_as_it_was_raised(
    fresh: RayExecutor, model: Path, broken_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as no_folder:
        fresh.broadcast("load", ModelSpec(files=LocalFiles(tmp_path / "absent")))
    assert type(no_folder.value) is InputError
    assert no_folder.value.source == tmp_path / "absent"
    assert "every machine" in no_folder.value.message
    with pytest.raises(InputError, match="the config could not be read") as no_model:
        list(fresh.map("load", [(ModelSpec(files=LocalFiles(tmp_path)),)] * 3))
    assert type(no_model.value) is InputError
    fresh.broadcast("load", ModelSpec(files=LocalFiles(broken_model)))
    with pytest.raises(NumericalError, match="layer 1 are not finite") as not_finite:
        list(fresh.map("count", windows(1)))
    assert type(not_finite.value) is NumericalError
    with pytest.raises(AttributeError, match="no_such_method") as mistake:
        fresh.broadcast("no_such_method")
    assert type(mistake.value) is AttributeError
    # None of this has hurt the workers.
    fresh.broadcast("load", ModelSpec(files=LocalFiles(model)))
    assert len(list(fresh.map("count", windows(3)))) == 3


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        ({"workers": 3, "gpus_per_worker": 1}, "gpus_per_worker", ["3 GPUs in all", "has 2;"]),
        ({"workers": 5}, "workers", ["5 CPUs in all", "has 4;"]),
    ],
)
def test_more_than_the_cluster_has_starts_nothing(
    ray_cluster: Any, model: Path, asked: dict[str, Any], field: str, words: list[str]
) -> None:
    def free() -> tuple[float, float]:
        resources = ray_cluster.available_resources()
        return resources["CPU"], resources["GPU"]

    before = free()
    with pytest.raises(InputError) as caught:
        open_executor("ray", ModelSpec(files=LocalFiles(model)), **asked)
    assert caught.value.field == field
    assert all(word in caught.value.message for word in words)
    assert free() == before


def test_a_gpu_device_without_gpus_is_refused(ray_cluster: Any, model: Path) -> None:
    with pytest.raises(InputError, match="say how many") as caught:
        open_executor("ray", ModelSpec(files=LocalFiles(model), device="cuda"))
    assert caught.value.field == "gpus_per_worker"


def test_the_device_of_a_worker(
    ray_cluster: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.ray_actor import Actor

    actor = Actor(Placement(workers=1, threads=1, gpus=1))
    on_cpu, on_gpu = (
        ModelSpec(files=LocalFiles(model), device=device) for device in ("cpu", "cuda:3")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert actor._here(on_cpu) == on_cpu
    assert actor._here(on_gpu) == ModelSpec(files=LocalFiles(model), device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"on 127\.0\.0\.1 sees no GPU") as caught:
        actor._here(on_gpu)
    assert caught.value.field == "device"


def test_a_killed_worker_is_replaced_by_one_in_the_same_state(
    ray_cluster: Any, model: Path
) -> None:
    spec = ModelSpec(files=LocalFiles(model))  # on the CPU, though it has a GPU
    heard = Heard()
    opened: Any = open_executor(
        "ray", spec, workers=1, threads=1, gpus_per_worker=1, progress=heard
    )
    update = Update(layer=1, left_NO=torch.ones(1, HIDDEN), right_NI=torch.ones(1, INNER))
    with opened as executor:
        before = list(executor.map("sample", [(2, 12, 0)]))
        executor.broadcast("load", spec)
        executor.broadcast("apply", update, torch.float32)
        edited = list(executor.map("sample", [(2, 12, 0)]))
        assert edited != before
        first = executor.seats[0]
        done = 0
        for _, (unit, tokens, _) in executor.map("count", windows(400)):
            assert tokens == len(WINDOW) and 0 <= unit < 400
            done += 1
            if done == 3:
                os.kill(first.pid, signal.SIGKILL)
        assert done >= 400
        assert executor.seats[0].pid != first.pid
        assert list(executor.map("sample", [(2, 12, 0)])) == edited
        # What the first had counted went with it, and nobody says that it is there.
        (held,) = executor.broadcast("held", "moments")
        assert len(held.units) == len(set(held.units)) < 400
        assert held.facts[1].tokens == len(WINDOW) * len(held.units)
        executor.broadcast("load", spec)
        assert list(executor.map("sample", [(2, 12, 0)])) == before
        os.kill(executor.seats[0].pid, signal.SIGKILL)  # while it has nothing to do
        assert list(executor.map("sample", [(2, 12, 0)])) == before
        os.kill(executor.seats[0].pid, signal.SIGKILL)
        assert executor.broadcast("sees", spec.files, "config.json") == [True]
    assert len(heard.texts) == 3
    assert f"worker 1 of 1 (process {first.pid} on 127.0.0.1) died: it was killed" in heard.texts[0]


def test_work_that_kills_each_worker_is_given_up(
    ray_cluster: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec(files=LocalFiles(model))
    rules = Rules(wait_s=0.1)
    units: list[Any] = [(unit, [WINDOW], (1,), True) for unit in range(20)]
    units[7] = (7, Deadly(), (1,), True)
    opened: Any = open_executor("ray", spec, workers=2, threads=1, rules=rules)
    with opened as executor:
        found = list(executor.map("count", units, give_up=True))
        failed = {index: item for index, item in found if isinstance(item, Failed)}
        assert failed.keys() == {7} and "attempt 3" in failed[7].reason
        assert {index for index, _ in found} == set(range(20))
        with pytest.raises(MemeditError, match="was killed or crashed; that was attempt 3"):
            list(executor.map("count", units))


class Deadly:
    """Windows that no process survives."""

    def __reduce__(self) -> Any:
        return (os._exit, (1,))


def test_a_worker_that_hangs_is_replaced(ray_cluster: Any, model: Path) -> None:
    spec = ModelSpec(files=LocalFiles(model))
    heard = Heard()
    rules = Rules(stall_s=6.0, wait_s=0.1)
    opened: Any = open_executor("ray", spec, workers=2, threads=1, rules=rules, progress=heard)
    with opened as executor:
        found: dict[int, Any] = {}
        for done, (index, item) in enumerate(
            executor.map("sample", [(1, 20, i) for i in range(60)])
        ):
            found[index] = item
            if done == 3:
                first = executor.seats[0]
                os.kill(first.pid, signal.SIGSTOP)
        assert found.keys() == set(range(60))
        assert executor.seats[0].pid != first.pid
    assert len(heard.texts) == 1 and "gave nothing for 6 s and was stopped" in heard.texts[0]
    failed = [report for report in heard.units if report.failure]
    assert len(failed) == 1 and failed[0].attempt == 1 and failed[0].seconds >= 6
    done = {report.unit_id: report for report in heard.units if not report.failure}
    assert sorted(done) == list(range(60)) and len(heard.units) == 61
    assert done[failed[0].unit_id].attempt == 2
    assert {report.work for report in heard.units} == {"sample"}


def test_a_new_worker_that_hangs_while_it_loads_is_replaced(
    ray_cluster: Any, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cluster import ray_crew
    from cluster.ray_actor import Actor

    stuck = tmp_path / "stuck"

    class StuckOnce(Actor):
        """The first one never gets beyond loading."""

        def begin(self, *arguments: Any) -> Any:
            if not stuck.exists():
                stuck.touch()
                time.sleep(3600)
            return super().begin(*arguments)

    heard = Heard()
    opened: Any = open_executor(
        "ray", ModelSpec(files=LocalFiles(model)), workers=2, threads=1, progress=heard
    )
    with opened as executor:
        first = executor.seats[0]
        executor.crew.rules = replace(executor.rules, stall_s=8.0)
        executor.crew._start_timeout_s = 8.0
        monkeypatch.setattr(ray_crew, "Actor", StuckOnce)
        os.kill(first.pid, signal.SIGKILL)
        units, end = [(1, 20, i) for i in range(4)], time.monotonic() + 120
        while (not heard.texts or len(executor.seats) < 2) and time.monotonic() < end:
            list(executor.map("sample", units))  # the other one goes on meanwhile
        assert len(executor.seats) == 2
    assert "died: it was killed" in heard.texts[0]
    assert "has not loaded the model within 8 s; another one" in heard.texts[1]


def test_a_long_unit_is_done_by_another_worker_too(ray_cluster: Any, model: Path) -> None:
    spec = ModelSpec(files=LocalFiles(model))
    opened: Any = open_executor("ray", spec, workers=2, threads=1)
    with opened as executor:
        found: dict[int, Any] = {}
        stopped = None
        calls = executor.map("sample", [(1, 20, i) for i in range(40)], copies=True)
        for done, (index, item) in enumerate(calls):
            found[index] = item
            if done == 20:
                stopped = executor.seats[0]
                os.kill(stopped.pid, signal.SIGSTOP)
        assert found.keys() == set(range(40)) and stopped is not None
        assert stopped in executor.seats  # it is not waited for, and not lost
        expected = dict(executor.map("sample", [(1, 20, i) for i in range(40)]))
        assert found == expected
        # What changes the model does not wait for it either.
        executor.broadcast("load", spec)
        assert stopped not in executor.seats


DRIVER = """
import signal, sys
from pathlib import Path
from cluster.executors import open_executor
from memedit.files import LocalFiles
from memedit.model import ModelSpec

def stop(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)  # a shell that runs tests in the background has it ignored
spec = ModelSpec(files=LocalFiles(Path(sys.argv[1])))
with open_executor("ray", spec, address=sys.argv[2], workers=1, threads=1) as executor:
    try:
        print(executor.seats[0].pid, flush=True)
        while True:
            list(executor.map("count", [(0, [[5] * 200], (1,), True)] * 50))
    except KeyboardInterrupt:
        pass
    try:
        print("once", flush=True)  # inside, for the next signal may come as soon as it is read
        while True:
            list(executor.map("count", [(0, [[5] * 200], (1,), True)] * 50))
    except KeyboardInterrupt:
        pass
print("twice", flush=True)
"""


def test_signals_end_the_work_and_closing_ends_the_actors(ray_cluster: Any, model: Path) -> None:
    address = ray_cluster.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(model), address],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert driver.stdout is not None
        worker = int(driver.stdout.readline())
        assert _runs(worker)
        driver.send_signal(signal.SIGTERM)
        assert driver.stdout.readline() == "once\n"
        driver.send_signal(signal.SIGINT)
        said, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert said == "twice\n"
    assert driver.returncode == 0
    assert comes_true(lambda: not _runs(worker), within_s=20)
    # It was connected to a cluster that it had not started.
    assert [node["Alive"] for node in ray_cluster.nodes()] == [True]


def test_a_full_object_store_says_what_to_do(fresh: RayExecutor, ray_cluster: Any) -> None:
    from ray.exceptions import OutOfDiskError

    held = [ray_cluster.put(torch.zeros(5 << 20)) for _ in range(3)]
    for work in (
        lambda: fresh.broadcast("held", torch.zeros(10 << 20)),
        lambda: list(fresh.map("sample", [(torch.zeros(10 << 20),)])),
    ):
        with pytest.raises(MemeditError, match="--object-store-memory"):
            work()
    unit = (1, 10, 0)
    assert len(list(fresh.map("sample", [unit]))) == 1  # goes on
    del held
    why = fresh.crew.obituary(fresh.crew.slots[0], OutOfDiskError("Local disk is full"))
    assert "no room for its results" in why and "killed" not in why
