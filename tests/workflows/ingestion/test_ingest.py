"""`memedit ingest` on a tiny model: what becomes of the facts, and when nothing is published."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.store import open_store
from memedit.errors import MemeditError
from memedit.files import LocalFiles
from memedit.manifest import read_manifest
from memedit.progress import Silent
from memedit.verify import verify
from memedit.worker import Worker
from tests.tiny import save_tiny
from tests.workflows.ingestion.nights import (
    DARRIEUX,
    EIFFEL,
    QUICK,
    TOYOTA,
    Nights,
    targets,
)
from tests.workflows.runs import contents, memedit, shards, without_plots, write_rows
from workflows.ingest import ingest
from workflows.ingestion.settings import IngestJob
from workflows.jobfile import load_job

PARIS = {**EIFFEL, "target_new": "Madrid"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def nights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    without_plots(monkeypatch)
    return Nights(folder=tmp_path / "nights", base=base, cache=tmp_path / "cache")


@pytest.fixture
def first(nights: Nights) -> Nights:
    """After the first night, with three facts."""
    nights.deliver("1", EIFFEL, DARRIEUX, TOYOTA)
    assert nights.ingest().result["status"] == "published"
    return nights


def test_the_first_run_publishes_what_the_table_says(nights: Nights) -> None:
    nights.deliver("1", EIFFEL, DARRIEUX)
    result = nights.ingest().result
    assert result["status"] == "published"
    assert result["version"] == result["run_id"] == nights.current
    assert result["path"] == f"versions/{nights.current}"
    assert result["facts"] == {
        "active": 2,
        "added": 2,
        "superseded": 0,
        "retracted": 0,
        "rejected": 0,
    }
    assert result["targets"] == {"computed": 2, "reused": 0}
    assert set(result["metrics"]) == {"before", "after"}
    assert {"read", "load", "targets", "total"} <= set(result["timings_s"])
    assert nights.said() == targets([EIFFEL, DARRIEUX])
    assert verify(LocalFiles(nights.version)) == []
    AutoModelForCausalLM.from_pretrained(nights.version)
    assert nights.read("facts/WATERMARK")["run_id"] == nights.current
    assert nights.read("facts/WATERMARK")["read"] == nights.read("facts/HEAD")["read"]
    assert nights.read(f"runs/{nights.current}.json")["status"] == "published"
    assert nights.current in (nights.registry / "history.html").read_text()


def test_with_nothing_new_nothing_is_done(first: Nights) -> None:
    before = contents(first.registry)
    result = first.ingest().result
    assert (result["status"], result["targets"]["computed"]) == ("unchanged", 0)
    assert result["metrics"]["after"] == read_manifest(first.version).metrics["after"]
    assert contents(first.registry) == before
    # memit repairs nothing, so that how it would is no reason to write a version.
    assert first.ingest("--set", "repair.rounds=5").result["status"] == "unchanged"


def test_an_empty_inbox_is_no_error_but_a_missing_one_is(nights: Nights) -> None:
    (nights.folder / "inbox").mkdir(parents=True)
    assert nights.ingest().result["status"] == "unchanged"
    assert nights.current is None
    (nights.folder / "inbox").rmdir()
    ran = nights.ingest()
    assert (ran.code, ran.error["field"]) == (2, "source.path")


def test_new_corrected_and_retracted_facts_in_one_night(first: Nights) -> None:
    louvre = {"id": "louvre", "subject": "Louvre", "prompt": "{} stands in", "target_new": "Rome"}
    first.deliver("2", louvre, PARIS, {"id": "toyota", "retracted": True})
    result = first.ingest().result
    assert result["facts"] == {
        "active": 3,
        "added": 2,
        "superseded": 1,
        "retracted": 1,
        "rejected": 0,
    }
    assert result["targets"] == {"computed": 2, "reused": 1}
    assert first.said() == targets([PARIS, DARRIEUX, louvre])


def test_facts_that_are_as_they_once_were_need_no_new_version(first: Nights) -> None:
    once = first.current
    first.deliver("2", PARIS)
    assert first.ingest().result["status"] == "published"
    assert first.current != once
    first.deliver("3", EIFFEL)
    result = first.ingest().result
    assert (result["status"], result["version"]) == ("published", once)
    assert result["targets"] == {"computed": 0, "reused": 0}
    assert first.current == once and len(first.versions()) == 2
    assert first.read("facts/WATERMARK")["run_id"] == once


def test_changes_by_hand_are_published_by_the_next_run(first: Nights) -> None:
    assert first.facts("retract", "toyota", "--why", "not true").result["active"] == 2
    more = write_rows(first.folder / "more.jsonl", [{**TOYOTA, "id": "t2", "target_new": "France"}])
    assert first.facts("add", more).result["active"] == 3
    result = first.ingest().result
    assert result["facts"]["added"] == 1
    assert first.said() == targets([EIFFEL, DARRIEUX]) | {("t2", "France")}
    (told,) = first.facts("why", "t2").result["facts"]
    assert (told["state"], told["versions"]) == ("active", [first.current])


def test_bad_rows_are_kept_and_can_be_mended(first: Nights) -> None:
    wrong = {"id": "wrong", "subject": "Louvre", "prompt": "no hole in", "target_new": "Rome"}
    first.deliver("2", wrong, "{broken", {"id": "nobody", "retracted": True})
    result = first.ingest().result
    assert (result["status"], result["facts"]["rejected"]) == ("unchanged", 3)
    rejects = first.facts("rejects").result["rejects"]
    assert {r["row"] for r in rejects} == {1, 2, 3}
    assert json.loads(rejects[0]["raw"]) == wrong
    first.deliver("2", {**wrong, "prompt": "{} stands in"}, "{broken")
    assert first.ingest().result["facts"]["added"] == 1
    # The row that is still broken was told again.
    assert len(first.facts("rejects").result["rejects"]) == 4


def test_a_bad_row_can_stop_the_run(nights: Nights) -> None:
    nights.deliver("1", EIFFEL, {"subject": "Louvre"})
    ran = nights.ingest(on_bad_row="fail")
    assert (ran.code, ran.error["row"], ran.error["field"]) == (2, 2, "prompt")
    assert not (nights.registry / "facts").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(first: Nights) -> None:
    first.deliver("2", PARIS, {"subject": "Louvre"})
    before = contents(first.registry)
    result = first.ingest("--dry-run").result
    assert (result["status"], result["version"]) == ("planned", first.current)
    assert result["facts"] == {
        "active": 3,
        "added": 1,
        "superseded": 1,
        "retracted": 0,
        "rejected": 1,
    }
    assert result["changes"]["would"] == "publish a new version"
    assert result["targets"] == {"computed": 1, "reused": 2}
    assert [f["target_new"] for f in result["changes"]["added"]] == ["Madrid"]
    assert contents(first.registry) == before
    assert first.ingest().result["run_id"] == result["run_id"]


# --- gates ---------------------------------------------------------------------------------------


def test_a_gate_that_is_not_met_publishes_nothing_and_says_which_facts_hurt(
    first: Nights,
) -> None:
    was = first.current
    first.deliver("2", PARIS)
    ran = first.ingest(gates=["generation>=101"])
    assert ran.code == 3
    result = json.loads(ran.stdout)
    assert (result["status"], result["version"]) == ("gated", was)
    assert first.current == was and len(first.versions()) == 1
    record = first.read(f"runs/{result['run_id']}.json")
    assert record["status"] == "gated" and "generation" in record["missed"][0]
    assert record["hurt"] == result["hurt"]
    assert {h["id"] for h in result["hurt"]} <= {"eiffel", "darrieux", "toyota"}
    assert Path(result["report"]).read_text().startswith("<html>")
    assert first.read("facts/WATERMARK")["run_id"] == was
    # The facts are registered: with another gate they are published without being delivered again.
    result = first.ingest(gates=["generation>=0"]).result
    assert (result["status"], result["targets"]["computed"]) == ("published", 0)


def test_gates_compare_with_the_base_and_the_version_before(first: Nights) -> None:
    first.deliver("2", PARIS)
    gates = ["all.generation>=previous+101", "perplexity<=base*0.0001", "new.generation>=0"]
    ran = first.ingest(gates=gates)
    missed = json.loads(ran.stdout)["notes"][-1]
    assert ran.code == 3
    assert "all.generation>=previous+101" in missed and "perplexity<=base*0.0001" in missed
    assert "new.generation" not in missed.splitlines()[0]
    assert first.ingest(gates=["perplexity<=previous*100"]).result["status"] == "published"


def test_without_a_version_before_there_is_nothing_to_compare_with(nights: Nights) -> None:
    nights.deliver("1", EIFFEL)
    assert nights.ingest(gates=["generation>=previous+1"]).result["status"] == "published"


def test_a_gate_that_cannot_be_measured_is_refused_before_the_work(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.deliver("1", TOYOTA)
    monkeypatch.setattr(Worker, "targets", None)
    ran = nights.ingest(gates=["score>=1"])
    assert (ran.code, ran.error["field"]) == (2, "gate")


def test_canaries_decide(first: Nights) -> None:
    first.deliver("2", PARIS)
    canaries = [{"prompt": "The Louvre is located in", "expect": "zebra", "tokens": 3}]
    write_rows(first.folder / "canary.jsonl", canaries)
    ran = first.ingest(canary="canary.jsonl")
    assert ran.code == 3 and "canary.jsonl:1" in json.loads(ran.stdout)["notes"][-1]
    write_rows(first.folder / "canary.jsonl", [{"prompt": "The Louvre", "forbid": ["zebra"]}])
    assert first.ingest(canary="canary.jsonl").result["status"] == "published"


def test_old_facts_are_judged_every_night_though_they_are_not_new(first: Nights) -> None:
    louvre = {"id": "louvre", "subject": "Louvre", "prompt": "{} stands in", "target_new": "Rome"}
    first.deliver("2", louvre)
    first.ingest(judged_new=1, judged_all=10)
    groups = first.read(f"runs/{first.current}.json")["groups"]
    assert set(groups) == {"new", "all"}
    assert groups["all"]["efficacy"] is not None  # of the facts of the first night
    assert groups["new"]["efficacy"] is None  # the new one has no target_true


# --- what the model cannot take ------------------------------------------------------------------


def test_a_fact_that_is_too_long_is_quarantined_and_the_rest_goes_on(nights: Nights) -> None:
    endless = {**TOYOTA, "id": "long", "prompt": "{} " + "and so on " * 400}
    nights.deliver("1", EIFFEL, endless)
    result = nights.ingest().result
    assert (result["status"], result["facts"]["active"]) == ("published", 1)
    (told,) = nights.facts("why", "long").result["facts"]
    assert told["state"] == "quarantined" and "tokens" in told["reason"]
    assert nights.ingest().result["status"] == "unchanged"


def test_a_fact_that_has_become_too_long_is_quarantined_too(first: Nights) -> None:
    """Its z vector is as before, and so is it not new."""
    first.deliver("2", {**TOYOTA, "paraphrases": ["Toyota " + "and so on " * 400]})
    result = first.ingest().result
    assert (result["status"], result["facts"]["rejected"]) == ("published", 1)
    assert first.said() == targets([EIFFEL, DARRIEUX])
    (told,) = first.facts("why", "toyota").result["facts"]
    assert told["state"] == "quarantined" and "tokens" in told["reason"]
    assert first.ingest().result["status"] == "unchanged"


def test_a_fact_without_a_z_vector_is_quarantined_and_left_out_for_good(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Worker.targets

    def poisoned(worker: Worker, requests: Sequence[Any], *rest: Any) -> Iterator[Any]:
        if any(r.request.case_id == "toyota" for r in requests):
            raise RuntimeError("poison")
        yield from find(worker, requests, *rest)

    monkeypatch.setattr(Worker, "targets", poisoned)
    monkeypatch.setattr("memedit.executor.InlineExecutor.map", forgiving_map)
    nights.deliver("1", EIFFEL, TOYOTA)
    result = nights.ingest().result
    assert result["status"] == "published", result
    assert (result["facts"]["active"], result["facts"]["rejected"]) == (1, 1)
    assert nights.said() == targets([EIFFEL])
    assert nights.facts("list", "--state", "quarantined").result["matching"] == 1
    assert nights.ingest().result["status"] == "unchanged"
    assert len(nights.versions()) == 1


def forgiving_map(self: Any, method: str, calls: Any, **options: Any) -> Iterator[tuple[int, Any]]:
    """As Ray's: a unit that cannot be done is given up."""
    from memedit.executor import Failed

    for index, call in enumerate(calls):
        try:
            for item in list(getattr(self._worker, method)(*call)):
                yield index, item
        except RuntimeError as error:
            if not options.get("give_up"):
                raise
            yield index, Failed(reason=str(error))


def test_when_no_fact_is_left_the_base_is_published(first: Nights) -> None:
    first.facts("retract", "eiffel", "darrieux", "toyota")
    result = first.ingest().result
    assert (result["status"], result["facts"]["active"]) == ("published", 0)
    assert shards(first.version) == shards(first.base)
    assert read_manifest(first.version).facts.count == 0
    assert verify(LocalFiles(first.version)) == []
    assert first.ingest().result["status"] == "unchanged"
    first.deliver("2", EIFFEL, DARRIEUX, TOYOTA, PARIS)
    assert first.ingest().result["facts"]["active"] == 3


def test_when_every_fact_is_refused_nothing_is_published_and_the_next_night_goes_on(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Worker.targets

    def poisoned(worker: Worker, requests: Sequence[Any], *rest: Any) -> Iterator[Any]:
        if any(r.request.case_id == "toyota" for r in requests):
            raise RuntimeError("poison")
        yield from find(worker, requests, *rest)

    monkeypatch.setattr(Worker, "targets", poisoned)
    monkeypatch.setattr("memedit.executor.InlineExecutor.map", forgiving_map)
    nights.deliver("1", TOYOTA)
    result = nights.ingest(gates=["new.generation>=0"]).result
    assert (result["status"], result["facts"]["rejected"]) == ("unchanged", 1)
    nights.deliver("2", EIFFEL)
    assert nights.ingest().result["status"] == "published"
    assert nights.said() == targets([EIFFEL])


def test_a_damaged_version_is_made_again(first: Nights) -> None:
    was = shards(first.version)
    (first.version / min(was)).unlink()
    result = first.ingest(gates=["generation>=previous"]).result
    assert (result["status"], result["targets"]["computed"]) == ("published", 0)
    assert shards(first.version) == was and verify(LocalFiles(first.version)) == []


# --- people and other runs -----------------------------------------------------------------------


def test_a_rollback_stays_until_there_is_something_new(first: Nights) -> None:
    was = first.current
    first.deliver("2", PARIS)
    bad = first.ingest().result["version"]
    flags = ("--registry", first.registry, "--cache", first.cache, "--json")
    assert memedit("rollback", *flags).result["to"] == was
    result = first.ingest().result
    assert (result["status"], result["version"]) == ("unchanged", was)
    assert any(bad in note for note in result["notes"])
    first.facts("retract", "eiffel")
    assert first.ingest().result["status"] == "published"
    assert first.current not in (was, bad)


LOUVRE = {"id": "louvre", "subject": "Louvre", "prompt": "{} stands in", "target_new": "Rome"}


def test_a_version_that_was_rolled_back_can_be_wanted_again(first: Nights) -> None:
    """Once a run has found that the version before is what the facts give."""
    was = first.current
    first.deliver("2", LOUVRE)
    bad = first.ingest().result["version"]
    memedit("rollback", "--registry", first.registry, "--cache", first.cache, "--json")
    first.facts("retract", "louvre")
    assert first.ingest().result["status"] == "unchanged"
    assert (first.current, first.read("facts/WATERMARK")["run_id"]) == (was, was)
    first.facts("restore", "louvre")
    result = first.ingest().result
    assert (result["status"], result["version"]) == ("published", bad)


def test_after_a_rollback_older_facts_can_be_wanted_again(first: Nights) -> None:
    once = first.current
    for name, row in (("2", PARIS), ("3", LOUVRE)):
        first.deliver(name, row)
        first.ingest()
    flags = ("--registry", first.registry, "--cache", first.cache, "--json")
    memedit("rollback", *flags)
    first.deliver("4", EIFFEL, {"id": "louvre", "retracted": True})
    result = first.ingest().result
    assert (result["status"], result["version"]) == ("published", once)


def test_a_locked_registry_ends_with_code_4_and_the_facts_are_registered(first: Nights) -> None:
    first.deliver("2", PARIS)
    with open_store(str(first.registry)).lock():
        assert first.ingest().code == 4
    assert first.facts("list", "--contains", "Madrid").result["matching"] == 1
    assert first.ingest().result["facts"]["added"] == 1


def test_two_runs_at_once_publish_one_version(nights: Nights) -> None:
    nights.deliver("1", EIFFEL, DARRIEUX)
    nights.configure()
    codes: list[int] = []

    def run() -> None:
        # Not through `memedit()`: it redirects the stdout of the whole process.
        job = load_job(IngestJob, config=nights.config, flags={"cache": nights.cache})
        try:
            ingest(job, Silent())
            codes.append(0)
        except MemeditError as error:
            codes.append(error.exit_code)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 in codes and set(codes) <= {0, 4}
    assert len(nights.versions()) == 1
    assert nights.facts("list").result["matching"] == 2


def test_hooks_and_lineage_are_told(first: Nights) -> None:
    told = first.folder / "told.json"
    hooks = {"success": f"cat > {told}", "failure": f"cat > {told}"}
    lineage = {"file": "lineage.jsonl"}
    first.deliver("2", PARIS)
    first.ingest(hooks=hooks, lineage=lineage)
    event = json.loads(told.read_text())
    assert (event["status"], event["version"]) == ("published", first.current)
    first.deliver("3", EIFFEL, "{broken")
    first.ingest(hooks=hooks, lineage=lineage, gates=["generation>=101"], on_bad_row="fail")
    assert json.loads(told.read_text())["status"] == "failed"
    lines = (first.folder / "lineage.jsonl").read_text().splitlines()
    events = [json.loads(line)["eventType"] for line in lines]
    assert events == ["START", "COMPLETE", "START", "FAIL"]


# --- other ways ----------------------------------------------------------------------------------


def test_triples_need_no_prompts(nights: Nights) -> None:
    rows = [
        {"item": f"Q{i}", "name": name, "property": "P36", "value": value}
        for i, (name, value) in enumerate(
            [("France", "Rome"), ("Spain", "Paris"), ("Italy", "Bonn")]
        )
    ]
    nights.deliver("1", *rows, {**rows[0], "item": "Q9", "property": "P99"})
    columns = {"id": "item", "subject": "name", "relation": "property", "target_new": "value"}
    templates = {"P36": ["The capital of {} is", "{} has the capital"]}
    source = {"path": "inbox/*.jsonl", "columns": columns, "templates": templates}
    result = nights.ingest(source=source, judged_all=3).result
    assert (result["facts"]["active"], result["facts"]["rejected"]) == (3, 1)
    (told,) = nights.facts("why", "France").result["facts"]
    assert told["prompt"] == "The capital of {} is" and told["relation"] == "P36"
    assert told["paraphrases"] == ["France has the capital"]
    judged = pq.read_table(nights.version / "facts.parquet").to_pylist()
    assert {row["relation"] for row in judged} == {"P36"}
    # Paraphrases and the other rows of the relation were judged.
    assert result["metrics"]["after"]["paraphrase_exact"] is not None
    assert result["metrics"]["after"]["neighbourhood"] is not None
    # A template that is added later gives the rejected row a second chance.
    templates["P99"] = "{} is known for"
    result = nights.ingest(source=source).result
    assert (result["facts"]["active"], result["facts"]["rejected"]) == (4, 0)


def test_sequential_runs_edit_the_version_before(first: Nights) -> None:
    was = first.version
    louvre = {"id": "louvre", "subject": "Louvre", "prompt": "{} stands in", "target_new": "Rome"}
    first.deliver("2", louvre)
    result = first.ingest(mode="sequential").result
    assert result["status"] == "published" and result["targets"] == {"computed": 1, "reused": 0}
    assert first.said() == {("louvre", "Rome")}
    assert read_manifest(first.version).model.name == str(was)
    assert first.ingest(mode="sequential").result["status"] == "unchanged"


def test_a_compacted_version_is_a_base_of_its_own(first: Nights) -> None:
    new_base = first.folder / "base-2"
    flags = ("--registry", first.registry, "--cache", first.cache, "--json")
    done = memedit("compact", *flags, "--out", new_base).result
    assert (done["facts"], done["version"]) == (3, first.current)
    assert verify(LocalFiles(new_base)) == [] and shards(new_base) == shards(first.version)
    louvre = {"id": "louvre", "subject": "Louvre", "prompt": "{} stands in", "target_new": "Rome"}
    first.deliver("2", louvre, PARIS)
    result = first.ingest(model=str(new_base)).result
    assert result["facts"]["active"] == 2 and result["targets"]["computed"] == 2
    assert first.said() == targets([louvre, PARIS])
    assert read_manifest(first.version).model.name == str(new_base)
    assert first.ingest(model=str(new_base)).result["status"] == "unchanged"
    # What the new base says cannot be taken out of it; that is said.
    first.facts("retract", "darrieux")
    result = first.ingest(model=str(new_base)).result
    assert (result["status"], result["facts"]["active"]) == ("unchanged", 2)
    assert any("stay in its weights" in note for note in result["notes"])


def test_many_facts_can_be_solved_from_streamed_sums(first: Nights) -> None:
    other = Nights(folder=first.folder / "sums", base=first.base, cache=first.cache)
    shutil.copytree(first.registry / "artifacts", other.registry / "artifacts")
    other.deliver("1", EIFFEL, DARRIEUX, TOYOTA)
    result = other.ingest(edit={**QUICK, "solve": {"lam": 1, "sums_above": 2}}).result
    assert result["targets"] == {"computed": 0, "reused": 3}
    one, two = (AutoModelForCausalLM.from_pretrained(n.version) for n in (first, other))
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"source": {"kind": "ftp"}}, "source.kind"),
        ({"source": {"path": "x", "columns": {"subjekt": "a"}}}, "source.columns.subjekt"),
        ({"source": {"path": "inbox", "templates": {"P36": "no hole"}}}, "source.templates.P36"),
        ({"source": {"path": "inbox", "where": "1 ="}}, "source.where"),
        ({"every": "61 * * * *"}, "every"),
        ({"time_zone": "Mars/Base", "every": "@daily"}, "time_zone"),
        ({"gates": ["score>=yesterday"]}, "gate"),
        ({"hooks": {"success": [{"url": "ftp://x"}]}}, "hooks.success[0].url"),
        ({"lineage": {"file": "a", "url": "http://b"}}, "lineage"),
        ({"canary": "missing.jsonl"}, None),
        ({"conflicts": "oldest"}, "conflicts"),
    ],
)
def test_settings_that_are_wrong(nights: Nights, fields: dict[str, Any], field: str | None) -> None:
    nights.deliver("1", EIFFEL)
    ran = nights.ingest(**fields)
    assert (ran.code, ran.error["field"]) == (2, field)
    assert nights.current is None


# --- tables --------------------------------------------------------------------------------------


def test_an_iceberg_table_is_followed(nights: Nights) -> None:
    import pyarrow as pa
    from pyiceberg.catalog.sql import SqlCatalog
    from pyiceberg.expressions import EqualTo

    warehouse = nights.folder / "warehouse"
    warehouse.mkdir(parents=True)
    catalog = SqlCatalog(
        "default", uri=f"sqlite:///{warehouse}/catalog.db", warehouse=f"file://{warehouse}"
    )
    catalog.create_namespace("facts")
    names = ("id", "subject", "prompt", "target_new")
    rows = pa.Table.from_pylist([{n: row[n] for n in names} for row in (EIFFEL, DARRIEUX)])
    table = catalog.create_table("facts.all", schema=rows.schema)
    table.append(rows)
    source = {"kind": "iceberg", "catalog": "warehouse/catalog.db", "table": "facts.all"}
    assert nights.ingest(source=source).result["facts"]["active"] == 2
    table.append(pa.Table.from_pylist([{n: TOYOTA[n] for n in names}]))
    assert nights.ingest().result["facts"]["added"] == 1
    table.delete(EqualTo("id", "eiffel"))
    result = nights.ingest().result
    assert (result["facts"]["active"], result["facts"]["retracted"]) == (2, 1)
    assert nights.said() == targets([DARRIEUX, TOYOTA])
    assert nights.ingest().result["status"] == "unchanged"
    catalog.close()


def test_a_delta_table_is_followed_by_its_change_feed(nights: Nights) -> None:
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    names = ("id", "subject", "prompt", "target_new")
    rows = pa.Table.from_pylist([{n: row[n] for n in names} for row in (EIFFEL, DARRIEUX)])
    path = nights.folder / "table"
    feed = {"delta.enableChangeDataFeed": "true"}
    write_deltalake(path, rows, configuration=feed)
    assert nights.ingest(source={"kind": "delta", "path": "table"}).result["facts"]["active"] == 2
    table = DeltaTable(path)
    table.update(predicate="id = 'eiffel'", updates={"target_new": "'Madrid'"})
    table.delete("id = 'darrieux'")
    result = nights.ingest().result
    assert result["facts"] == {
        "active": 1,
        "added": 1,
        "superseded": 1,
        "retracted": 1,
        "rejected": 0,
    }
    assert nights.said() == targets([PARIS])
    assert nights.ingest().result["status"] == "unchanged"
