"""Every stage on a local Ray of two workers against the same stage in this process.

With one thread each, whatever does not depend on the order of a sum is the same bit for bit: z
vectors, keys, current values, updates, judgements. Second moments are float64 sums that are taken
in another order, so they agree to 1e-12.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.executors import open_executor
from memedit import collect, free_text, side_effects, stages
from memedit.architecture import Architecture
from memedit.config import EvaluationSettings, MomentSettings, SolveSettings, TargetSettings
from memedit.drift import DriftReference
from memedit.executor import Executor
from memedit.files import LocalFiles
from memedit.model import ModelSpec, load_model
from memedit.moments import SecondMoment
from memedit.progress import Silent
from memedit.prompts import EncodedRequest, encode_request
from memedit.requests import EditRequest, Neighbour
from memedit.solve import METHODS
from memedit.targets import Target
from tests.cluster.processes import comes_true, processes_with
from tests.tiny import VOCAB, save_tiny

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LAYERS = (1, 2)
CONTEXTS = ("{}", "Therefore I think. {}", "Because the tower stands in Germany, it is. {}")
PLACES = ("Paris", "Rome", "London", "Berlin", "Warsaw")
REQUESTS = [
    EditRequest(
        case_id=str(i),
        subject=subject,
        prompt=prompt,
        target_new=PLACES[i % 5],
        target_true=PLACES[(i + 1) % 5],
        paraphrases=(f"You know where {subject} is, in",),
        neighbourhood=(
            Neighbour(prompt="Toyota produces cars in", target="Japan"),
            Neighbour(prompt=f"The capital of {PLACES[i % 5]} is", target="Rome"),
            Neighbour(prompt=f"{PLACES[i % 5]} lies in", target="Spain"),
        ),
        attributes=(f"The city of {PLACES[i % 4]} is in",),
        portability=(Neighbour(prompt=f"The language of {subject} is", target="French"),),
        generation_prompts=(f"{subject} stands in", f"Near {subject} there is"),
        references=(f"{PLACES[i % 5]} is a city of towers.", "It belongs to Europe."),
    )
    for i, (subject, prompt) in enumerate(
        (subject, prompt)
        for subject in ("Eiffel Tower", "Danielle Darrieux", "Microsoft", "Steve Jobs")
        for prompt in ("The {} is located in", "I know that {} was born in", "Apple and {} are in")
    )
]
TARGETS = TargetSettings(steps=6, lr=0.2, tokens_per_batch=40)
JUDGEMENT = EvaluationSettings(
    **dict(drift_prompts=5, fluency_facts=3, fluency_tokens=5),
    **dict(consistency_facts=7, consistency_tokens=6, heldout_tokens=96, heldout_window=32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), bos=True)


@pytest.fixture(scope="module", autouse=True)
def small_units() -> Iterator[None]:
    """Several units for each worker, though the facts are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "TOKENS_PER_COUNT", 256)
        patch.setattr(stages, "_BATCHES_PER_UNIT", 1)
        patch.setattr(stages, "FACTS_PER_KEY_UNIT", 5)
        patch.setattr(stages, "FACTS_PER_SCORE_UNIT", 5)
        for name in ("_PROMPTS_PER_TEXTS", "_PROMPTS_PER_DRIFT", "_WINDOWS_PER_PART"):
            patch.setattr(side_effects, name, 2)
        yield


@pytest.fixture(scope="module")
def inline(folder: Path) -> Iterator[Executor]:
    threads = torch.get_num_threads()
    with open_executor("inline", ModelSpec(files=LocalFiles(folder)), threads=1) as executor:
        yield executor
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def on_ray(folder: Path) -> Iterator[Executor]:
    # Servers of other tests may have inherited the token, which stays the same.
    earlier = processes_with("").keys()
    with open_executor(
        "ray", ModelSpec(files=LocalFiles(folder)), workers=2, threads=1
    ) as executor:
        assert executor.n_workers == 2
        yield executor
    import ray

    assert not ray.is_initialized()
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ["RAY_AUTH_TOKEN_PATH"]

    def left() -> dict[int, str]:
        return {n: command for n, command in processes_with(token).items() if n not in earlier}

    comes_true(lambda: not left(), within_s=60)
    assert not left()


@pytest.fixture
def both(inline: Executor, on_ray: Executor, folder: Path) -> tuple[Executor, Executor]:
    """Both executors with the unedited model."""
    for executor in (inline, on_ray):
        executor.broadcast("load", ModelSpec(files=LocalFiles(folder)))
    return inline, on_ray


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load_model(ModelSpec(files=LocalFiles(folder)))


@pytest.fixture(scope="module")
def encoded(loaded: Any) -> list[EncodedRequest]:
    return [encode_request(loaded.tokenizer, request, CONTEXTS) for request in REQUESTS]


def windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 100, (60,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def moments_of(executor: Executor, *, tolerance: float = 0.0) -> dict[int, SecondMoment]:
    counted = collect.collect_moments(
        executor,
        windows(),
        layers=LAYERS,
        settings=MomentSettings(tolerance=tolerance),
        progress=Silent(),
    )
    return {moment.layer: moment for moment in counted}


def targets_of(executor: Executor, encoded: list[EncodedRequest]) -> list[Target]:
    targets, quarantined = stages.find_targets(
        executor,
        encoded,
        layer=LAYERS[-1],
        settings=TARGETS,
        known={},
        keep=lambda target: None,
        progress=Silent(),
    )
    assert not quarantined
    return targets


def solved_by(
    executor: Executor,
    encoded: list[EncodedRequest],
    targets: list[Target],
    moments: dict[int, SecondMoment],
    arch: Architecture,
) -> list[stages.SolvedLayer]:
    return stages.solve_layers(
        executor,
        encoded,
        targets,
        moments=moments,
        layers=LAYERS,
        method=METHODS["memit"],
        settings=SolveSettings(lam=20.0, sweeps=2),
        residual_scale=arch.residual_scale,
        stored=dict.fromkeys(LAYERS, torch.bfloat16),
        device=torch.device("cpu"),
        progress=Silent(),
    )


def test_sampled_text(both: tuple[Executor, Executor]) -> None:
    units = [(2, 12, seed) for seed in range(5)]
    first, second = (dict(executor.map("sample", units)) for executor in both)
    assert first == second


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_second_moments(both: tuple[Executor, Executor], tolerance: float) -> None:
    first, second = (moments_of(executor, tolerance=tolerance) for executor in both)
    assert first.keys() == second.keys() == set(LAYERS)
    total = sum(map(len, windows()))
    for layer in LAYERS:
        a, b = first[layer], second[layer]
        assert a.tokens == b.tokens
        assert (a.tokens == total) is (tolerance == 0.0)  # or it ended early
        assert a.spread.batches == b.spread.batches > 1
        for one, other in (
            (a.sum_II, b.sum_II),
            (a.spread.mean_SS, b.spread.mean_SS),
            (a.spread.squares_SS, b.spread.squares_SS),
        ):
            assert one.dtype == torch.float64
            assert (one - other).norm() <= 1e-12 * one.norm()
        assert a.trace_0 == pytest.approx(b.trace_0, rel=1e-12)


def test_targets_keys_and_updates(
    both: tuple[Executor, Executor],
    encoded: list[EncodedRequest],
    loaded: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (targets_of(executor, encoded) for executor in both)
    assert (
        [t.case_id for t in first] == [t.case_id for t in second] == [r.case_id for r in REQUESTS]
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.z_O, b.z_O)
        assert (a.losses, a.delta_norm, a.h_norm) == (b.losses, b.delta_norm, b.h_norm)
        assert a.delta_norm > 0.1  # it moved

    moments = moments_of(both[0])
    one, other = (solved_by(executor, encoded, first, moments, loaded.arch) for executor in both)
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x.update.delta_OI, y.update.delta_OI)
        assert x.residual_norm == y.residual_norm
        assert x.update.delta_OI.norm() > 0
    # Added up by the workers it is the same, but for the order of float64 sums.
    monkeypatch.setattr(stages, "factors_are_cheaper", lambda *shape: False)
    for executor in both:
        executor.broadcast("load", ModelSpec(files=LocalFiles(folder)))
        for x, y in zip(
            one, solved_by(executor, encoded, first, moments, loaded.arch), strict=True
        ):
            assert y.update.right_NI is None
            difference = (x.update.delta_OI - y.update.delta_OI).norm()
            assert difference <= 1e-6 * x.update.delta_OI.norm()
            assert x.residual_norm == pytest.approx(y.residual_norm, rel=1e-6)
    # Every worker was edited: the state after the last edited block is no longer the base's.
    above = LAYERS[-1] + 1
    states = [
        keys.current_NO
        for executor in both
        for keys in executor.broadcast("keys", len(encoded), encoded, above, above)
    ]
    assert len(states) == 3
    assert all(torch.equal(state, states[0]) for state in states)
    both[0].broadcast("load", ModelSpec(files=LocalFiles(folder)))
    (base,) = both[0].broadcast("keys", 0, encoded, above, above)
    assert not torch.equal(base.current_NO, states[0])


def test_judgements(both: tuple[Executor, Executor], tmp_path: Path) -> None:
    """Side effects, too, of which each is spread over both workers, before and after an edit."""
    heldout = [window[:32] for window in windows()[:3]]
    parts = side_effects.side_effect_parts(
        REQUESTS,
        heldout=heldout,
        sample=free_text.Sample.of(REQUESTS, JUDGEMENT),
        settings=JUDGEMENT,
    )
    counts = Counter(type(part).__name__ for part in parts)
    assert counts == {"Texts": 3, "Entropies": 2, "Likelihoods": 2, "Predictions": 3}

    def judged(executor: Executor, reference: DriftReference | None) -> tuple[Any, DriftReference]:
        return stages.judge(
            executor,
            REQUESTS,
            heldout=heldout,
            reference=reference,
            settings=JUDGEMENT,
            progress=Silent(),
        )

    (first, reference), (second, other) = (judged(executor, None) for executor in both)
    assert first == second
    assert len(first.facts) == len(REQUESTS)
    assert all(value is not None for value in first.metrics.values())
    assert reference.prompts == other.prompts and len(reference.prompts) == 5
    assert torch.equal(reference.logprobs_NV, other.logprobs_NV)
    edited = save_tiny(tmp_path / "edited", seed=1, bos=True)
    for executor in both:
        executor.broadcast("load", ModelSpec(files=LocalFiles(edited)))
    (third, _), (fourth, _) = (judged(executor, reference) for executor in both)
    assert third == fourth
    assert third.metrics["neighbourhood_kl"] > 0.01 < third.metrics["drift_kl"]
