"""Where settings come from, and when a person is told that they are only guessed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from memedit.config import EditSettings, SolveSettings
from memedit.defaults import Defaults
from memedit.errors import InputError
from workflows.origin import TunedRecord, digest_of_tuned, doubt_of, origin_of, record_of
from workflows.session import settings_origin
from workflows.settings import EditJob, StatsJob

HERE, ELSEWHERE = "1" * 64, "2" * 64
RECORD: dict[str, Any] = {
    "model": "theirs",
    "model_digest": ELSEWHERE,
    "facts": "facts.jsonl",
    "facts_digest": "3" * 64,
    "facts_at_once": 30,
    "settings_digest": digest_of_tuned(
        EditSettings(method="memedit", layers=(1,), solve=SolveSettings(lam=3))
    ),
    "corpus": "self",
    "stats": None,
    "objective": "score",
    "trials": 12,
    "when": "2026-11-29 12:00 UTC",
    "run_id": "r",
    "memedit": "0.1.0",
}


def defaults(origin: Any = "guessed") -> Defaults:
    return Defaults(
        settings=EditSettings(), source="no published settings for x 1 2", origin=origin
    )


def job(**fields: Any) -> EditJob:
    return EditJob(facts="f", out="o", **fields)


def doubt(job: Any, found: Defaults, n_facts: int = 30) -> str | None:
    return doubt_of(job, found, lambda: HERE, "mine", n_facts)


@pytest.mark.parametrize("origin", ["published", "tuned here"])
def test_what_is_known_is_not_doubted(origin: Any) -> None:
    assert doubt(job(), defaults(origin)) is None
    assert origin_of(job(), defaults(origin), lambda: HERE).startswith(f"{origin}: no published")


def test_what_is_guessed_is_named_with_the_remedy() -> None:
    told = doubt(job(), defaults())
    assert told is not None
    assert told.startswith("mine: no published settings") and "`memedit tune`" in told
    assert "layers and λ are guessed" in told


def test_only_what_was_not_given_is_a_guess() -> None:
    told = doubt(job(layers=(1, 2)), defaults())
    assert told is not None and "; λ are guessed" not in told and "λ is guessed" in told
    assert doubt(job(layers=(1, 2), solve={"lam": 3.0}), defaults()) is None
    told = doubt(job(solve={"lam": 3.0}), defaults())
    assert told is not None and "layers are guessed" in told


def test_statistics_need_no_lambda() -> None:
    assert doubt(StatsJob(out="o", layers=(1,)), defaults()) is None
    told = doubt(StatsJob(out="o"), defaults())
    assert told is not None and "layers are guessed" in told


def test_settings_that_were_tuned_for_this_model_say_so() -> None:
    tuned = job(layers=(1,), solve={"lam": 3.0}, tuned=RECORD | {"model_digest": HERE})
    assert origin_of(tuned, defaults(), lambda: HERE).startswith(
        "tuned: 12 trials with 30 facts at once"
    )
    assert doubt(tuned, defaults()) is None


def tuned_here(**fields: Any) -> EditJob:
    given = {"layers": (1,), "solve": {"lam": 3.0}, "tuned": RECORD | {"model_digest": HERE}}
    return job(**given | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": (1, 2)},
        {"method": "memit"},
        {"solve": {"lam": 99999.0}},
        {"targets": {"lr": 0.1}},
        {"protect": {"weight": 1.0}},
        {"solve": {"lam": 3.0, "sweeps": 2}},
    ],
)
def test_settings_that_were_changed_later_are_not_called_tuned(fields: Any) -> None:
    changed = tuned_here(**fields)
    told = origin_of(changed, defaults(), lambda: HERE)
    assert told.startswith("tuned, then changed: 12 trials")
    assert "the settings were changed after they were tuned" in (doubt(changed, defaults()) or "")


def test_what_was_not_searched_may_change() -> None:
    free = tuned_here(targets={"tokens_per_batch": 9}, evaluation={"drift_prompts": 1})
    assert origin_of(free, defaults(), lambda: HERE).startswith("tuned: ")
    assert doubt(free, defaults()) is None


@pytest.mark.parametrize("n_facts", [9, 91])
def test_a_lambda_is_doubted_for_many_more_facts_or_fewer(n_facts: int) -> None:
    assert doubt(tuned_here(), defaults(), 10) is None is doubt(tuned_here(), defaults(), 90)
    told = doubt(tuned_here(), defaults(), n_facts)
    assert f"λ was tuned with 30 facts at once, not with {n_facts}" in (told or "")


def test_settings_are_doubted_with_other_statistics(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text")
    record = RECORD | {"model_digest": HERE, "corpus": str(text)}
    assert doubt(tuned_here(tuned=record, corpus=f"{tmp_path}/./text.txt"), defaults()) is None
    assert doubt(tuned_here(tuned=record, stats="s"), defaults()) is None  # of who knows what
    told = doubt(tuned_here(tuned=record), defaults())
    assert f"tuned with the statistics of {text}, not with those of self" in (told or "")


def test_the_command_names_the_text_that_was_tuned_with() -> None:
    plain = "memedit edit --config s.yaml --facts FACTS --out OUT"
    assert TunedRecord.read(RECORD).command("s.yaml") == plain
    record = TunedRecord.read(RECORD | {"corpus": "my text.txt", "stats": "/s"})
    assert record.command("s.yaml") == f"{plain} --corpus 'my text.txt' --stats /s"


@pytest.mark.parametrize("origin", ["published", "guessed"])
def test_settings_that_were_tuned_for_another_model_are_doubted(origin: Any) -> None:
    tuned = job(layers=(1,), solve={"lam": 3.0}, tuned=RECORD)
    assert origin_of(tuned, defaults(origin), lambda: HERE).startswith(f"{origin}: ")
    told = doubt(tuned, defaults(origin))
    assert told is not None and "tuned for theirs, another model (222222222222…" in told


def test_the_record_of_a_run_speaks_of_its_method() -> None:
    config = AutoConfig.for_model("gptj", n_embd=4096, n_layer=28)
    base: Any = SimpleNamespace(config=config, identity=lambda: HERE)
    assert settings_origin(job(method="memit"), base, 10).endswith("(kmeng01/memit)")
    told = settings_origin(job(), base, 10)
    assert told.startswith("published: GPT-J 6B") and "measured on SmolLM2 only" in told


def test_a_record_is_as_tune_writes_it() -> None:
    assert record_of(job()) is None
    with pytest.raises(InputError, match="not what `memedit tune` writes: trials"):
        record_of(job(tuned={n: v for n, v in RECORD.items() if n != "trials"}))


def test_a_model_that_is_not_read_is_taken_for_the_one_that_was_tuned() -> None:
    """A plan does not fetch the weights."""
    tuned = job(layers=(1,), solve={"lam": 3.0}, tuned=RECORD)
    assert origin_of(tuned, defaults(), lambda: None).startswith("tuned: ")
    assert doubt_of(tuned, defaults(), lambda: None, "mine", 30) is None


def test_without_a_record_no_model_is_read() -> None:
    def read() -> str:
        raise AssertionError

    assert origin_of(job(), defaults(), read).startswith("guessed: ")
    assert doubt_of(job(), defaults(), read, "mine", 30) is not None
