"""Solving layer by layer where the solver's device is too small."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memedit import stages
from memedit.config import EvaluationSettings, SolveSettings
from memedit.drift import DriftReference
from memedit.executor import InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.moments import SecondMoment
from memedit.requests import EditRequest
from memedit.solve import METHODS, Method, MomentFactor
from memedit.stages import SolvedLayer, solve_layers
from tests.heard import Heard
from tests.memedit.made_edits import made_moments, made_targets
from tests.memedit.test_devices import LAYERS_EDITED, _requests
from tests.tiny import save_tiny

SMALL = torch.device("meta")
"""Stands for a GPU, which has no room."""


def _solved(
    folder: Path,
    device: torch.device,
    heard: Heard,
    *,
    method: Method = METHODS["memit"],
    ridge: float = 0.0,
) -> list[SolvedLayer]:
    requests = _requests()
    with InlineExecutor(ModelSpec(files=LocalFiles(folder))) as executor:
        return solve_layers(
            executor,
            requests,
            made_targets(requests),
            moments=made_moments(LAYERS_EDITED),
            layers=LAYERS_EDITED,
            method=method,
            settings=SolveSettings(lam=10.0, ridge=ridge),
            residual_scale=1.0,
            stored=dict.fromkeys(LAYERS_EDITED, torch.float32),
            device=device,
            progress=heard,
        )


def test_a_gpu_without_room_gives_way_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the rest of the run, and what comes out is the same."""
    folder = save_tiny(tmp_path)
    expected = _solved(folder, torch.device("cpu"), Heard())
    factors: list[tuple[int, str]] = []

    def factor(moment_II: torch.Tensor, *, layer: int, **more: Any) -> MomentFactor:
        factors.append((layer, moment_II.device.type))
        if moment_II.device == SMALL:
            raise torch.OutOfMemoryError
        return MomentFactor(moment_II, layer=layer, **more)

    monkeypatch.setattr(stages, "MomentFactor", factor)
    heard = Heard()
    for mine, theirs in zip(_solved(folder, SMALL, heard), expected, strict=True):
        assert torch.equal(mine.update.delta_OI, theirs.update.delta_OI)
        assert mine.residual_norm == theirs.residual_norm
    assert factors == [(1, "meta"), (1, "cpu"), (2, "cpu")]
    assert len(heard.texts) == 1 and "layer 1 does not fit" in heard.texts[0]


def test_with_a_ridge_the_moment_itself_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a third matrix would lie in memory while a layer is solved."""
    alive: list[bool] = []
    values: list[Any] = []
    value_II = SecondMoment.value_II.fget  # type: ignore[attr-defined]

    def watched(moment: SecondMoment) -> torch.Tensor:
        found: torch.Tensor = value_II(moment)
        values.append(weakref.ref(found))
        return found

    def from_factors(problem: Any) -> Any:
        alive.append(values[-1]() is not None)
        return METHODS["memit"].from_factors(problem)

    monkeypatch.setattr(SecondMoment, "value_II", property(watched))
    method = replace(METHODS["memit"], from_factors=from_factors)
    _solved(save_tiny(tmp_path), torch.device("cpu"), Heard(), method=method, ridge=0.1)
    assert alive == [False] * len(LAYERS_EDITED)


def test_a_cpu_without_room_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def factor(*_: Any, **__: Any) -> MomentFactor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stages, "MomentFactor", factor)
    with pytest.raises(torch.OutOfMemoryError):
        _solved(save_tiny(tmp_path), torch.device("cpu"), Heard())


def test_what_is_left_out_later_makes_no_other_sample(tmp_path: Path) -> None:
    """Another model that is judged on fewer facts writes about the same ones as the first."""
    facts = [
        EditRequest(
            case_id=str(i),
            subject=subject,
            prompt="{} is located in the city of",
            target_new="Rome",
            generation_prompts=(f"{subject} stands",),
            references=(f"The {subject} stands in Rome.", "Rome is old."),
        )
        for i, subject in enumerate(("Big Ben", "Colosseum", "Louvre"))
    ]
    settings = EvaluationSettings(
        fluency_facts=2, fluency_tokens=6, consistency_facts=2, consistency_tokens=6
    )

    def judged(some: list[EditRequest], reference: DriftReference | None) -> Any:
        return stages.judge(
            executor,
            some,
            heldout=[],
            reference=reference,
            settings=settings,
            progress=Heard(),
        )

    with InlineExecutor(ModelSpec(files=LocalFiles(save_tiny(tmp_path)))) as executor:
        first, reference = judged(facts, None)
        second, _ = judged(facts[1:], reference)
        alone, _ = judged(facts[1:], None)
    assert [f.consistency is not None for f in first.facts] == [True, True, False]
    assert second.facts == first.facts[1:]
    assert second.metrics["fluency"] == first.metrics["fluency"] != alone.metrics["fluency"]
    assert alone.facts[1].consistency is not None
