"""`memedit ingest` that is killed anywhere: no fact lost, none twice, one version, right marks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memedit.files import LocalFiles
from memedit.verify import verify
from tests.faults.test_lost_machines import check_update
from tests.faults.test_publish_kill import die_at_call, in_child
from tests.tiny import save_tiny
from tests.workflows.ingestion.nights import DARRIEUX, EIFFEL, TOYOTA, Nights, targets
from tests.workflows.runs import without_plots

pytestmark = pytest.mark.slow

SPREAD = 12
LAST = (2, 5, 9, 20, 35, 50)
"""Calls before the end, where the version is in use and the marks move."""
MADRID = {**EIFFEL, "target_new": "Madrid"}
SECOND = ({"id": "darrieux", "retracted": True}, TOYOTA, MADRID, {"subject": "no prompt"})
SOURCE = {"kind": "files", "path": "inbox/*.jsonl", "name": "inbox", "after": "archive"}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """A registry after its first night, with the files of the second delivered."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("killed")
    nights = Nights(
        folder=folder / "first", base=save_tiny(folder / "base"), cache=folder / "cache"
    )
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        nights.deliver("1", EIFFEL, DARRIEUX)
        assert nights.ingest(source=SOURCE).result["status"] == "published"
    nights.deliver("2", *SECOND)
    return nights


def night_of(first: Nights, folder: Path) -> Nights:
    shutil.copytree(first.folder, folder, symlinks=True)
    return Nights(folder=folder, base=first.base, cache=first.cache)


def run_in_child(nights: Nights, prepare: Callable[[], None]) -> int:
    """The signal that ended a run in a process of its own; 0 if it ended by itself, and well."""

    def work() -> None:
        # What it says is of no interest, and pytest's capture is not to be shared.
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        prepare()
        assert nights.ingest(source=SOURCE).code == 0

    _, status = os.waitpid(in_child(work), 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return 0


def count_calls(nights: Nights) -> int:
    """How many calls to the file system a whole run makes in its folder."""
    counted = nights.folder.parent / "calls"

    def prepare() -> None:
        calls = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal calls
            if event in ("import", "compile", "exec") or str(nights.folder) not in str(arguments):
                return
            calls += 1
            os.pwrite(handle, f"{calls:8d}".encode(), 0)

        handle = os.open(counted, os.O_WRONLY | os.O_CREAT)
        sys.addaudithook(count)

    assert run_in_child(nights, prepare) == 0
    return int(counted.read_text())


def check(nights: Nights, quiet: Nights) -> None:
    """All is as after a night in which nothing happened."""
    assert nights.said() == targets([TOYOTA, MADRID])
    check_update(nights.version, quiet.version, nights.base)
    assert verify(LocalFiles(nights.version)) == []
    assert len(nights.versions()) == 2
    head, mark = nights.read("facts/HEAD"), nights.read("facts/WATERMARK")
    assert (mark["run_id"], mark["read"]) == (nights.current, head["read"])
    assert nights.read(f"runs/{nights.current}.json")["status"] == "published"
    moves = nights.read("CURRENT")["moves"]
    assert [move["version"] for move in moves].count(nights.current) == 1
    listed = nights.facts("list", "--state", "any").result
    assert listed["states"] == {"active": 2, "superseded": 1, "retracted": 1}
    assert len(nights.facts("rejects").result["rejects"]) == 1
    assert [p.name for p in (nights.folder / "inbox").glob("*.jsonl")] == []
    assert sorted(p.name for p in (nights.folder / "inbox/archive").iterdir()) == [
        "1.jsonl",
        "2.jsonl",
    ]
    # A lock file that nobody holds may be left, and nothing else.
    found = {p.name for p in (nights.registry / "versions").iterdir() if p.suffix != ".lock"}
    assert found == set(nights.versions())


def test_killed_at_points_spread_over_a_whole_run(
    first: Nights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_plots(monkeypatch)
    quiet = night_of(first, tmp_path / "quiet")
    calls = count_calls(quiet)
    check(quiet, quiet)
    killed, stages = 0, set()
    spread = [1 + point * calls // SPREAD for point in range(SPREAD)]
    for number in (*spread, *(calls - before for before in LAST)):
        nights = night_of(first, tmp_path / str(number))
        ended = run_in_child(nights, lambda n=number, f=nights.folder: die_at_call(n, f))  # type: ignore[misc]
        killed += ended == signal.SIGKILL
        stages.add((nights.current == first.current, _sequence(nights)))
        again = nights.ingest(source=SOURCE).result
        assert again["status"] in ("published", "unchanged")
        check(nights, quiet)
        assert nights.ingest(source=SOURCE).result["status"] == "unchanged"
        shutil.rmtree(nights.folder)
    assert killed >= 15
    # Before and after the facts were registered, and before and after the version was in use.
    assert stages == {(True, 1), (True, 2), (False, 2)}


def _sequence(nights: Nights) -> int:
    head = json.loads((nights.registry / "facts/HEAD").read_text())
    return int(head["sequence"])
