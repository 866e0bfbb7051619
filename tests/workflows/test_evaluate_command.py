"""`memedit evaluate` on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest
import torch

from memedit.outcome import METRIC_KEYS
from tests.tiny import POSITIONS, save_tiny, tiny_tokenizer
from tests.workflows.runs import FACTS, LOUVRE, contents, memedit, write_rows
from workflows.plain import plain

FLAGS = ("--json", "--set", "evaluation.fluency_tokens=4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "facts.jsonl")


def test_what_it_prints(base: Path, facts: Path, tmp_path: Path) -> None:
    before = contents(tmp_path) | contents(base)
    result = memedit("evaluate", "--model", base, "--facts", facts, *FLAGS).result
    assert list(result) == [
        *("model", "facts", "metrics", "intervals", "before", "changes", "relations", "per_fact"),
        *("timings_s", "out", "report"),
    ]
    assert result["out"] is result["report"] is result["before"] is None
    assert result["changes"] == {}
    assert result["facts"] == {"read": 3, "accepted": 3, "rejected": 0, "duplicates": 0}
    metrics = result["metrics"]
    assert tuple(metrics) == METRIC_KEYS
    # Nothing to compare with, no text, and no rows that have these.
    assert {k for k, v in metrics.items() if v is None} == {
        *("perplexity", "drift_kl", "drift_top1", "neighbourhood_kl"),
        *("attribute", "portability", "consistency"),
    }
    assert len(result["per_fact"]) == 3
    toyota = next(f for f in result["per_fact"] if "Toyota" in f["prompt"])
    assert toyota["efficacy"] is None and toyota["logprob_new"] < 0
    assert contents(tmp_path) | contents(base) == before


RICH = {
    "id": "tower",
    "relation_id": "P131",
    "subject": "Louvre",
    "prompt": "The {} is located in the city of",
    "target_new": "Rome",
    "target_true": "Paris",
    "paraphrases": ["Where is the Louvre? In"],
    "neighbourhood": [LOUVRE],
    "attributes": ["The Colosseum is located in the city of"],
    "portability": [{"prompt": "The Louvre is in the country of", "target": "Italy"}],
    "generation_prompts": ["The Louvre stands", "Near the {}"],
    "references": ["The Colosseum stands in Rome.", "Rome is the capital of Italy."],
}


def test_the_table_of_facts_is_what_the_metrics_are_made_of(base: Path, tmp_path: Path) -> None:
    rows = [*FACTS, RICH, {**RICH, "id": "again", "subject": "Colosseum", "target_new": "London"}]
    facts, out = write_rows(tmp_path / "facts.jsonl", rows), tmp_path / "out"
    other = save_tiny(tmp_path / "other", seed=1)
    tokens = ("--set", "evaluation.consistency_tokens=6")
    ran = memedit(
        *("evaluate", "--model", other, "--base", base, "--facts", facts, "--out", out),
        *(*FLAGS, *tokens),
    )
    result = ran.result
    assert sorted(p.name for p in out.iterdir()) == ["facts.parquet", "report.html", "results.json"]
    assert json.loads((out / "results.json").read_text()) == result
    assert result["report"] == str(out / "report.html")
    both = pq.read_table(out / "facts.parquet").to_pylist()
    for name, metrics in (("before", result["before"]["metrics"]), ("after", result["metrics"])):
        table = [row for row in both if row["model"] == name]
        assert [row["case_id"] for row in table] == [f["case_id"] for f in result["per_fact"]]
        for key in ("attribute", "portability", "neighbourhood_exact", "paraphrase_accuracy"):
            shares = [fmean(row[key]) for row in table if row[key]]
            assert metrics[key] == pytest.approx(100 * fmean(shares)), key
        for key, scale in (("consistency", 100), ("neighbourhood_kl", 1)):
            values = [row[key] for row in table if row[key] is not None]
            assert values and metrics[key] == pytest.approx(scale * fmean(values)), key
    assert result["metrics"]["neighbourhood_kl"] > 0.1
    assert result["before"]["metrics"]["neighbourhood_kl"] == 0
    rich = [row for row in table if row["relation"] == "P131"]
    assert [len(row["texts"]) for row in rich] == [2, 2]
    assert all(row["texts"][0].startswith("The Louvre stands") for row in rich)
    # By relation: the id where there is one, else the template.
    first = result["relations"][0]
    assert (first["relation"], first["facts"]) == ("P131", 2)
    assert {r["relation"] for r in result["relations"][1:]} == {f["prompt"] for f in FACTS}
    exact = 100 * fmean(row["efficacy_exact"] for row in rich)
    assert first["metrics"]["efficacy_exact"] == pytest.approx(exact)
    low, high = first["intervals"]["efficacy_accuracy"]
    assert low <= first["metrics"]["efficacy_accuracy"] <= high


def test_the_base_is_judged_as_if_it_were_the_model(base: Path, tmp_path: Path) -> None:
    """On the same facts and text, with the same prompts for free text; without drift of its own."""
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS, {**RICH, "subject": "Colosseum"}])
    other = save_tiny(tmp_path / "other", seed=1)
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome. " * 20)
    told = (*("--facts", facts, "--text", text), *FLAGS)
    result = memedit("evaluate", "--model", other, "--base", base, *told).result
    model, alone = (memedit("evaluate", "--model", each, *told).result for each in (other, base))
    before = result["before"]
    assert before["model"] == str(base)
    assert (before["metrics"]["drift_kl"], before["metrics"]["drift_top1"]) == (0, 100)
    drift = ("drift_kl", "drift_top1", "neighbourhood_kl")
    for found, expected in ((before, alone), (result, model)):
        for part in ("metrics", "intervals"):
            kept = {name: value for name, value in found[part].items() if name not in drift}
            assert kept == {n: v for n, v in expected[part].items() if n not in drift}
    assert before["metrics"]["perplexity"] != result["metrics"]["perplexity"]
    assert before["metrics"]["consistency"] is not None

    # A change is a difference of means over the same facts.
    for name in ("efficacy_accuracy", "paraphrase", "neighbourhood_kl"):
        low, high = result["changes"][name]
        assert low <= result["metrics"][name] - before["metrics"][name] <= high, name
    assert result["changes"]["neighbourhood_kl"] == result["intervals"]["neighbourhood_kl"]


def test_against_itself_nothing_has_changed(base: Path, facts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    models = ("--model", base, "--base", base)
    result = memedit("evaluate", *models, "--facts", facts, "--out", out, *FLAGS).result
    before = result["before"]["metrics"]
    assert result["metrics"] | {"drift_kl": 0, "neighbourhood_kl": 0} == before
    assert result["metrics"]["drift_kl"] == pytest.approx(0, abs=1e-6)
    assert result["metrics"]["neighbourhood_kl"] == pytest.approx(0, abs=1e-6)
    changes = result["changes"]
    del changes["neighbourhood_kl"]
    assert changes and all(pair == [0, 0] for pair in changes.values())


def test_without_neighbours_drift_is_measured_on_names_of_the_text(
    base: Path, tmp_path: Path
) -> None:
    rows = [{key: row[key] for key in row if key != "neighbourhood"} for row in FACTS]
    facts = write_rows(tmp_path / "facts.jsonl", rows)
    other, text = save_tiny(tmp_path / "other", seed=1), tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome. " * 20)
    told = ("--model", other, "--base", base, "--facts", facts, *FLAGS)
    alone = memedit("evaluate", *told).result
    assert alone["metrics"]["drift_kl"] is alone["before"]["metrics"]["drift_kl"] is None
    with_text = memedit("evaluate", *told, "--text", text).result
    assert with_text["metrics"]["drift_kl"] > 0.1 and with_text["metrics"]["neighbourhood"] is None
    assert with_text["before"]["metrics"]["drift_kl"] == 0


def test_people_are_shown_both_models(base: Path, facts: Path, tmp_path: Path) -> None:
    other, out = save_tiny(tmp_path / "other", seed=1), tmp_path / "out"
    models = ("--model", other, "--base", base)
    shown = memedit("evaluate", *models, "--facts", facts, "--out", out, *FLAGS[1:]).stdout
    assert "before" in shown and "95% of change" in shown and "Drift, KL" in shown
    assert "3 facts judged" in shown and str(out) in shown.replace("\n", "")
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_without_a_base_the_table_and_the_page_have_the_model_alone(
    base: Path, facts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = memedit("evaluate", "--model", base, "--facts", facts, "--out", out, *FLAGS).result
    table = pq.read_table(out / "facts.parquet").to_pylist()
    assert [row.pop("model") for row in table] == ["after"] * 3
    assert plain(table) == result["per_fact"]
    page = (out / "report.html").read_text()
    assert "3 facts judged" in page and "Before" not in page


def test_a_number_that_is_not_finite_is_null_in_the_file_too(
    base: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    monkeypatch.setattr("memedit.side_effects.perplexity_of", lambda _: math.inf)
    out = tmp_path / "out"
    ran = memedit("evaluate", "--model", base, "--facts", facts, "--out", out, *FLAGS)
    assert ran.result["metrics"]["perplexity"] is None
    text = (out / "results.json").read_text()
    assert json.loads(text, parse_constant=refuse) == ran.result


def test_many_relations_are_gathered(base: Path, tmp_path: Path) -> None:
    rows = [
        {**RICH, "id": str(i), "prompt": f"The {{}} ({i}) is in", "relation_id": f"P{i // 2}"}
        for i in range(28)
    ]
    facts = write_rows(tmp_path / "facts.jsonl", rows)
    few = ("--set", "evaluation.fluency_facts=0", "--set", "evaluation.consistency_facts=0")
    arguments = ("evaluate", "--model", base, "--facts", facts, *FLAGS, *few)
    relations = memedit(*arguments).result["relations"]
    assert [row["facts"] for row in relations] == [2] * 12 + [4]
    assert (relations[-1]["relation"], relations[-1]["relations"]) == ("", 2)


def test_a_place_that_holds_something_is_refused(base: Path, facts: Path) -> None:
    ran = memedit("evaluate", "--model", base, "--facts", facts, "--out", facts.parent, *FLAGS)
    assert ran.code == 2, ran.stderr
    assert facts.exists() and not (facts.parent / "facts.parquet").exists()


def test_people_are_shown_relations(base: Path, tmp_path: Path) -> None:
    facts = write_rows(
        tmp_path / "facts.jsonl", [*FACTS, RICH, {**RICH, "id": "b", "subject": "Ben"}]
    )
    shown = memedit("evaluate", "--model", base, "--facts", facts, *FLAGS[1:]).stdout
    assert "P131" in shown and "Attribute" in shown and FACTS[0]["prompt"] not in shown


def test_against_another_model_it_drifts(base: Path, facts: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    ran = memedit("evaluate", "--model", other, "--base", base, "--facts", facts, *FLAGS)
    assert ran.result["metrics"]["drift_kl"] > 0.1


def test_text_gives_the_perplexity(base: Path, facts: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The capital of Italy is Rome. " * 20)
    found = memedit("evaluate", "--model", base, "--facts", facts, "--text", text, *FLAGS)
    # A random model is about as unsure as its vocabulary is large.
    assert 50 < found.result["metrics"]["perplexity"] < 5000


@pytest.mark.parametrize("more", [0, 1])
def test_a_prompt_as_long_as_the_model_reads(tmp_path: Path, more: int) -> None:
    """With its target it fills all positions; nothing is left for a continuation."""
    model = save_tiny(tmp_path / "model", "gpt2")
    start, answer = "The year ", " Rome"
    encode = tiny_tokenizer().encode
    digits = POSITIONS + more - len(encode(start)) - len(encode(answer))
    long = {"subject": "The year", "prompt": "{} " + "7" * digits, "target_new": "Rome"}
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS, long])
    ran = memedit("evaluate", "--model", model, "--facts", facts, "--json")
    if not more:
        assert len(ran.result["per_fact"]) == 4
        return
    assert (ran.code, ran.error["row"], ran.error["field"]) == (2, 4, "prompt")
    assert f"{POSITIONS + 1} tokens" in ran.error["message"]
    counts = memedit(
        *("evaluate", "--model", model, "--facts", facts, "--on-bad-row", "skip", "--json")
    ).result["facts"]
    assert (counts["accepted"], counts["rejected"]) == (3, 1)


def test_windows_beyond_what_the_model_reads_are_refused(
    base: Path, facts: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. " * 200)
    ran = memedit(
        *("evaluate", "--model", base, "--facts", facts, "--text", text, *FLAGS),
        *("--set", f"evaluation.heldout_window={POSITIONS + 1}"),
    )
    assert (ran.code, ran.error["field"]) == (2, "evaluation.heldout_window")


def test_bad_rows_can_be_left_out(base: Path, tmp_path: Path) -> None:
    facts = write_rows(tmp_path / "facts.jsonl", [*FACTS, "no json"])
    arguments = ("evaluate", "--model", base, "--facts", facts, *FLAGS)
    ran = memedit(*arguments)
    assert (ran.code, ran.error["row"]) == (2, 4)
    counts = memedit(*arguments, "--on-bad-row", "skip").result["facts"]
    assert counts == {"read": 4, "accepted": 3, "rejected": 1, "duplicates": 0}


def test_a_family_that_cannot_be_edited_can_be_evaluated(facts: Path, tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "mixtral", "mixtral")
    result = memedit("evaluate", "--model", mixture, "--facts", facts, *FLAGS).result
    assert result["metrics"]["efficacy"] is not None


@pytest.mark.parametrize("flag", ["--model", "--base"])
def test_no_such_model(base: Path, facts: Path, tmp_path: Path, flag: str) -> None:
    ran = memedit(
        *("evaluate", "--model", base, "--facts", facts, *FLAGS),
        *(flag, tmp_path / "nowhere"),
    )
    assert ran.code == 2
    assert "nowhere" in ran.stderr


def test_a_base_with_another_vocabulary_is_refused(base: Path, facts: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", tokenizer="sentencepiece")
    ran = memedit("evaluate", "--model", base, "--base", other, "--facts", facts, *FLAGS)
    assert ran.code == 2
    assert ran.error["field"] == "base"
    assert "tokenizer" in ran.error["message"]
