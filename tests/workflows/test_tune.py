"""`memedit tune` on a tiny model: what is tried, what is kept, what is written, what is refused."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import workflows.editing
import workflows.tune
import workflows.tuning_trial
from memedit.config import EditSettings, EvaluationSettings
from memedit.errors import NumericalError
from memedit.manifest import read_manifest
from memedit.outcome import METRIC_KEYS
from memedit.worker import Worker
from tests.tiny import save_tiny
from tests.workflows.runs import (
    Ran,
    measured,
    memedit,
    quick,
    setting,
    stats,
    without_plots,
    write_rows,
)
from workflows.jobfile import load_job
from workflows.moments import TokenSource
from workflows.results import show_tuning
from workflows.settings import EditJob
from workflows.tuning_page import trials_plot

SUBJECTS = (
    *("Eiffel Tower", "Big Ben", "Colosseum", "Louvre"),
    *("Steve Jobs", "Toyota", "Marie Curie", "Bill Gates"),
)
FACTS = [
    {
        "id": f"f{i}",
        "subject": subject,
        "prompt": "{} is located in the city of",
        "target_new": "Rome",
        "target_true": "Paris",
        "paraphrases": [f"Where is {subject}? It stands in"],
        "neighbourhood": [
            {"prompt": "The Berlin Wall is located in the city of", "target": "Paris"}
        ],
    }
    for i, subject in enumerate(SUBJECTS)
]
TRIALS = 11


@dataclass
class Calls:
    """What the workers were asked for, in order."""

    sought: list[str] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    judged: list[set[str]] = field(default_factory=list)


def listen(patch: pytest.MonkeyPatch) -> Calls:
    calls, targets, count, score = Calls(), Worker.targets, Worker.count, Worker.score

    def seeking(worker: Worker, requests: Sequence[Any], *rest: Any) -> Iterator[Any]:
        calls.sought += [request.request.case_id for request in requests]
        yield from targets(worker, requests, *rest)

    def counting(worker: Worker, unit: int, windows: Any, layers: Any, *rest: Any) -> Iterator[Any]:
        calls.counted += layers
        yield from count(worker, unit, windows, layers, *rest)

    def judging(worker: Worker, requests: Sequence[Any], *rest: Any) -> Iterator[Any]:
        calls.judged.append({request.case_id for request in requests})
        yield from score(worker, requests, *rest)

    patch.setattr(Worker, "targets", seeking)
    patch.setattr(Worker, "count", counting)
    patch.setattr(Worker, "score", judging)
    return calls


def tune(base: Path, folder: Path, out: str, *more: object, cache: str = "cache") -> Ran:
    facts = write_rows(folder / "facts.jsonl", FACTS)
    flags = quick(base, folder / cache)
    return memedit("tune", *flags, "--facts", facts, "--out", folder / out, *more)


MEMIT = ("--method", "memit", "--objective", "efficacy", "--trials", TRIALS)


@dataclass(frozen=True, kw_only=True)
class Done:
    folder: Path
    result: dict[str, Any]
    calls: Calls


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("tune") / "base")


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        calls = listen(patch)
        result = tune(base, folder, "out", *MEMIT).result
    return Done(folder=folder, result=result, calls=calls)


def test_every_trial_has_a_row(done: Done) -> None:
    trials = done.result["trials"]
    assert [trial["trial"] for trial in trials] == list(range(1, TRIALS + 1))
    assert trials[0]["settings"] == done.result["start"] and trials[0]["moved"] == ""
    for trial in trials:
        assert tuple(trial["metrics"]) == METRIC_KEYS and trial["failed"] is None
    assert {trial["moved"] for trial in trials} >= {"lam", "layers", "lr"}
    (chosen,) = [trial for trial in trials if trial["trial"] == done.result["trial"]]
    assert chosen["settings"] == done.result["chosen"]
    best = max(trial["metrics"]["efficacy"] for trial in trials)
    assert chosen["metrics"]["efficacy"] >= best - 0.5
    assert json.loads((done.folder / "out" / "results.json").read_text()) == done.result


def test_z_is_sought_once_for_all_settings_that_share_it(done: Done) -> None:
    trials = done.result["trials"]

    def z_of(settings: Mapping[str, Any]) -> tuple[Any, ...]:
        return settings["layers"][-1], settings["lr"], settings["steps"], settings["clamp"]

    different = {z_of(trial["settings"]) for trial in trials}
    assert 2 < len(different) < TRIALS
    assert sum(trial["z_found"] for trial in trials) == 4 * len(different)
    assert all(trial["z_found"] + trial["z_reused"] == 4 for trial in trials)
    judged = list(done.result["heldout"].values())
    assert judged[0]["z_found"] == 4
    found = [trial["z_found"] for trial in trials]
    found += [side["z_found"] for side in judged if side["trial"] or side is judged[0]]
    assert len(done.calls.sought) == sum(found)


def test_a_layer_is_counted_once(done: Done) -> None:
    windows = len(done.calls.counted) // len(set(done.calls.counted))
    assert {layer for t in done.result["trials"] for layer in t["settings"]["layers"]} == set(
        done.calls.counted
    )
    assert all(done.calls.counted.count(i) == windows for i in set(done.calls.counted))


def test_the_search_never_sees_the_other_half(done: Done) -> None:
    judged = done.calls.judged
    tuning, heldout = judged[0], judged[-1]
    assert len(tuning) == len(heldout) == 4 and not tuning & heldout
    assert judged[: TRIALS + 1] == [tuning] * (TRIALS + 1)  # with the base
    assert set(map(frozenset, judged[TRIALS + 1 :])) == {frozenset(heldout)}
    sought = done.calls.sought
    first = next(i for i, case_id in enumerate(sought) if case_id in heldout)
    assert set(sought[:first]) == tuning and set(sought[first:]) == heldout


def test_another_seed_draws_other_halves(base: Path, done: Done, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = listen(patch)
        tune(base, tmp_path, "out", *MEMIT, "--trials", "1", "--seed", "5")
    assert calls.judged[0] != done.calls.judged[0]


def test_what_was_tried_is_a_table(done: Done) -> None:
    rows = pq.read_table(done.folder / "out" / "trials.parquet").to_pylist()
    tried = [row for row in rows if row["half"] == "tuning"]
    assert len(tried) == TRIALS and len(rows) == TRIALS + 2
    for row, trial in zip(tried, done.result["trials"], strict=True):
        assert row["lam"] == trial["settings"]["lam"]
        assert row["efficacy"] == trial["metrics"]["efficacy"]
        assert [row["efficacy_low"], row["efficacy_high"]] == trial["intervals"]["efficacy"]
        assert row["chosen"] == (trial["trial"] == done.result["trial"])
        assert row["weight"] is None  # memit protects nothing


def test_the_page_begins_with_the_verdict_and_needs_nothing_else(done: Done) -> None:
    page = (done.folder / "out" / "page.html").read_text()
    text = done.result["verdict"]["text"].split("(95%")[0]
    assert text in page and page.index(text) < page.index("What was tried")
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") == 1 and page.count("<small>chosen</small>") == 1


def test_the_settings_file_gives_the_edit_that_was_judged(
    base: Path, done: Done, tmp_path: Path
) -> None:
    path = done.folder / "out" / "settings.yaml"
    text = path.read_text()
    assert text.startswith("# Settings of `memit` for ") and "held-out half" in text
    job = load_job(EditJob, config=path, flags={"facts": "f", "out": "o"})
    settings = job.settings(EditSettings())
    assert settings.method == "memit" and job.model == str(base)
    chosen = done.result["chosen"]
    assert settings.layers == tuple(chosen["layers"]) and settings.solve.lam == chosen["lam"]
    targets = settings.targets
    assert (targets.lr, targets.steps) == (chosen["lr"], chosen["steps"])
    assert yaml.safe_load(text)["tuned"]["trials"] == TRIALS
    assert yaml.safe_load(text)["tuned"]["model_digest"] == done.result["model_digest"]

    heldout = write_rows(
        tmp_path / "h.jsonl", [f for f in FACTS if f["id"] in done.calls.judged[-1]]
    )
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        calls = listen(patch)
        ran = memedit(
            *("edit", "--config", path, "--facts", heldout, "--out", tmp_path / "out", "--json"),
            *("--cache", done.folder / "cache"),
            *setting("evaluation.fluency_tokens=4", "evaluation.heldout_tokens=128"),
        )
    expected = done.result["heldout"]["chosen"]["metrics"]
    assert measured(ran.result["metrics"]["after"]) == pytest.approx(measured(expected), rel=1e-5)
    assert not calls.sought and not calls.counted
    assert "memedit tune" not in ran.stderr
    recorded = read_manifest(tmp_path / "out").settings["origin"]
    assert recorded.startswith(f"tuned: {TRIALS} trials with 4 facts at once")


def test_settings_for_another_model_are_doubted(done: Done, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    facts = write_rows(tmp_path / "facts.jsonl", FACTS)
    config = done.folder / "out" / "settings.yaml"
    ran = memedit("plan", "--config", config, "--model", other, "--facts", facts, "--json")
    assert ran.result["method"]["defaults"].startswith("guessed: no published settings")
    assert f"tuned for {done.result['model']}, another model" in ran.stderr


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_where_it_was(
    base: Path, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = listen(monkeypatch)
    judge = workflows.tuning_trial.judge

    def killed(*arguments: Any, **named: Any) -> Any:
        if len(calls.judged) == 8:
            raise KeyboardInterrupt
        return judge(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(workflows.tuning_trial, "judge", killed)
        assert tune(base, tmp_path, "out", *MEMIT).code == 1
    assert not (tmp_path / "out").exists()
    before = len(calls.sought)
    assert before
    result = tune(base, tmp_path, "out", *MEMIT).result
    assert len(calls.sought) == len(done.calls.sought)  # in both runs together
    assert sorted(calls.counted) == sorted(done.calls.counted)
    for again, trial in zip(result["trials"], done.result["trials"], strict=True):
        assert again["settings"] == trial["settings"] and again["metrics"] == trial["metrics"]
    assert result["trials"][0]["z_reused"] == 4


def test_a_ruined_model_is_a_failure_with_its_reason(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = workflows.tuning_trial.judge
    asked: list[EvaluationSettings] = []

    def judging(*arguments: Any, settings: EvaluationSettings, **named: Any) -> Any:
        found, reference = judge(*arguments, settings=settings, **named)
        asked.append(settings)
        if len(asked) == 3:  # the base and the first trial come before
            found = replace(found, metrics=found.metrics | {"drift_kl": math.inf})
        return found, reference

    monkeypatch.setattr(workflows.tuning_trial, "judge", judging)
    result = tune(base, tmp_path, "out", *MEMIT, "--trials", "3").result
    assert [trial["failed"] for trial in result["trials"]] == [
        None,
        "the edit ruined the model: drift_kl is inf",
        None,
    ]
    # Free text decides nothing here, and is written for the held-out half only.
    assert (
        {each.fluency_facts for each in asked[:4]}
        == {0}
        == {each.consistency_facts for each in asked[:4]}
    )
    assert all(each.fluency_facts and each.consistency_facts for each in asked[4:])


@pytest.mark.parametrize(
    "error",
    [
        NumericalError("no."),
        torch.linalg.LinAlgError("no."),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        None,
    ],
)
def test_a_trial_that_fails_has_its_reason_and_the_search_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """The second is the first with another λ. None stands for a z that is not found."""
    editing_for, targets = workflows.tuning_trial.editing_for, workflows.editing.Editing.targets

    def failing(*arguments: Any, settings: EditSettings, **named: Any) -> Any:
        if settings.solve.lam == 4 and error is not None:
            raise error
        return editing_for(*arguments, settings=settings, **named)

    def found(*arguments: Any, **named: Any) -> Any:
        if arguments[0].settings.solve.lam == 4:
            return [], {"f1": "its z vector is not finite"}
        return targets(*arguments, **named)

    if error is None:
        monkeypatch.setattr(workflows.editing.Editing, "targets", found)
    monkeypatch.setattr(workflows.tuning_trial, "editing_for", failing)
    result = tune(base, tmp_path, "out", *MEMIT, "--trials", "3").result
    first, failed, third = result["trials"]
    why = "1 fact left out: its z" if error is None else str(error).replace("CUDA ", "")
    assert failed["metrics"] is None and failed["failed"].startswith(why.split(".")[0])
    assert failed["settings"]["lam"] == 4 and failed["trial"] != result["trial"]
    assert first["metrics"] and third["metrics"]
    assert failed["failed"] in (tmp_path / "out" / "page.html").read_text()


@pytest.mark.parametrize("bad", ["fail", "skip"])
def test_a_fact_without_a_z_is_named_or_left_out(
    base: Path, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """One of the first half and one of the second never have one."""
    searched, heldout = min(done.calls.judged[0]), min(done.calls.judged[-1])
    targets = workflows.editing.Editing.targets

    def found(self: Any, encoded: Any, **named: Any) -> Any:
        kept, quarantined = targets(self, encoded, **named)
        gone = {
            each.request.case_id: "its z vector is not finite"
            for each in encoded
            if each.request.case_id in (searched, heldout)
        }
        return [z for z in kept if z.case_id not in gone], quarantined | gone

    monkeypatch.setattr(workflows.editing.Editing, "targets", found)
    ran = tune(base, tmp_path, "out", *MEMIT, "--trials", "2", "--on-bad-row", bad)
    if bad == "fail":
        assert ran.code == 2 and "its z vector is not finite" in ran.error["message"]
        assert FACTS[ran.error["row"] - 1]["id"] == searched
        assert "trial 2" not in ran.stderr
        return
    assert [trial["failed"] for trial in ran.result["trials"]] == [None, None]
    assert all(side["failed"] is None for side in ran.result["heldout"].values())
    facts = ran.result["facts"]
    assert (facts["accepted"], facts["tuning"], facts["heldout"]) == (6, 3, 3)
    assert ran.result["tuned"]["facts_at_once"] == 3
    assert f"its z vector is not finite ({searched})" in ran.stderr


def test_method_memedit_moves_the_weight_of_protected_keys(base: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    text = "The road from Lyon to Geneva leads past Mont Blanc, and from Chamonix to Turin. "
    corpus.write_text(f"{text * 12}\n\n" * 20)
    more = ("--method", "memedit", "--corpus", corpus, "--trials", "5", "--search", "weight")
    result = tune(base, tmp_path, "out", *more, "--objective", "generation").result
    weights = [trial["settings"]["weight"] for trial in result["trials"]]
    assert weights[:2] == [3, 12] and weights[2] in (48, 0.75) and len(set(weights)) == 5
    drifts = [trial["metrics"]["drift_kl"] for trial in result["trials"]]
    assert len(set(drifts)) > 1
    assert {trial["settings"]["lam"] for trial in result["trials"]} == {1}
    written = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert written["protect"]["weight"] == result["chosen"]["weight"] and "repair" in written


def test_no_trial_begins_when_the_time_is_over(base: Path, tmp_path: Path) -> None:
    result = tune(base, tmp_path, "out", *MEMIT, "--budget-s", "0").result
    assert len(result["trials"]) == 1 and result["chosen"] == result["start"]
    assert result["verdict"]["text"].startswith("The search found nothing better")
    assert result["heldout"]["chosen"] == result["heldout"]["start"]
    rows = pq.read_table(tmp_path / "out" / "trials.parquet").to_pylist()
    assert [(row["half"], row["settings"], row["chosen"]) for row in rows] == [
        ("tuning", "tried", True),
        ("heldout", "start", False),
        ("heldout", "chosen", True),
    ]


def test_gates_bound_what_is_chosen(base: Path, tmp_path: Path) -> None:
    """With a large λ next to nothing happens, so that drift is within any bound, step by step."""
    more = (*MEMIT, "--search", "lam")
    free = tune(base, tmp_path, "free", *more).result
    bound = "drift_kl<=0.01"
    bounded = tune(base, tmp_path, "bounded", *more, "--gate", bound).result
    assert bounded["chosen"]["lam"] > free["chosen"]["lam"]

    def drift(result: Mapping[str, Any]) -> float:
        found: float = result["trials"][result["trial"] - 1]["metrics"]["drift_kl"]
        return found

    assert drift(bounded) <= 0.01 < drift(free)
    ran = tune(base, tmp_path, "never", *more, "--gate", "perplexity<=base*0.5")
    assert ran.code == 3 and "meets the gates" in ran.error["message"]
    assert not (tmp_path / "never").exists()


def test_given_statistics_bound_the_layers(base: Path, tmp_path: Path) -> None:
    stats(base, tmp_path / "stats", tmp_path / "cache")  # of the layers 1 and 2
    result = tune(base, tmp_path, "out", *MEMIT, "--stats", tmp_path / "stats").result
    assert {i for trial in result["trials"] for i in trial["settings"]["layers"]} == {1, 2}
    assert all(trial["failed"] is None for trial in result["trials"])


def test_a_corpus_too_small_to_hold_text_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenSource, "heldout", lambda *_: [])
    ran = tune(base, tmp_path, "out", *MEMIT, "--objective", "perplexity")
    assert ran.code == 2 and ran.error["field"] == "objective", ran.stderr
    assert "perplexity is measured on held-out text" in ran.error["message"]


def test_a_person_sees_every_trial_and_the_verdict(done: Done) -> None:
    shown = io.StringIO()
    trials = [dict(trial) for trial in done.result["trials"]]
    trials[1] |= {"metrics": None, "failed": "the second moment is singular"}
    show_tuning({**done.result, "trials": trials}, shown)
    text = shown.getvalue()
    assert "1: as at first" in text and text.count("(chosen)") == 1
    assert "trial 2: the second moment is singular" in text
    assert done.result["verdict"]["text"] in text
    assert f"memedit edit --config {done.folder / 'out' / 'settings.yaml'}" in text


@pytest.mark.parametrize(
    ("more", "field", "says"),
    [
        (("--method", "rome"), "method", "rome has nothing that is searched"),
        (("--objective", "scor"), "objective", "did you mean 'score'"),
        (("--search", "lam,weight", "--method", "memit"), "search", "memit has no weight"),
        (("--gate", "new.score>=80"), "gate", "memedit ingest"),
        (("--gate", "score>=x"), "gate", "x"),
        (("--trials", "0"), "trials", "at least 1"),
        (("--layers", "9"), "layers", "outside the model"),
        (
            ("--set", "evaluation.drift_prompts=0", "--objective", "drift_kl"),
            "objective",
            "drift_kl",
        ),
        (("--set", "moments.tokens=8"), "corpus", "too small for the statistics"),
    ],
)
def test_what_cannot_be_searched(
    base: Path, tmp_path: Path, more: tuple[str, ...], field: str, says: str
) -> None:
    ran = tune(base, tmp_path, "out", *more)
    assert ran.code == 2, ran.stderr
    assert ran.error["field"] == field and says in ran.error["message"]
    assert not (tmp_path / "out").exists()


def test_one_fact_has_no_halves(base: Path, tmp_path: Path) -> None:
    facts = write_rows(tmp_path / "one.jsonl", FACTS[:1])
    ran = memedit("tune", *quick(base, tmp_path), "--facts", facts, "--out", tmp_path / "out")
    assert ran.code == 2 and "1 fact that can be edited" in ran.error["message"]


def test_the_first_lambda_is_that_of_the_facts_that_can_be_encoded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    settings_of = workflows.tune.settings_of

    def asking(job: Any, base: Any, n_facts: int, progress: Any) -> Any:
        counts.append(n_facts)
        return settings_of(job, base, n_facts, progress)

    monkeypatch.setattr(workflows.tune, "settings_of", asking)
    long = {**FACTS[0], "id": "long", "prompt": "{} " + "is located in " * 400}
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS[:3], long])
    flags = (*quick(base, tmp_path), *MEMIT, "--trials", "1", "--on-bad-row", "skip")
    ran = memedit("tune", *flags, "--facts", facts, "--out", tmp_path / "out")
    assert ran.result["facts"]["accepted"] == 3
    assert counts == [2, 1]


def test_trials_that_were_not_measured_are_not_drawn() -> None:
    assert trials_plot([{"trial": 1, "metrics": None, "intervals": {}}], "score", 1) == ""
