"""`memedit trace` on a tiny model: what is traced, the table, the page, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memedit.config import TraceSettings
from memedit.prompts import encode_completion
from memedit.trace_stages import trace_all
from memedit.tracing import default_tokens_per_batch
from tests.tiny import LAYERS, save_tiny
from tests.workflows.runs import FACTS, Ran, contents, memedit, setting, write_rows
from tests.workflows.studies import example_trace, example_traces
from workflows.heat_maps import heat_map
from workflows.trace_page import write_trace_page

ALL = setting("trace.facts=all", "trace.samples=2", "trace.window=2")


def trace(model: Path, facts: Path, out: Path, *more: object) -> Ran:
    words = (
        "--model",
        model,
        "--facts",
        facts,
        "--out",
        out,
        "--json",
        "--cache",
        out.parent / "cache",
    )
    return memedit("trace", *words, *more)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("trace") / "base", bos=True)


def said_by(base: Path, prompts: Sequence[str]) -> list[int]:
    """The next token that the model itself says after each prompt."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = (tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts)
    return [int(model(input_ids=each).logits[0, -1].argmax()) for each in ids]


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("done")
    facts = write_rows(folder / "facts.jsonl")
    return folder / "out", trace(base, facts, folder / "out", *ALL).result


def test_every_effect_is_in_the_table(base: Path, done: tuple[Path, Any]) -> None:
    out, result = done
    rows = pq.read_table(out / "effects.parquet").to_pylist()
    traced = {row["case_id"] for row in rows}
    assert len(traced) == result["facts"]["traced"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    for case_id in traced:
        of_fact = [row for row in rows if row["case_id"] == case_id]
        prompt = of_fact[0]["prompt"].replace("{}", of_fact[0]["subject"])
        tokens = tokenizer(prompt)["input_ids"]
        for kind in ("hidden", "mlp", "attention"):
            places = [(r["layer"], r["position"]) for r in of_fact if r["kind"] == kind]
            assert places == [(la, p) for la in range(LAYERS) for p in range(len(tokens))]
        first_layer = [r for r in of_fact if r["kind"] == "hidden" and r["layer"] == 0]
        assert [r["token"] for r in first_layer] == [tokenizer.decode([t]) for t in tokens]
        assert [r["layer"] for r in of_fact if r["kind"] == "mlp_severed"] == [*range(LAYERS)]
        (whole,) = [
            r["effect"]
            for r in of_fact
            if (r["kind"], r["layer"], r["position"]) == ("hidden", LAYERS - 1, len(tokens) - 1)
        ]
        assert whole == pytest.approx(of_fact[0]["clean"] - of_fact[0]["corrupted"], abs=1e-6)


def test_the_means_are_those_of_the_table(done: tuple[Path, Any]) -> None:
    out, result = done
    rows = pq.read_table(out / "effects.parquet").to_pylist()
    assert json.loads((out / "results.json").read_text()) == result
    for curve in result["curves"]:
        for layer in range(LAYERS):
            facts: dict[str, list[float]] = {}
            for row in rows:
                if (row["kind"], row["position_class"], row["layer"]) == (
                    *(curve["kind"], curve["position"]),
                    layer,
                ):
                    facts.setdefault(row["case_id"], []).append(row["effect"])
            means = [sum(values) / len(values) for values in facts.values()]
            assert len(means) == curve["facts"]
            assert curve["mean"][layer] == pytest.approx(sum(means) / len(means), abs=1e-9)
            assert curve["low"][layer] <= curve["mean"][layer] + 1e-9
    clean = {row["case_id"]: row["clean"] - row["corrupted"] for row in rows}
    assert result["total_effect"]["mean"] == pytest.approx(sum(clean.values()) / len(clean))


def test_the_page_needs_nothing_else(done: tuple[Path, Any]) -> None:
    out, result = done
    page = (out / "page.html").read_text()
    assert page.count("<svg") == 4 + result["facts"]["traced"]
    assert "http" not in page.replace("http://www.w3.org", "")


def page_of(proposal: dict[str, Any] | None, folder: Path) -> str:
    traced = example_traces()
    write_trace_page({**example_trace(traced), "proposal": proposal}, traced, folder / "page.html")
    return (folder / "page.html").read_text()


NOTHING = ("<h1>No layers to propose</h1>", "the MLPs add nothing to bringing a fact back")


def test_the_page_begins_with_the_layers_to_edit(tmp_path: Path) -> None:
    proposal = {"flag": "4-6", "layers": [4, 5, 6], "last_interval": [5, 8]}
    page = page_of(proposal, tmp_path)
    assert "<h1>Begin with layers 4–6</h1>" in page and "<code>--layers 4-6</code>" in page
    assert "the MLPs above layer 6 add less than half" in page
    assert "the last layer would lie between 5 and 8 in 95 of 100 cases" in page
    assert not any(text in page for text in NOTHING)
    alone = page_of({"flag": "4", "layers": [4], "last_interval": [4, 4]}, tmp_path)
    assert "<h1>Begin with layer 4</h1>" in alone


def test_the_page_says_that_there_are_no_layers_to_propose(tmp_path: Path) -> None:
    page = page_of(None, tmp_path)
    assert all(text in page for text in NOTHING)
    assert "Begin with layers" not in page and "--layers" not in page


def test_equal_jobs_give_equal_numbers(
    base: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    facts = write_rows(tmp_path / "facts.jsonl", reversed(FACTS))
    trace(base, facts, tmp_path / "out", *ALL)
    table, again = (pq.read_table(out / "effects.parquet") for out in (done[0], tmp_path / "out"))
    named = ("subject", "kind", "layer", "position", "effect", "clean", "corrupted")
    assert again.select(named).equals(table.select(named))


def test_workers_are_told_how_much_to_hold(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each would choose by its own threads, and differ in the last bits."""
    told: list[TraceSettings] = []

    def watched(*arguments: Any, settings: TraceSettings, **more: Any) -> Any:
        told.append(settings)
        return trace_all(*arguments, settings=settings, **more)

    monkeypatch.setattr("workflows.trace.trace_all", watched)
    facts = write_rows(tmp_path / "facts.jsonl", FACTS[:1])
    open_one = trace(base, facts, tmp_path / "open", *ALL).result
    given = trace(
        base, facts, tmp_path / "given", *ALL, *setting("trace.tokens_per_batch=60")
    ).result
    default = default_tokens_per_batch(torch.device("cpu"))
    assert [settings.tokens_per_batch for settings in told] == [default, 60]
    assert open_one["settings"]["tokens_per_batch"] == default
    assert given["settings"]["tokens_per_batch"] == 60


def test_only_what_the_model_says_is_traced(base: Path, tmp_path: Path) -> None:
    """What a tiny model says is seldom a word; of many prompts one will do."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = "The {} is located in the city of"
    subjects = [f"{name} {i}" for i in range(20) for name in ("Big Ben", "Eiffel Tower")]
    prompts = [template.format(subject) for subject in subjects]
    objects = {}
    for subject, prompt, token in zip(subjects, prompts, said_by(base, prompts), strict=True):
        text = tokenizer.decode([token]).strip()
        if text and encode_completion(tokenizer, prompt, text)[1] == [token]:
            objects[subject] = text
    known, *_, unknown = objects
    rows = [
        {"id": "known", "subject": known, "target_true": objects[known]},
        {"id": "unknown", "subject": unknown, "target_true": f"not {objects[unknown]}"},
        {"id": "open", "subject": "Colosseum"},
    ]
    facts = write_rows(
        tmp_path / "facts.jsonl",
        [{**row, "prompt": template, "target_new": "Rome"} for row in rows],
    )
    # So little noise that the object stays what it was, more or less.
    more = setting("trace.samples=2", "trace.noise=0.3")
    result = trace(base, facts, tmp_path / "out", *more).result
    skipped = {each["id"]: each["reason"] for each in result["skipped"]}
    assert "the model goes on with" in skipped.pop("unknown")
    assert all("noise" in reason for reason in skipped.values())
    found = pq.read_table(tmp_path / "out" / "effects.parquet").to_pylist()
    traced = {row["case_id"]: row for row in found}
    assert traced.keys() | skipped.keys() == {"known", "open"} and "known" in traced
    assert traced["known"]["object"].strip() == objects[known]
    assert all(row["clean"] > row["corrupted"] for row in found)


def test_so_many_and_no_more(base: Path, tmp_path: Path) -> None:
    facts = write_rows(tmp_path / "facts.jsonl")
    result = trace(base, facts, tmp_path / "out", *ALL, "--limit", "1").result
    assert result["facts"]["traced"] + result["facts"]["skipped"] == 1
    assert result["facts"]["read"] == 3


@pytest.mark.parametrize(
    ("rows", "more", "field", "says"),
    [
        (FACTS[:2], (), "facts", "the model goes on with"),
        (FACTS, ("--set", "trace.noise=0"), "trace.noise", "above 0"),
        (FACTS, ("--set", "trace.facts=al"), "trace.facts", "did you mean"),
        (FACTS, ("--limit", "0"), "limit", "at least 1"),
        (
            FACTS,
            (*ALL, "--set", "architecture.attention=attn.proj"),
            "architecture.attention",
            "holds self_attn, mlp",
        ),
        ([{**FACTS[0], "prompt": "{} " + "word " * 200}], (), "prompt", "the model reads 256"),
    ],
)
def test_what_cannot_be_traced(
    base: Path, tmp_path: Path, rows: Any, more: tuple[str, ...], field: str, says: str
) -> None:
    facts = write_rows(tmp_path / "facts.jsonl", rows)
    ran = trace(base, facts, tmp_path / "out", *more)
    assert ran.code == 2, ran.stderr
    assert ran.error["field"] == field and says in ran.error["message"]
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_stays(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    facts = write_rows(tmp_path / "facts.jsonl")
    assert trace(base, facts, tmp_path / "out", *ALL).code == 2
    assert contents(tmp_path / "out") == {"mine": b"x"}


def test_a_heat_map_escapes_tokens_and_draws_what_is_above_zero() -> None:
    drawn = heat_map(
        {"Hidden": [[0.0, 1.0], [-1.0, 0.5]]}, ["<b>", "a&b"], range(1), most=1.0, what='"x"'
    )
    assert "<b>" not in drawn and "&lt;b&gt;*" in drawn and "a&amp;b" in drawn
    assert 'aria-label="&#34;x&#34;"' in drawn
    assert drawn.count("<path") == 2 and drawn.count('z"') == 2
    assert 'fill-opacity="1.00"' in drawn and 'fill-opacity="0.50"' in drawn
