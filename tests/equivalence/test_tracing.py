"""Tracing many states at once equals restoring one state per forward pass, in every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from memedit import tracing
from memedit.architecture import Architecture, architecture_of
from memedit.config import TraceSettings
from memedit.segments import run
from memedit.tracing import (
    KINDS,
    PARTS,
    FactTrace,
    TraceRequest,
    embedding_spread,
    noise_of,
    trace_facts,
)
from tests.plain_tracing import plain_probability, plain_window
from tests.tiny import DENSE, LAYERS, tiny_model

REQUESTS = [
    # Longer than the sliding windows of the tiny models (16), so that a wrong mask shows.
    TraceRequest(
        case_id="long",
        ids=tuple(range(5, 77, 4)),
        subject_first=11,
        subject_last=13,
        target_id=0,
    ),
    TraceRequest(
        case_id="at the start",
        ids=(40, 8, 90, 17, 33),
        subject_first=0,
        subject_last=1,
        target_id=0,
    ),
    TraceRequest(
        case_id="at the end", ids=(300, 200, 100), subject_first=1, subject_last=2, target_id=0
    ),
]
SETTINGS = TraceSettings(noise=3.0, samples=2, window=3, seed=5, tokens_per_batch=40)


def modules_of(model: Any, arch: Architecture, kind: str, layer: int) -> nn.Module:
    of = {"hidden": arch.block, "mlp": arch.rewrite_module, "attention": arch.attention_output}
    return of[kind](model, layer)


def plain_trace(model: Any, arch: Architecture, request: TraceRequest, spread: float) -> FactTrace:
    """Everything, one state at a time."""
    width = model.get_input_embeddings().weight.shape[1]
    common: dict[str, Any] = dict(
        noise_SNO=noise_of(request, SETTINGS, spread, width),
        subject=slice(request.subject_first, request.subject_last + 1),
    )

    def probability(**more: Any) -> tuple[float, float]:
        return plain_probability(
            model,
            lambda kind, layer: modules_of(model, arch, kind, layer),
            request.ids,
            request.target_id,
            **common,
            **more,
        )

    kept: dict[Any, Any] = {(part, layer): None for part in PARTS for layer in range(LAYERS)}
    clean, corrupted = probability(kept=kept)
    tokens, last = len(request.ids), request.subject_last
    effects = {kind: torch.zeros(LAYERS, tokens) for kind in KINDS}
    severed = {part: torch.zeros(LAYERS) for part in PARTS}
    for layer in range(LAYERS):
        for kind in KINDS:
            layers = [layer] if kind == "hidden" else plain_window(layer, 3, LAYERS)
            for position in range(tokens):
                _, found = probability(restored=[(kind, at, position) for at in layers])
                effects[kind][layer, position] = found - corrupted
        for part in PARTS:
            above = {(part, at, last): kept[part, at][1:, last] for at in range(layer + 1, LAYERS)}
            _, found = probability(restored=[("hidden", layer, last)], severed=above)
            severed[part][layer] = found - corrupted
    return FactTrace(
        case_id=request.case_id,
        clean=clean,
        corrupted=corrupted,
        effects_LT=effects,
        severed_L=severed,
    )


def _greedy(model: Any, ids: tuple[int, ...]) -> int:
    return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


@pytest.mark.parametrize("name", DENSE)
def test_equals_one_state_per_pass(name: str) -> None:
    model = tiny_model(name)
    arch = architecture_of(model.config)
    ids = [token for r in REQUESTS for token in r.ids[r.subject_first : r.subject_last + 1]]
    spread = embedding_spread(model, ids)
    requests = [replace(r, target_id=_greedy(model, r.ids)) for r in REQUESTS]
    traces = trace_facts(model, arch, requests, settings=SETTINGS, spread=spread)
    for request, found in zip(requests, traces, strict=True):
        plain = plain_trace(model, arch, request, spread)
        scale = float(plain.effects_LT["hidden"].abs().max())
        assert scale > 1e-5, "nothing happens, so nothing is tested"
        assert found.clean == pytest.approx(plain.clean, abs=1e-6)
        assert found.corrupted == pytest.approx(plain.corrupted, abs=1e-6)
        for kind in KINDS:
            torch.testing.assert_close(
                found.effects_LT[kind], plain.effects_LT[kind], atol=2e-3 * scale, rtol=1e-3
            )
        for part in PARTS:
            torch.testing.assert_close(
                found.severed_L[part], plain.severed_L[part], atol=2e-3 * scale, rtol=1e-3
            )


def test_a_fact_is_traced_alike_alone_and_among_others() -> None:
    model = tiny_model("llama")
    arch = architecture_of(model.config)
    among = trace_facts(model, arch, REQUESTS, settings=SETTINGS, spread=0.2)
    wide = replace(SETTINGS, tokens_per_batch=4096)
    (alone,) = trace_facts(model, arch, REQUESTS[1:2], settings=wide, spread=0.2)
    assert alone.case_id == "at the start" and alone.total == pytest.approx(among[1].total)
    for kind in KINDS:
        torch.testing.assert_close(
            alone.effects_LT[kind], among[1].effects_LT[kind], atol=1e-6, rtol=1e-4
        )


def test_a_batch_holds_no_more_positions_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before the restored one count, for their keys and values are held for each row."""
    held: list[tuple[int, int]] = []

    def watched(model: Any, rows: Any) -> Any:
        before = rows.prefix.mask_BP.shape[1] if rows.prefix else 0
        held.append((rows.input_ids_BT.shape[0], before + rows.input_ids_BT.shape[1]))
        return run(model, rows)

    monkeypatch.setattr(tracing, "run", watched)
    model = tiny_model("llama")
    settings = replace(SETTINGS, tokens_per_batch=100)
    trace_facts(model, architecture_of(model.config), REQUESTS, settings=settings, spread=0.2)
    several = [rows * width for rows, width in held if rows > SETTINGS.samples]
    assert several and max(several) <= 100


def test_what_must_hold_of_any_model() -> None:
    """The last position's last state is the clean prediction; before the subject is nothing."""
    model = tiny_model("gpt2")
    arch = architecture_of(model.config)
    traces = trace_facts(model, arch, REQUESTS, settings=SETTINGS, spread=0.2)
    for request, trace in zip(REQUESTS, traces, strict=True):
        hidden_LT = trace.effects_LT["hidden"]
        assert float(hidden_LT[-1, -1]) == pytest.approx(trace.total, abs=1e-6)
        assert hidden_LT[-1, :-1].abs().max() < 1e-6
        for effect_LT in trace.effects_LT.values():
            assert bool((effect_LT[:, : request.subject_first] == 0).all())
        # Above the last layer nothing can be severed.
        last = hidden_LT[-1, request.subject_last]
        for severed_L in trace.severed_L.values():
            assert float(severed_L[-1]) == pytest.approx(float(last), abs=1e-6)
