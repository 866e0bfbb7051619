"""The fast paths against the plain oracle on the real model: z, statistics, Δ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memedit.collect import collect_moments
from memedit.config import MomentSettings, SolveSettings, TargetSettings
from memedit.executor import InlineExecutor
from memedit.files import LocalFiles
from memedit.model import ModelSpec, load_model
from memedit.progress import Silent
from memedit.prompts import BARE, FIXED_CONTEXTS, encode_request
from memedit.requests import EditRequest
from memedit.solve import METHODS
from memedit.stages import find_targets, solve_layers
from tests.plain import plain_current, plain_edit, plain_moments, plain_target
from workflows.facts import read_facts

pytestmark = pytest.mark.slow

LAYERS = (5, 6, 7, 8, 9)
CONTEXTS = (BARE, *FIXED_CONTEXTS[:2])
LAM = 400.0


@pytest.fixture(scope="module")
def requests() -> list[EditRequest]:
    facts = Path(__file__).parents[2] / "examples" / "facts.jsonl"
    table = read_facts(facts, on_bad_row="fail")
    # Prompts that begin with the subject and prompts that do not: their KL rows differ.
    begins = [r for r in table.requests if r.prompt.startswith("{}")]
    others = [r for r in table.requests if not r.prompt.startswith("{}")]
    return [begins[0], others[0], others[-1]]


@pytest.fixture()
def executor(smollm2: Path) -> Iterator[InlineExecutor]:
    with InlineExecutor(ModelSpec(files=LocalFiles(smollm2))) as executor:
        yield executor


def test_z_statistics_and_updates_equal_the_plain_ones(
    smollm2: Path, executor: InlineExecutor, requests: list[EditRequest]
) -> None:
    plain = load_model(ModelSpec(files=LocalFiles(smollm2)))
    model, tokenizer = plain.model, plain.tokenizer
    settings = TargetSettings(steps=6, lr=0.5, tokens_per_batch=60)  # so that the batch is refilled
    encoded = [encode_request(tokenizer, request, CONTEXTS) for request in requests]
    targets, _ = find_targets(
        executor,
        encoded,
        layer=LAYERS[-1],
        settings=settings,
        known={},
        keep=lambda target: None,
        progress=Silent(),
    )
    h_NO = plain_current(model, tokenizer, requests, LAYERS[-1])
    zs_NO = torch.stack(
        [plain_target(model, tokenizer, r, CONTEXTS, settings, LAYERS[-1]) for r in requests]
    )
    for target, z_O, h_O in zip(targets, zs_NO, h_NO, strict=True):
        assert torch.cosine_similarity(target.z_O, z_O, dim=0) >= 0.999
        # z is mostly h; what was optimised is the difference.
        assert (target.z_O - z_O).norm() <= 5e-3 * (z_O - h_O).norm()

    windows = [tokenizer(r.text * 3)["input_ids"][:48] for r in requests]
    counted = collect_moments(
        executor, windows, layers=LAYERS, settings=MomentSettings(), progress=Silent()
    )
    moments = {moment.layer: moment for moment in counted}
    for layer in LAYERS:
        plain_II, tokens = plain_moments(model, tokenizer, windows, layer)
        assert moments[layer].tokens == tokens
        assert (moments[layer].value_II - plain_II).norm() <= 1e-5 * plain_II.norm()

    # So few tokens make C singular: the same ridge on both sides.
    ridge = 1e-3
    ridged = {}
    for layer in LAYERS:
        ridged[layer] = moments[layer].value_II.clone()
        ridged[layer].diagonal().add_(ridge * ridged[layer].diagonal().mean())
    solved = solve_layers(
        executor,
        encoded,
        targets,
        moments=moments,
        layers=LAYERS,
        method=METHODS["memit"],
        settings=SolveSettings(lam=LAM, ridge=ridge),
        residual_scale=1.0,
        stored=dict.fromkeys(LAYERS, torch.float32),
        device=torch.device("cpu"),
        progress=Silent(),
    )
    given = torch.stack([target.z_O for target in targets])
    deltas = plain_edit(model, tokenizer, requests, CONTEXTS, given, ridged, LAM, LAYERS)
    for layer in solved:
        expected = deltas[layer.update.layer]
        error = (layer.update.delta_OI - expected).norm() / expected.norm()
        assert error <= 1e-3, f"layer {layer.update.layer}: {error:.2e}"
