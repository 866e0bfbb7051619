"""What one machine has finished is found by another, through a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import depot
from cluster.artifacts import Artifacts, open_artifacts
from cluster.kept_moments import KeptMoments, windows_digest
from memedit.errors import InputError, LockError, MemeditError
from memedit.executor import InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.worker import Worker
from tests.cluster.s3_places import Bucket
from tests.cluster.test_artifacts import DIGEST, a_moment, a_target
from tests.cluster.test_collect import LAYERS, Killed, counted, small_rounds
from tests.cluster.test_lease import die
from tests.s3.server import SeaweedServer
from tests.tiny import VOCAB, save_tiny

OTHER = "cd" * 32


@pytest.fixture
def bucket(s3_server: SeaweedServer) -> Bucket:
    return Bucket(s3_server)


@pytest.fixture(params=["small", "in parts"])
def machines(
    request: pytest.FixtureRequest, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Artifacts, Artifacts]:
    """The finished work as two machines see it."""
    if request.param == "in parts":
        monkeypatch.setattr(depot, "_SMALL_BYTES", 16)
    one, two = (open_artifacts(f"{s3}/work", cache=tmp_path / name) for name in ("one", "two"))
    assert one.location == f"{s3}/work"
    return one, two


def test_all_of_it_is_there_for_the_next(machines: tuple[Artifacts, Artifacts]) -> None:
    one, two = machines
    assert not two.has_moment(DIGEST) and two.moment(DIGEST) is None
    assert two.targets({"fact": DIGEST}) == {} and two.windows(DIGEST) is None
    one.keep_moment(DIGEST, a_moment())
    one.keep_target(DIGEST, a_target())
    one.keep_target(OTHER, a_target())
    one.keep_windows(DIGEST, [[1, 2], [3, 4]])
    assert two.has_moment(DIGEST)
    moment = two.moment(DIGEST)
    assert moment is not None and torch.equal(moment.sum_II, a_moment().sum_II)
    digests = {"a": DIGEST, "b": OTHER, "c": "ef" * 32}
    targets = two.targets(digests)
    assert targets.keys() == {"a", "b"}
    assert torch.equal(targets["a"].z_O, a_target().z_O) and targets["a"].case_id == "a"
    assert two.windows(DIGEST) == [[1, 2], [3, 4]]
    # Found before, it needs no request.
    again = Artifacts(two.folder)
    assert again.targets(digests).keys() == {"a", "b"} and again.has_moment(DIGEST)


def test_kept_twice_is_kept_once(machines: tuple[Artifacts, Artifacts]) -> None:
    for machine in machines:
        machine.keep_moment(DIGEST, a_moment())
        machine.keep_target(DIGEST, a_target())
    assert all(machine.has_moment(DIGEST) for machine in machines)


def test_what_was_kept_before_the_depot_was_known_gets_there(
    machines: tuple[Artifacts, Artifacts],
) -> None:
    """Or by a run that was killed before it had sent it."""
    one, two = machines
    alone = Artifacts(one.folder)
    alone.keep_moment(DIGEST, a_moment())
    alone.keep_target(DIGEST, a_target())
    assert not two.has_moment(DIGEST) and two.targets({"fact": DIGEST}) == {}
    assert one.has_moment(DIGEST) and one.targets({"fact": DIGEST})
    assert two.has_moment(DIGEST) and two.targets({"fact": DIGEST})


def test_no_nan_is_taken_for_finished(machines: tuple[Artifacts, Artifacts]) -> None:
    one, two = machines
    moment, target = a_moment(), a_target()
    moment.sum_II[3, 3] = target.z_O[2] = float("nan")
    one.keep_moment(DIGEST, moment)
    one.keep_target(DIGEST, target)
    for machine in machines:
        assert machine.moment(DIGEST) is None and machine.targets({"fact": DIGEST}) == {}
    two.keep_moment(DIGEST, a_moment())
    assert two.moment(DIGEST) is not None


def test_what_is_damaged_here_is_fetched_again(machines: tuple[Artifacts, Artifacts]) -> None:
    one, _ = machines
    one.keep_moment(DIGEST, a_moment())
    for file in one.folder.rglob("*.safetensors"):
        file.write_bytes(b"nonsense")
    assert one.moment(DIGEST) is not None


def test_what_is_damaged_there_can_be_kept_again(
    machines: tuple[Artifacts, Artifacts], bucket: Bucket
) -> None:
    one, two = machines
    one.keep_moment(DIGEST, a_moment())
    name = f"moments/{DIGEST[:2]}/{DIGEST}.safetensors"
    bucket.put(f"{one.location}/{name}", b"nonsense, and much more of it than sixteen bytes")
    assert two.moment(DIGEST) is None
    assert bucket.get(f"{one.location}/{name}")  # not this machine's to remove
    two.keep_moment(DIGEST, a_moment())
    (two.folder / name).unlink()
    assert two.moment(DIGEST) is not None


@pytest.mark.parametrize("place", ["s3://nobody-has-such-a-bucket/work", "s3://Wrong/work"])
def test_a_place_that_cannot_be_written_is_refused_at_once(
    s3: str, tmp_path: Path, place: str
) -> None:
    with pytest.raises(InputError, match=place.split("/")[2]):
        open_artifacts(place, cache=tmp_path)


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    found = open_artifacts(str(tmp_path / "shared"), cache=tmp_path / "cache")
    assert (found.folder, found.depot) == (tmp_path / "shared", None)
    assert open_artifacts(None, cache=tmp_path / "cache").folder == tmp_path / "cache"


# --- Counting -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InlineExecutor]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    with InlineExecutor(ModelSpec(files=LocalFiles(folder))) as made:
        yield made


@pytest.mark.usefixtures(small_rounds.__name__)
def test_a_killed_collection_goes_on_elsewhere(
    machines: tuple[Artifacts, Artifacts],
    executor: InlineExecutor,
    monkeypatch: pytest.MonkeyPatch,
    bucket: Bucket,
) -> None:
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(3, VOCAB, (32,), generator=generator).tolist() for _ in range(20)]
    whole = counted(executor, windows)
    one, two = (KeptMoments(machine, windows_digest(windows)) for machine in machines)
    count, units, most = Worker.count, list[int](), 7

    def counting(worker: Worker, unit: int, *rest: Any) -> Iterator[Any]:
        if len(units) == most:
            raise Killed
        units.append(unit)
        yield from count(worker, unit, *rest)

    monkeypatch.setattr(Worker, "count", counting)
    with one.held() as held, pytest.raises(Killed):
        counted(executor, windows, held)
    executor.broadcast("forget", "moments")  # it went with its process
    assert two.load()[0] == frozenset(range(6))
    units.clear()
    most = -1
    with two.held() as held:
        moments = counted(executor, windows, held)
    assert sorted(units) == [6, 7, 8, 9]
    for layer in LAYERS:
        assert moments[layer].tokens == whole[layer].tokens == 20 * 32
        difference = (moments[layer].sum_II - whole[layer].sum_II).norm()
        assert difference <= 1e-12 * whole[layer].sum_II.norm()
    assert bucket.is_clean(machines[0].location)  # nothing of it is needed any more


def test_a_collection_belongs_to_one_machine(
    machines: tuple[Artifacts, Artifacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEDIT_LEASE_S", "2")
    one, two = (KeptMoments(machine, "digest") for machine in machines)
    with one.held() as mine, two.held() as theirs:
        assert (mine, theirs) == (one, None)
    with two.held() as theirs:
        assert theirs is two


def test_what_another_machine_has_taken_over_is_its_own(
    machines: tuple[Artifacts, Artifacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stood still for too long counts on, keeps nothing more, and removes nothing."""
    monkeypatch.setenv("MEMEDIT_LEASE_S", "1")
    one, two = (KeptMoments(machine, "digest") for machine in machines)
    with one.held() as mine:
        assert mine is one and one._lease is not None
        one.save([0], [a_moment()])
        die(one._lease)  # type: ignore[arg-type]
        with two.held() as theirs:
            assert theirs is two
            two.save([0, 1], [a_moment()])
            with pytest.raises(LockError):
                one.save([0, 1, 2], [a_moment()])
            one.forget()
            units, moments = two.load()
            assert units == {0, 1} and torch.equal(moments[5].sum_II, a_moment().sum_II)


@pytest.mark.usefixtures(small_rounds.__name__)
@pytest.mark.parametrize("error", [LockError("taken over"), MemeditError("storage is away")])
def test_counting_goes_on_where_nothing_can_be_kept(
    executor: InlineExecutor, monkeypatch: pytest.MonkeyPatch, error: MemeditError, tmp_path: Path
) -> None:
    windows = [[5 + n, *range(20, 50)] for n in range(12)]
    whole = counted(executor, windows)
    kept = KeptMoments(Artifacts(tmp_path), windows_digest(windows))

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(kept, "save", fails)
    moments = counted(executor, windows, kept)
    for layer in LAYERS:
        assert torch.equal(moments[layer].sum_II, whole[layer].sum_II)


@pytest.mark.usefixtures(small_rounds.__name__)
@pytest.mark.parametrize("broken", ["_drop", "load"])
def test_counting_goes_on_after_a_save_that_was_not_finished(
    machines: tuple[Artifacts, Artifacts],
    executor: InlineExecutor,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    """The second save writes all, and then the storage is away."""
    windows = [[5 + n, *range(20, 50)] for n in range(12)]
    whole = counted(executor, windows)
    kept = KeptMoments(machines[0], windows_digest(windows))
    real, calls = getattr(kept, broken), list[int]()

    def fails(**given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemeditError("storage is away")
        return real(**given)

    monkeypatch.setattr(kept, broken, fails)
    moments = counted(executor, windows, kept)
    assert len(calls) > 2
    for layer in LAYERS:
        assert moments[layer].tokens == whole[layer].tokens
        difference = (moments[layer].sum_II - whole[layer].sum_II).norm()
        assert difference <= 1e-12 * whole[layer].sum_II.norm()
