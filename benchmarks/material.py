"""What the benchmarks work on, and memedit's stages called one by one so that each can be timed.

Knows the real data's default paths and the settings that the published method has. Does not know
the plain side (`tests.plain`) or where results go (`benchmarks.record`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from memedit.config import MomentSettings, SolveSettings, TargetSettings
from memedit.defaults import defaults_for
from memedit.errors import InputError
from memedit.evaluate import score_facts, summarise
from memedit.executor import Executor, InlineExecutor
from memedit.model import LoadedModel, ModelSpec
from memedit.moments import SecondMoment, windows_of
from memedit.progress import Silent
from memedit.prompts import BARE, FIXED_CONTEXTS, EncodedRequest, encode_request
from memedit.requests import EditRequest
from memedit.solve import METHODS
from memedit.stages import solve_layers
from memedit.targets import Target
from workflows.corpora import open_corpus
from workflows.facts import read_facts
from workflows.models import resolve_model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SCORES = (
    "efficacy",
    "paraphrase",
    "neighbourhood",
    "score",
    "efficacy_exact",
    "paraphrase_exact",
    "generation",
)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What decides the result of a run; the defaults are the published method on SmolLM2."""

    layers: tuple[int, ...] = (5, 6, 7, 8, 9)
    targets: TargetSettings = field(default_factory=TargetSettings)
    contexts: tuple[str, ...] = (BARE, *FIXED_CONTEXTS)
    moments: MomentSettings = field(
        default_factory=lambda: MomentSettings(tokens=60_000, window=256, tolerance=0.0)
    )
    lam: float = 400.0
    ridge: float = 0.0


def default_settings(loaded: LoadedModel, facts: int) -> RunSettings:
    """What memedit chooses by itself for this model and so many facts."""
    chosen = defaults_for(loaded.model.config, facts).settings
    contexts = chosen.contexts
    assert contexts.kind != "sampled" and chosen.solve.lam is not None
    templates = contexts.templates or FIXED_CONTEXTS
    return RunSettings(
        layers=chosen.layers,
        targets=chosen.targets,
        contexts=(BARE,) if contexts.kind == "none" else (BARE, *templates),
        moments=chosen.moments,
        lam=chosen.solve.lam,
        ridge=chosen.solve.ridge,
    )


def add_material_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that all benchmarks share."""
    parser.add_argument("--model", default="smollm2", help="as the command line takes it")
    parser.add_argument("--facts", type=Path, default=DATA / "counterfact-2000.jsonl")
    parser.add_argument("--corpus", type=Path, default=DATA / "wikipedia-sample.parquet")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its choice")


def add_half_argument(parser: argparse.ArgumentParser) -> None:
    """Which half of the table: settings are chosen on the first, figures come from the second."""
    parser.add_argument("--half", choices=("first", "second"), default="second")


def half_of(path: Path, half: str) -> list[str]:
    """The lines of one half of a JSON lines fact table."""
    lines = path.read_text(encoding="utf-8").splitlines()
    middle = len(lines) // 2
    return lines[:middle] if half == "first" else lines[middle:]


def spec_of(args: argparse.Namespace) -> ModelSpec:
    """The model that the arguments name, float32; sets torch's threads."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return ModelSpec(files=resolve_model(args.model).files)


@contextmanager
def first_rows(path: Path, count: int) -> Iterator[Path]:
    """A file with the first rows of a JSON lines fact table."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise InputError(f"holds {len(lines)} facts, not {count}", source=path)
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder) / f"{path.stem}-{count}.jsonl"
        some.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
        yield some


def first_facts(
    loaded: LoadedModel, path: Path, count: int, contexts: Sequence[str]
) -> tuple[list[EditRequest], list[EncodedRequest]]:
    """The first facts of a table with their token ids; those that memedit refuses are left out."""
    with first_rows(path, count) as some:
        requests = read_facts(some, on_bad_row="skip").requests
    kept: list[tuple[EditRequest, EncodedRequest]] = []
    for request in requests:
        try:
            kept.append((request, encode_request(loaded.tokenizer, request, contexts)))
        except InputError as error:
            print(f"left out {json.dumps(request.text, ensure_ascii=False)}: {error}")
    return [r for r, _ in kept], [e for _, e in kept]


def corpus_windows(loaded: LoadedModel, path: Path, settings: MomentSettings) -> list[list[int]]:
    """Windows of token ids from a corpus, as memedit draws them."""
    documents = [loaded.tokenizer(text)["input_ids"] for text in open_corpus(path).documents()]
    drawn = windows_of(
        documents,
        window=settings.window,
        tokens=settings.tokens,
        seed=settings.seed,
        separator=loaded.tokenizer.eos_token_id,
    )
    return list(drawn)


@contextmanager
def restored(loaded: LoadedModel, layers: Sequence[int]) -> Iterator[None]:
    """Put the weights of the layers back at the end."""
    weights = [loaded.arch.rewrite_module(loaded.model, layer).weight for layer in layers]
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    before = [weight.detach().clone() for weight in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(tensors, before, strict=True):
                weight.copy_(old)


class OpenExecutor(InlineExecutor):
    """memedit's in-process executor, with its model in reach and a way back to the base."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.spec = spec

    @property
    def loaded(self) -> LoadedModel:
        """The worker's model as it is now."""
        assert self._worker is not None
        return self._worker.loaded

    def reset(self) -> None:
        """Forget all edits and states: load the base again."""
        self.broadcast("load", self.spec)


def solve(
    executor: OpenExecutor,
    encoded: Sequence[EncodedRequest],
    targets: Sequence[Target],
    moments: Mapping[int, SecondMoment],
    settings: RunSettings,
    *,
    device: str = "cpu",
) -> dict[int, Tensor]:
    """Edit the executor's model with memedit's keys and solver; Δ [O, I] of each layer."""
    scale = executor.loaded.arch.residual_scale
    return solve_on(
        executor, encoded, targets, moments, settings, residual_scale=scale, device=device
    )


def solve_on(
    executor: Executor,
    encoded: Sequence[EncodedRequest],
    targets: Sequence[Target],
    moments: Mapping[int, SecondMoment],
    settings: RunSettings,
    *,
    residual_scale: float,
    device: str = "cpu",
) -> dict[int, Tensor]:
    """See `solve`; on workers whose models are out of reach."""
    solved = solve_layers(
        executor,
        encoded,
        targets,
        moments=moments,
        layers=settings.layers,
        method=METHODS["memit"],
        settings=SolveSettings(lam=settings.lam, ridge=settings.ridge),
        residual_scale=residual_scale,
        stored=dict.fromkeys(settings.layers, torch.float32),
        device=torch.device(device),
        progress=Silent(),
    )
    return {done.update.layer: done.update.delta_OI for done in solved}


def given_targets(encoded: Sequence[EncodedRequest], zs_NO: Tensor) -> list[Target]:
    """Z vectors from elsewhere in the form that memedit's solver takes."""
    return [
        Target(
            case_id=request.request.case_id,
            z_O=z_O,
            h_norm=0.0,
            delta_norm=0.0,
            losses=(),
            converged=False,
        )
        for request, z_O in zip(encoded, zs_NO, strict=True)
    ]


def scores(loaded: LoadedModel, requests: Sequence[EditRequest]) -> dict[str, float | None]:
    """The metrics of the model as it is now, without side effects."""
    whole = summarise(score_facts(loaded.model, loaded.tokenizer, loaded.arch, requests))
    return {name: whole[name] for name in SCORES}


def shown(
    metrics: Mapping[str, float | None], decimals: Mapping[str, int] | None = None
) -> dict[str, str]:
    """Metrics as cells of a table, with one decimal where `decimals` says nothing else."""
    places = decimals or {}
    return {
        name: "-" if value is None else f"{value:.{places.get(name, 1)}f}"
        for name, value in metrics.items()
    }
