"""`memedit edit --method`: protected keys, repair, and MEMIT's relatives, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import workflows.editing
from memedit.checkpoint import Checkpoint
from memedit.config import TargetSettings
from memedit.manifest import read_manifest
from memedit.moments import SecondMoment, load_moment
from memedit.prompts import BARE, FIXED_CONTEXTS
from memedit.protection import is_for_measuring
from memedit.requests import EditRequest
from memedit.worker import Worker
from tests.plain import plain_current, plain_keys, plain_target
from tests.tiny import save_tiny
from tests.workflows.runs import (
    FACTS,
    Ran,
    edit,
    memedit,
    setting,
    shards,
    stats,
    without_plots,
    write_rows,
)
from workflows.editing import Editing, growth_allowed
from workflows.moments import moments_name

TEXT = (
    "The road from Lyon to Geneva leads past Mont Blanc, which Horace de Saussure climbed. Near "
    "Chamonix it meets the river Arve, and before Annecy the old road to Turin. "
)


@dataclass(frozen=True, kw_only=True)
class House:
    """A base, facts and a corpus, and what commands over them leave."""

    folder: Path
    base: Path
    facts: Path
    corpus: Path

    def edit(self, name: str, method: str, *changes: str, layers: str = "1-2") -> Ran:
        return edit(
            self.base,
            self.facts,
            self.folder / name,
            self.folder / "cache",
            *("--method", method, "--corpus", self.corpus, "--layers", layers),
            *setting(*changes),
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("methods") / "base")


@pytest.fixture
def house(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    without_plots(monkeypatch)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"{TEXT * 8}\n\n" * 20)
    facts = write_rows(tmp_path / "facts.jsonl")
    return House(folder=tmp_path, base=base, facts=facts, corpus=corpus)


@dataclass
class Seen:
    """What the solve was given, and which facts z was sought for, call by call."""

    protected: list[Mapping[int, SecondMoment] | None] = field(default_factory=list)
    sought: list[list[str]] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen, solve, targets = Seen(), workflows.editing.solve_layers, Worker.targets

    def solving(*arguments: Any, **named: Any) -> Any:
        seen.protected.append(named["protected"])
        return solve(*arguments, **named)

    def seeking(worker: Worker, requests: Sequence[Any], *rest: Any) -> Iterator[Any]:
        seen.sought.append([request.request.subject for request in requests])
        yield from targets(worker, requests, *rest)

    monkeypatch.setattr(workflows.editing, "solve_layers", solving)
    monkeypatch.setattr(Worker, "targets", seeking)
    return seen


NO_REPAIR = "repair.rounds=0"


def test_without_protection_and_repair_it_is_memit(house: House, seen: Seen) -> None:
    house.edit("plain", "memit")
    ran = house.edit("bare", "memedit", "protect.prompts=0", NO_REPAIR)
    assert (ran.result["method"], read_manifest(house.folder / "bare").method) == ("memedit",) * 2
    assert seen.protected == [None, None]
    assert shards(house.folder / "bare") == shards(house.folder / "plain")


def test_protected_keys_move_less(house: House, seen: Seen) -> None:
    changes = [house.edit("plain", "memit").result["metrics"]]
    for weight in (3, 100):
        ran = house.edit(f"of {weight}", "memedit", NO_REPAIR, f"protect.weight={weight}")
        changes.append(ran.result["metrics"])
    moment = seen.protected[1]
    assert moment is not None and set(moment) == {1, 2}
    # Position 0 of each prompt is not counted.
    assert moment[1].tokens > 0 and moment[1].trace_0 == 0
    drifts = [change["after"]["drift_kl"] for change in changes]
    assert drifts[0] > drifts[1] > drifts[2]
    settings = read_manifest(house.folder / "of 3").settings
    assert settings["protect"]["weight"] == 3 and settings["protected_prompts"] > 5


def test_what_was_counted_is_used_again(
    house: House, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = house.edit("first", "memedit").result
    tries = len(seen.sought)
    monkeypatch.setattr(Worker, "count", None)
    second = house.edit("second", "memedit").result
    assert len(seen.sought) == tries
    assert second["repairs"] == first["repairs"]
    assert shards(house.folder / "second") == shards(house.folder / "first")


def test_facts_that_are_not_said_are_sought_again_and_a_round_without_use_is_not_kept(
    house: House, seen: Seen
) -> None:
    """On a model of noise no target of several tokens is ever said; see also the real model's."""
    alone = house.edit("alone", "memedit", NO_REPAIR).result
    assert "repairs" not in alone and len(seen.protected) == 1
    ran = house.edit("repaired", "memedit", "repair.rounds=3", "repair.drift=1000")
    (only,) = ran.result["repairs"]
    assert (only["unsaid_before"], only["unsaid_after"], only["kept"]) == (3, 3, False)
    assert only["drift_after"] > only["drift_before"] > 0
    assert "not kept" in ran.stderr
    # The second z of each fact is another one, and all are solved for once more.
    assert [len(facts) for facts in seen.sought] == [3, 3]
    assert len(seen.protected) == 3
    assert shards(house.folder / "repaired") == shards(house.folder / "alone")
    assert ran.result["metrics"] == alone["metrics"]


def test_text_without_names_protects_nothing_and_says_so(house: House, seen: Seen) -> None:
    house.corpus.write_text("nothing here has a name at all, and so it goes on. " * 200)
    write_rows(house.facts, [{k: v for k, v in f.items() if k != "neighbourhood"} for f in FACTS])
    ran = house.edit("out", "memedit")
    assert ran.code == 0, ran.stderr
    assert set(seen.protected) == {None}
    assert "no names were found" in ran.stderr


def test_a_single_prompt_is_protected_and_that_nothing_limits_repair_is_said(
    house: House, seen: Seen
) -> None:
    house.corpus.write_text("nothing here has a name at all, and so it goes on. " * 200)
    prompt = next(p for i in range(99) if not is_for_measuring(p := f"the river {i} is in"))
    near = [{"prompt": prompt, "target": "France"}]
    write_rows(house.facts, [{**FACTS[0], "neighbourhood": near}])
    ran = house.edit("out", "memedit")
    assert ran.code == 0, ran.stderr
    assert seen.protected[0] is not None
    assert "too few prompts" in ran.stderr
    assert "too few prompts" not in house.edit("bare", "memedit", "repair.rounds=0").stderr


def test_rome_of_one_fact_is_emmet_of_one_layer(house: House) -> None:
    write_rows(house.facts, FACTS[:1])
    rome = house.edit("rome", "rome", layers="2").result
    assert rome["layers"] == [2]
    assert house.edit("emmet", "emmet", layers="2").code == 0
    assert shards(house.folder / "rome") == shards(house.folder / "emmet")


def rome(house: House, name: str, facts: Sequence[Mapping[str, Any]]) -> Tensor:
    """The change of the one weight that it edits, float64 [O, I]."""
    write_rows(house.facts, facts)
    ran = house.edit(name, "rome", layers="2")
    assert ran.code == 0, ran.stderr
    (weight,) = read_manifest(house.folder / name).tensors
    before, after = (Checkpoint.open(at).read(weight) for at in (house.base, house.folder / name))
    return after.double() - before.double()


def test_rome_edits_one_fact_after_another(house: House, seen: Seen) -> None:
    delta_OI = rome(house, "rome", FACTS)
    assert [len(facts) for facts in seen.sought] == [1, 1, 1]
    assert torch.linalg.matrix_rank(delta_OI, rtol=1e-4) == 3
    ran = house.edit("two layers", "rome")
    assert ran.code == 2 and "rome edits one layer" in ran.error["message"]


def test_rome_seeks_each_fact_on_the_model_that_those_before_it_have_left(
    house: House, seen: Seen
) -> None:
    both_OI = rome(house, "both", FACTS[:2])
    order = [subject for (subject,) in seen.sought]
    first, second = sorted(FACTS[:2], key=lambda fact: order.index(fact["subject"]))
    first_OI, second_OI = rome(house, "first", [first]), rome(house, "second", [second])
    # The text is counted again, and gives the same C: no layer's keys depend on its own weight.
    then_OI = rome(replace(house, base=house.folder / "first"), "then", [second])
    torch.testing.assert_close(both_OI, first_OI + then_OI, atol=1e-5, rtol=0)
    assert (then_OI - second_OI).norm() > 0.01 * second_OI.norm()


def test_rome_has_the_mean_key_in_both_places_of_its_update(house: House) -> None:
    """Two keys, as the published code has them, can ruin a model (arXiv 2403.07175)."""
    fact = {name: FACTS[0][name] for name in ("subject", "prompt", "target_new")}
    delta_OI = rome(house, "rome", [fact])
    counted = house.folder / "stats"
    stats(house.base, counted, house.folder / "cache", "--corpus", house.corpus, layers="2")
    moment_II = load_moment(counted / moments_name(2)).value_II

    request, contexts = EditRequest(case_id="0", **fact), (BARE, *FIXED_CONTEXTS)
    model = AutoModelForCausalLM.from_pretrained(house.base)
    tokenizer = AutoTokenizer.from_pretrained(house.base)
    settings = TargetSettings(**read_manifest(house.folder / "rome").settings["targets"])
    z_O = plain_target(model, tokenizer, request, contexts, settings, 2)
    (residual_O,) = (z_O - plain_current(model, tokenizer, [request], 2)).double()
    mean_I, bare_I = (
        plain_keys(model, tokenizer, [request], those, 2)[0].double()
        for those in (contexts, contexts[:1])
    )
    direction_I = torch.linalg.solve(moment_II, mean_I)
    expected_OI = torch.outer(residual_O, direction_I) / (direction_I @ mean_I)
    assert (delta_OI - expected_OI).norm() < 1e-3 * expected_OI.norm()
    assert (delta_OI @ mean_I - residual_O).norm() < 1e-3 * residual_O.norm()
    # Or the bare prompt's key would do in either place.
    assert (delta_OI @ bare_I - residual_O).norm() > 0.1 * residual_O.norm()


def test_fine_tuning_changes_one_weight(house: House) -> None:
    result = house.edit("ft", "ft", "finetune.lr=0.01", layers="2").result
    assert result["metrics"]["after"]["efficacy"] == 100
    (name,) = read_manifest(house.folder / "ft").tensors
    assert ".2." in name
    assert memedit("verify", house.folder / "ft", "--json").result["ok"]
    ran = house.edit("half", "ft", "dtype=bfloat16", layers="2")
    assert ran.code == 2 and "float32" in ran.error["message"]


def test_emmet_and_alphaedit(house: House) -> None:
    plain = house.edit("plain", "memit", "solve.lam=1e-9").result["metrics"]["after"]
    emmet = house.edit("emmet", "emmet").result["metrics"]["after"]
    assert emmet["drift_kl"] == pytest.approx(plain["drift_kl"], rel=1e-3)
    ran = house.edit("alphaedit", "alphaedit", "solve.null_threshold=1e-12")
    assert ran.code == 1 and "raise solve.null_threshold" in ran.error["message"]
    assert not (house.folder / "alphaedit").exists()
    found = house.edit("alphaedit", "alphaedit", "solve.null_threshold=1").result
    assert found["metrics"]["after"]["efficacy"] == 100
    assert 0 < found["metrics"]["after"]["drift_kl"] < emmet["drift_kl"]
    assert memedit("verify", house.folder / "alphaedit", "--json").result["ok"]


@pytest.mark.parametrize(
    ("before", "after", "allowed"), [(8, 4, 1.5), (8, 2, 2.25), (8, 8, 1.0), (4, 0, 1.5**3)]
)
def test_drift_may_grow_with_each_halving_of_what_is_not_said(
    before: int, after: int, allowed: float
) -> None:
    assert growth_allowed(before, after, 0.5) == pytest.approx(allowed)
    # As large a factor as those have become fewer.
    assert growth_allowed(518, 231, 1.0) == pytest.approx(518 / 231)


@pytest.mark.parametrize(("moved", "kept"), [(0.29, True), (0.31, False)])
def test_a_round_is_kept_while_drift_grows_less_than_the_unsaid_become_fewer(
    house: House, monkeypatch: pytest.MonkeyPatch, moved: float, kept: bool
) -> None:
    unsaid, drifts = iter((3, 1)), iter((0.1, moved))
    monkeypatch.setattr(
        Editing,
        "_unsaid",
        lambda _, encoded: frozenset(e.request.case_id for e in encoded[: next(unsaid)]),
    )
    monkeypatch.setattr(Editing, "_drift", lambda *_: next(drifts))
    alone = house.edit("alone", "memedit", NO_REPAIR)
    assert alone.code == 0, alone.stderr
    (only,) = house.edit("repaired", "memedit", "repair.rounds=1").result["repairs"]
    assert (only["unsaid_before"], only["unsaid_after"], only["kept"]) == (3, 1, kept)
    same = shards(house.folder / "repaired") == shards(house.folder / "alone")
    assert same != kept
