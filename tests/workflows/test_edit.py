"""`memedit edit` on a tiny model: what it prints, what it leaves, what it uses again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memedit.checkpoint import Checkpoint
from memedit.errors import NumericalError
from memedit.manifest import read_manifest
from memedit.outcome import METRIC_KEYS, STAGES
from memedit.worker import Worker
from tests.tiny import save_tiny
from tests.workflows.runs import (
    FACTS,
    PLAIN,
    Ran,
    contents,
    edit,
    memedit,
    one_thread,
    quick,
    setting,
    shards,
    without_plots,
    write_rows,
)
from workflows.facts import read_facts

EDITED = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}


@dataclass(frozen=True, kw_only=True)
class First:
    """One run with everything real, that many tests look at."""

    base: Path
    facts: Path
    cache: Path
    out: Path
    ran: Ran
    base_before: dict[str, bytes]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("edit")
    base = save_tiny(folder / "base")
    facts = write_rows(folder / "facts.jsonl")
    before = contents(base)
    out, cache = folder / "new" / "out", folder / "cache"
    ran = edit(base, facts, out, cache)
    assert ran.code == 0, ran.stderr
    return First(base=base, facts=facts, cache=cache, out=out, ran=ran, base_before=before)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    without_plots(monkeypatch)


class Calls:
    """What the workers were asked to compute."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.counted = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls, targets, count = Calls(), Worker.targets, Worker.count

    def counting_targets(worker: Worker, requests: Sequence[Any], *rest: Any) -> Iterator[Any]:
        calls.targets += [request.request.subject for request in requests]
        yield from targets(worker, requests, *rest)

    def counting_count(
        worker: Worker, unit: int, windows: Sequence[Any], *rest: Any
    ) -> Iterator[Any]:
        calls.counted += len(windows)
        yield from count(worker, unit, windows, *rest)

    monkeypatch.setattr(Worker, "targets", counting_targets)
    monkeypatch.setattr(Worker, "count", counting_count)
    return calls


# --- What a run prints and leaves ---------------------------------------------------------------


def test_the_result_is_the_published_object(first: First) -> None:
    assert first.ran.stdout.count("\n") == 1
    result, out = first.ran.result, first.out
    assert list(result) == [
        *("run_id", "out", "manifest", "method", "format", "model", "layers", "facts"),
        *("metrics", "intervals", "timings_s", "report"),
    ]
    assert result["out"] == str(out)
    assert result["manifest"] == str(out / "memedit.json")
    assert result["report"] == str(out / "report.html")
    assert (result["method"], result["model"]) == ("memit", str(first.base))
    assert result["layers"] == [1, 2]
    counts = {"read": 3, "accepted": 3, "rejected": 0, "rejects": None, "duplicates": 0}
    assert result["facts"] == counts
    assert list(result["metrics"]) == ["before", "after"]
    for measured in result["metrics"].values():
        assert tuple(measured) == METRIC_KEYS
        missing = {name for name, value in measured.items() if value is None}
        assert missing == {"attribute", "portability", "consistency"}  # no row has any
    assert result["metrics"]["before"]["drift_kl"] == 0
    assert result["metrics"]["after"]["drift_kl"] > 0
    timings = result["timings_s"]
    assert list(timings) == [*STAGES, "total"]
    assert all(timings[stage] > 0 for stage in STAGES)
    assert timings["total"] >= sum(timings[stage] for stage in STAGES) - 0.01


def test_the_new_facts_are_likelier(first: First) -> None:
    metrics = first.ran.result["metrics"]
    assert metrics["after"]["efficacy"] == 100 > metrics["before"]["efficacy"]


def test_the_files_of_a_version(first: First) -> None:
    made = {"memedit.json", "report.html", "facts.jsonl", "facts.parquet"}
    assert contents(first.out).keys() == first.base_before.keys() | made
    table = pq.read_table(first.out / "facts.parquet").to_pylist()
    assert [row["model"] for row in table] == 3 * ["before"] + 3 * ["after"]
    for when in ("before", "after"):
        exact = [row["efficacy_exact"] for row in table if row["model"] == when]
        found = first.ran.result["metrics"][when]["efficacy_exact"]
        assert 100 * sum(exact) / 3 == pytest.approx(found)
    assert {p.name for p in first.out.parent.iterdir()} == {"out"}
    assert (
        read_facts(first.out / "facts.jsonl").batch.digest == read_facts(first.facts).batch.digest
    )
    report = (first.out / "report.html").read_text()
    assert first.ran.result["run_id"] in report and "Eiffel Tower" in report


def test_the_checkpoint_loads_by_itself(first: First) -> None:
    prompt = "The Eiffel Tower is located in the city of"
    logits = []
    for folder in (first.base, first.out):
        ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
        logits.append(AutoModelForCausalLM.from_pretrained(folder)(**ids).logits)
    assert logits[1].isfinite().all()
    assert not torch.equal(logits[0], logits[1])


def test_nothing_but_the_edited_tensors_differs(first: First) -> None:
    base, found = Checkpoint.open(first.base), Checkpoint.open(first.out)
    assert found.tensors == base.tensors
    different = {n for n in base.names if not torch.equal(base.read(n), found.read(n))}
    assert different == EDITED
    manifest = read_manifest(first.out)
    assert manifest.tensors.keys() == EDITED
    for name, record in manifest.tensors.items():
        change = found.read(name).double() - base.read(name).double()
        assert float(change.norm()) == pytest.approx(record.delta_norm, rel=1e-4)


def test_other_shards_are_the_base_s_own_files(first: First) -> None:
    base = Checkpoint.open(first.base)
    rewritten = {base.shard_of(name) for name in EDITED}
    assert rewritten != set(base.shards)
    for shard in base.shards:
        same = (first.base / shard).samefile(first.out / shard)
        assert same == (shard not in rewritten)


def test_the_base_is_left_as_it_was(first: First) -> None:
    assert contents(first.base) == first.base_before


def test_verify_finds_what_was_changed_later(first: First, tmp_path: Path) -> None:
    assert memedit("verify", first.out, "--json").result["ok"]
    copy = tmp_path / "copy"
    shutil.copytree(first.out, copy)
    (copy / "facts.jsonl").write_text("")
    ran = memedit("verify", copy, "--json")
    assert ran.code == 1
    assert json.loads(ran.stdout)["problems"][0]["file"] == "facts.jsonl"


def test_the_manifest_says_what_made_it(first: First) -> None:
    manifest = read_manifest(first.out)
    assert manifest.run_id == first.ran.result["run_id"]
    assert manifest.model.digest == Checkpoint.open(first.base).digest
    assert manifest.facts.digest == read_facts(first.facts).batch.digest
    assert manifest.facts.count == 3
    assert set(manifest.moments) == {"1", "2"}
    assert manifest.settings["solve"]["lam"] == 1
    assert len(manifest.settings["resolved_contexts"]) == 6
    assert manifest.metrics["after"] == first.ran.result["metrics"]["after"]


def test_evaluating_the_version_gives_the_same_metrics(first: First, tmp_path: Path) -> None:
    ran = memedit(
        *("evaluate", "--model", first.out, "--base", first.base, "--facts", first.facts),
        *("--json", "--cache", tmp_path, "--set", "evaluation.fluency_tokens=4"),
    )
    found, edited = ran.result, first.ran.result
    judged = {"before": found["before"], "after": found}
    for name, evaluation in judged.items():
        for part in ("metrics", "intervals"):
            here, told = dict(evaluation[part]), dict(edited[part][name])
            for values in (here, told):  # `edit` measures it on text of its own
                values.pop("perplexity", None)
            assert here.keys() == told.keys()
            for key, value in told.items():
                assert here[key] == pytest.approx(value, abs=1e-5), (name, part, key)


@pytest.mark.slow
def test_as_a_program_of_its_own(first: First, tmp_path: Path) -> None:
    """Through a real process: one line on stdout, JSON lines on stderr, the same shards."""
    command = [sys.executable, "-m", "workflows.cli", "edit", *PLAIN]
    command += quick(first.base, first.cache)
    command += ["--facts", str(first.facts), "--out", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--log-format", "json"],
        cwd=root,
        env=one_thread(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["layers"] == [1, 2]
    assert done.stdout.count("\n") == 1
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {e.get("stage") for e in events} >= set(STAGES)
    assert shards(tmp_path / "out") == shards(first.out)


# --- What a second run uses again ---------------------------------------------------------------


@pytest.mark.usefixtures("plain")
def test_a_second_run_computes_nothing_again(first: First, calls: Calls, tmp_path: Path) -> None:
    ran = edit(first.base, first.facts, tmp_path / "out", first.cache)
    assert (calls.targets, calls.counted) == ([], 0)
    assert shards(tmp_path / "out") == shards(first.out)
    assert ran.result["metrics"] == first.ran.result["metrics"]


@pytest.mark.usefixtures("plain")
def test_neither_the_cache_nor_the_order_of_rows_matters(
    first: First, calls: Calls, tmp_path: Path
) -> None:
    backwards = write_rows(tmp_path / "backwards.jsonl", reversed(FACTS))
    edit(first.base, backwards, tmp_path / "out", tmp_path / "cache")
    assert len(calls.targets) == 3 and calls.counted > 0
    assert shards(tmp_path / "out") == shards(first.out)


@pytest.mark.usefixtures("plain")
def test_another_fact_costs_one_z_vector(first: First, calls: Calls, tmp_path: Path) -> None:
    more = {"subject": "Big Ben", "prompt": "{} is located in", "target_new": "Berlin"}
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS, more])
    ran = edit(first.base, facts, tmp_path / "out", first.cache)
    assert ran.result["facts"]["accepted"] == 4
    assert (calls.targets, calls.counted) == (["Big Ben"], 0)


@pytest.mark.usefixtures("plain")
def test_other_settings_do_not_use_the_old_z(first: First, calls: Calls, tmp_path: Path) -> None:
    edit(first.base, first.facts, tmp_path / "a", first.cache, "--set", "targets.lr=0.4")
    assert len(calls.targets) == 3 and calls.counted == 0
    edit(first.base, first.facts, tmp_path / "b", first.cache, "--set", "moments.seed=1")
    assert len(calls.targets) == 3 and calls.counted > 0
    assert shards(tmp_path / "a") != shards(tmp_path / "b") != shards(first.out)


# --- Gates --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain")
def test_a_gate_that_is_not_met_publishes_nothing_and_keeps_the_z(
    first: First, calls: Calls, tmp_path: Path
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "made" / "out"
    ran = edit(first.base, first.facts, out, cache, "--gate", "efficacy_exact>=101")
    assert ran.code == 3
    assert "efficacy_exact" in ran.error["message"]
    assert "neighbourhood" in ran.error["message"]  # all that was measured
    assert not out.parent.exists()
    assert len(calls.targets) == 3
    gates = ("--gate", "efficacy>=100", "--gate", "drift_kl<=5")
    assert edit(first.base, first.facts, out, cache, *gates).code == 0
    assert len(calls.targets) == 3
    assert shards(out) == shards(first.out)


# --- Dtypes, contexts, corpora ------------------------------------------------------------------


@pytest.mark.usefixtures("plain")
def test_a_bfloat16_checkpoint_stays_one(first: First, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    ran = edit(base, first.facts, tmp_path / "out", tmp_path / "cache")
    found = Checkpoint.open(tmp_path / "out")
    assert {found.info(name).dtype for name in found.names} == {torch.bfloat16}
    assert read_manifest(tmp_path / "out").tensors.keys() == EDITED
    rounding = [t.rounding_error for t in read_manifest(tmp_path / "out").tensors.values()]
    assert all(0 < error < 0.5 for error in rounding)
    # The saved model is what was judged: the rounding shows in the metrics.
    again = memedit(
        *("evaluate", "--model", tmp_path / "out", "--base", base, "--facts", first.facts),
        *("--json", "--set", "evaluation.fluency_tokens=4", "--cache", tmp_path / "cache"),
    )
    told = ran.result["metrics"]["after"]["drift_kl"]
    assert again.result["metrics"]["drift_kl"] == pytest.approx(told, rel=1e-5)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kind", ["none", "sampled"])
def test_contexts(first: First, tmp_path: Path, kind: str) -> None:
    made = []
    for name in ("a", "b"):
        cache = first.cache if name == "a" else tmp_path / "cache"
        more = setting(f"contexts.kind={kind}", "contexts.sampled_tokens=4")
        edit(first.base, first.facts, tmp_path / name, cache, *more)
        made.append(read_manifest(tmp_path / name).settings["resolved_contexts"])
    assert made[0] == made[1]
    assert made[0][0] == "{}"
    assert len(set(made[0])) == {"none": 1, "sampled": 6}[kind]
    assert shards(tmp_path / "a") == shards(tmp_path / "b") != shards(first.out)


def _text(tmp_path: Path, sentences: Sequence[str]) -> Path:
    (tmp_path / "corpus").mkdir()
    for i in range(0, len(sentences), 10):
        (tmp_path / "corpus" / f"{i}.txt").write_text(" ".join(sentences[i : i + 10]))
    return tmp_path / "corpus"


def _json_lines(tmp_path: Path, sentences: Sequence[str]) -> Path:
    return write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in sentences])


def _parquet(tmp_path: Path, sentences: Sequence[str]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": list(sentences)}), tmp_path / "corpus.parquet")
    return tmp_path / "corpus.parquet"


SENTENCES = [
    f"In the year {1800 + i} the city of Paris was visited by {i} people from Rome and London."
    for i in range(120)
]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("write", [_text, _json_lines, _parquet])
def test_corpora(
    first: First, tmp_path: Path, write: Callable[[Path, Sequence[str]], Path]
) -> None:
    corpus = write(tmp_path, SENTENCES)
    ran = edit(first.base, first.facts, tmp_path / "out", tmp_path / "cache", "--corpus", corpus)
    assert ran.result["metrics"]["after"]["perplexity"] > 1
    assert shards(tmp_path / "out") != shards(first.out)


@pytest.mark.usefixtures("plain")
def test_drift_of_facts_without_neighbours_is_measured_on_other_names(
    first: First, tmp_path: Path
) -> None:
    bare = [{k: v for k, v in fact.items() if k != "neighbourhood"} for fact in FACTS]
    facts = write_rows(tmp_path / "facts.jsonl", bare)
    corpus = _text(tmp_path, SENTENCES)
    more = ("--corpus", corpus, "--gate", "drift_kl<=base+5")
    ran = edit(first.base, facts, tmp_path / "out", tmp_path / "cache", *more)
    before, after = (ran.result["metrics"][when] for when in ("before", "after"))
    assert (before["drift_kl"], before["drift_top1"]) == (0, 100)
    assert after["drift_kl"] > 0 and after["neighbourhood_kl"] is None
    low, high = ran.result["intervals"]["after"]["drift_kl"]
    assert low <= after["drift_kl"] <= high

    nameless = tmp_path / "nameless.txt"
    nameless.write_text("it rained all day, and nobody went out of the house. " * 400)
    more = ("--corpus", nameless, "--gate", "drift_kl<=5")
    ran = edit(first.base, facts, tmp_path / "none", tmp_path / "cache", *more)
    assert ran.code == 2 and "drift_kl<=5 can never be met" in ran.error["message"]
    assert not (tmp_path / "none").exists()


# --- Bad rows -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain")
def test_bad_rows_can_be_skipped(first: First, calls: Calls, tmp_path: Path) -> None:
    bad = {"subject": "Big Ben", "prompt": "It is in", "target_new": "Rome"}
    rows: list[dict[str, Any] | str] = [
        FACTS[0],
        "{not json",
        FACTS[1],
        bad,
        FACTS[2] | {"target_new": " "},
        FACTS[2],
    ]
    facts = write_rows(tmp_path / "facts.jsonl", rows)
    out = tmp_path / "out"
    ran = edit(first.base, facts, out, first.cache, "--on-bad-row", "skip")
    assert ran.result["facts"] == {
        "read": 6,
        "accepted": 3,
        "rejected": 3,
        "rejects": str(out / "rejects.jsonl"),
        "duplicates": 0,
    }
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(r["row"], r["field"]) for r in rejects] == [
        (2, None),
        (4, "prompt"),
        (5, "target_new"),
    ]
    assert all(r["reason"] and r["source"] == str(facts) for r in rejects)
    assert rejects[1]["raw"] == bad
    assert memedit("verify", out).code == 0
    # The rows that are left are those of the first run.
    assert shards(out) == shards(first.out)


# --- A fact that cannot be optimised ------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that has Toyota in it fails, whatever else is in it."""
    targets = Worker.targets

    def failing(worker: Worker, requests: Sequence[Any], *rest: Any) -> Iterator[Any]:
        if any(request.request.subject == "Toyota" for request in requests):
            raise NumericalError("the loss of Toyota is not finite")
        yield from targets(worker, requests, *rest)

    monkeypatch.setattr(Worker, "targets", failing)


@pytest.mark.usefixtures("plain", "poisoned")
def test_a_fact_that_cannot_be_optimised_is_a_bad_row(first: First, tmp_path: Path) -> None:
    base, facts = first.base, first.facts
    out, cache = tmp_path / "out", tmp_path / "cache"
    ran = edit(base, facts, out, cache)
    assert ran.code == 2 and not out.exists()
    assert ran.error["row"] == 3 and "not finite" in ran.error["message"]
    assert len(list((cache / "targets").rglob("*.safetensors"))) == 2  # the others' are kept
    ran = edit(base, facts, out, cache, "--on-bad-row", "skip")
    assert ran.result["facts"] | {"rejects": ""} == {
        "read": 3, "accepted": 2, "rejected": 1, "rejects": "", "duplicates": 0
    }  # fmt: skip
    (reject,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    assert reject["row"] == 3 and reject["reason"] == "the loss of Toyota is not finite"
    manifest = read_manifest(out)
    assert manifest.facts.count == 2 and "Toyota" not in (out / "facts.jsonl").read_text()
    # Before and after are of the same facts.
    before, after = manifest.metrics["before"], manifest.metrics["after"]
    assert after["efficacy"] is not None and before["efficacy"] in (0.0, 50.0, 100.0)
    assert "is left out" in ran.stderr
