"""All of a folder becomes visible, or nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from memedit.errors import GateError, InputError, LockError
from memedit.files import LocalFiles
from memedit.lock import exclusive_lock
from memedit.manifest import read_manifest
from memedit.publication import Publication, check_out
from memedit.verify import verify
from tests.memedit.test_manifest import manifest_of


def publish(out: Path, run_id: str = "run-1") -> None:
    with Publication(out, run_id=run_id) as publication:
        (publication.staging / "config.json").write_text("{}")
        publication.publish(manifest_of(run_id=run_id, tensors={}))


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_publishes_with_every_file_listed(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with Publication(out, run_id="r") as publication:
        assert not out.exists()
        (publication.staging / "sub").mkdir()
        (publication.staging / "sub" / "report.html").write_text("<html>")
        written = publication.publish(manifest_of(tensors={}))
        assert publication.published
    assert written.files.keys() == {"sub/report.html"}
    assert read_manifest(out).files == written.files
    assert verify(LocalFiles(out)) == []
    assert names(out.parent) == {"out"}


def test_an_empty_folder_in_the_way_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out")
    assert verify(LocalFiles(tmp_path / "out")) == []


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    publish(tmp_path / "out")
    assert verify(LocalFiles(tmp_path / "disk")) == [] and (tmp_path / "out").is_symlink()


def test_a_folder_that_is_not_empty_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("text")
    with pytest.raises(InputError, match=r"out.*not empty"):
        publish(tmp_path / "out")
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"mine"}


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("text")
    with pytest.raises(InputError, match="is a file"):
        check_out(tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        publish(tmp_path / "out")
    with pytest.raises(InputError, match="cannot be written to"):
        publish(tmp_path / "out" / "below")


def test_a_folder_filled_meanwhile_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(InputError, match="not empty"),
        Publication(out, run_id="r") as publication,
    ):
        out.mkdir()
        (out / "mine").write_text("text")
        publication.publish(manifest_of())
    assert names(tmp_path) == {"out"} and names(out) == {"mine"}


@pytest.mark.parametrize("error", [GateError("below 80"), KeyboardInterrupt(), OSError("full")])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "made" / "for" / "out"
    with pytest.raises(type(error)), Publication(out, run_id="r") as publication:
        (publication.staging / "half").write_text("x")
        raise error
    assert names(tmp_path) == set()


def test_leaving_without_publishing_leaves_nothing(tmp_path: Path) -> None:
    with Publication(tmp_path / "out", run_id="r") as publication:
        (publication.staging / "half").write_text("x")
    assert names(tmp_path) == set()


def test_a_listed_file_that_is_not_there_stops_the_publication(tmp_path: Path) -> None:
    with Publication(tmp_path / "other", run_id="r") as publication:
        (publication.staging / "w").write_text("x")
        listed = publication.publish(manifest_of()).files
    with (
        pytest.raises(FileNotFoundError, match="w"),
        Publication(tmp_path / "out", run_id="r") as publication,
    ):
        publication.publish(manifest_of(files=listed))
    assert names(tmp_path) == {"other"}


def test_what_dead_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("")
    stale = tmp_path / ".out.partial-dead"
    others = [tmp_path / ".out2.partial-alive", tmp_path / ".out.partial-x.partial-alive"]
    for folder in (stale, *others):
        folder.mkdir()
        (folder / "half").write_text("x")
    publish(tmp_path / "out")
    assert names(tmp_path) == {"out", *(p.name for p in others)}


def test_two_runs_to_the_same_place(tmp_path: Path) -> None:
    with Publication(tmp_path / "out", run_id="first") as publication:
        (publication.staging / "config.json").write_text("{}")
        with pytest.raises(LockError, match=r"\.out\.lock: another run holds") as caught:
            publish(tmp_path / "out", "second")
        assert caught.value.exit_code == 4
        publish(tmp_path / "elsewhere")
        publication.publish(manifest_of(run_id="first"))
    assert read_manifest(tmp_path / "out").run_id == "first"


@pytest.mark.parametrize("run_id", ["", "a/b", "..", "a.b", "a b"])
def test_a_run_id_that_is_no_name_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(InputError, match="run_id"):
        Publication(tmp_path / "out", run_id=run_id)


def test_the_root_is_no_place_to_publish_to() -> None:
    with pytest.raises(InputError, match="not a folder to publish to"):
        Publication(Path("/"), run_id="r")


def test_a_waiting_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with exclusive_lock(tmp_path / "lock", wait=True):
                inside.append(number)
                time.sleep(0.001)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == [1] * 20
    assert names(tmp_path) == set()
