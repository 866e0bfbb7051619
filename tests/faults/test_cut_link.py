"""Two machines whose link is cut in the middle of the z vectors, and comes back later."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.processes import comes_true
from tests.faults.linked_machines import ADDRESS, OTHER, linked_machines
from tests.tiny import save_tiny
from tests.workflows.runs import FACTS, PLAIN, SETTINGS, memedit, quick, shards, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FACTS_IN_ALL, FACTS_PER_UNIT = 24, 2
ONE_AT_A_TIME = "targets.tokens_per_batch=1"
"""A z vector is the same to the last bit only if it is computed in the same batch."""
COUNTED_EDIT = """
import sys
from cluster.ray_executor import RayExecutor
from workflows.cli import main

call, given = RayExecutor._call, sys.argv.pop(1)

def counted(self, slot, method, unit):
    if method == "targets":
        with open(given, "a") as file:
            file.writelines(f"{fact.request.case_id}\\n" for fact in unit[0])
    return call(self, slot, method, unit)

RayExecutor._call = counted
main()
"""
"""An edit that writes down which facts it gives to workers."""


def test_a_machine_behind_a_cut_link_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = save_tiny(tmp_path / "base", bos=True)
    rows = [
        {k: v for k, v in fact.items() if k != "id"} | {"subject": f"{fact['subject']} {number}"}
        for number in range(FACTS_IN_ALL // len(FACTS))
        for fact in FACTS
    ]
    facts = write_rows(tmp_path / "facts.jsonl", rows)
    slow = (*SETTINGS, ONE_AT_A_TIME, "targets.steps=300", "targets.lr=0.01")

    def flags(name: str) -> list[str]:
        places = ["--facts", str(facts), "--out", str(tmp_path / name)]
        return ["edit", *PLAIN, *quick(folder, tmp_path / f"{name}-cache", settings=slow), *places]

    def kept() -> int:
        return len(list((tmp_path / "cut-cache" / "targets").rglob("*.safetensors")))

    given, log = tmp_path / "given", "edit.log"
    with linked_machines() as machines:
        machines.lead()
        other = machines.join()
        assert comes_true(lambda: machines.alive() == 2, within_s=60), machines.told()
        command = [sys.executable, "-c", COUNTED_EDIT, str(given), *flags("cut")]
        command += ["--executor", "ray", "--address", ADDRESS, "--workers", "2"]
        edit = machines.start(command, at=0, log=log)
        assert comes_true(lambda: kept() >= 4 or edit.poll() is not None, within_s=120)
        assert edit.poll() is None, machines.told()
        machines.cut()
        before = kept()
        lost = f"on {OTHER}) died"
        told = machines.folder / log
        assert comes_true(lambda: lost in told.read_text(), within_s=60), machines.told()
        assert edit.poll() is None and kept() < FACTS_IN_ALL, machines.told()
        machines.mend()  # what the other one has made meanwhile is of no use any more
        other.wait(60)  # Ray leaves a machine that it has given up
        assert edit.wait(120) == 0, machines.told()
        assert told.read_text().count("died") == 1
    assert 4 <= before < FACTS_IN_ALL

    # At most two units were under way there; at the end one more may seem slow.
    times = Counter(given.read_text().split())
    assert len(times) == kept() == FACTS_IN_ALL
    assert 1 <= times.total() - FACTS_IN_ALL <= 3 * FACTS_PER_UNIT
    quiet = memedit(*flags("quiet"))
    assert quiet.code == 0, quiet.stderr
    assert shards(tmp_path / "cut") == shards(tmp_path / "quiet")
    assert shards(tmp_path / "cut") != shards(folder)
